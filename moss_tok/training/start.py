"""The start of a run: checks its settings against an earlier run; resumes or initializes."""

from typing import Any

import jax

from moss_tok import checkpoint, settings, sharding, storage
from moss_tok.audio import files
from moss_tok.json_files import format_json, read_json_object
from moss_tok.training.checkpoints import Checkpoints
from moss_tok.training.config import TrainConfig
from moss_tok.training.objective import Say
from moss_tok.training.state import Recipe, TrainState, init_state

_CONFIG_NAME = checkpoint.RUN_CONFIG_NAME


def check_same_run(workdir: storage.Path, config: TrainConfig) -> None:
    """Raises ValueError if the run in the workdir has other settings that change the result.

    Settings that are missing in the file had their default value. Settings that this run does not
    have are ignored.
    """
    path = workdir / _CONFIG_NAME
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"workdir {workdir} is not a folder")
    if not path.exists():
        return
    earlier_values = read_json_object(path)
    values = settings.flatten(config)
    differences = []
    for field in settings.leaf_fields_of(config):
        value = values[field.name]
        earlier = earlier_values.get(field.name, settings.flag_default(field))
        if not field.metadata["free"] and not _is_same(field, earlier, value):
            differences.append(f"{field.name} was {earlier!r}, now {value!r}")
    if differences:
        raise ValueError(f"workdir {workdir} holds another run: {'; '.join(differences)}")


def _is_same(field: Any, earlier: Any, value: Any) -> bool:
    """Whether two texts or values of a flag have the same meaning."""
    kind = field.metadata["kind"]
    if kind is None or earlier == value:
        return earlier == value
    try:
        return kind.parse(field.name, earlier) == kind.parse(field.name, value)
    except (ValueError, AttributeError):  # a broken file
        return False


def write_config(workdir: storage.Path, config: TrainConfig) -> None:
    """Writes train_config.json in the main process, and checks that all processes see it.

    Raises:
      ValueError: A process does not see the file.
    """
    path = workdir / _CONFIG_NAME
    text = format_json(settings.flatten(config))
    if sharding.is_main_process():
        files.write_text(path, text)
    sharding.barrier("settings")
    if not sharding.all_agree(path.exists() and path.read_text() == text):
        raise ValueError(f"workdir {workdir}: must be a folder that all processes share")


def first_state(
    recipe: Recipe,
    init_from: str,
    shapes: TrainState,
    saver: Checkpoints,
    say: Say,
) -> TrainState:
    """The state of the newest checkpoint; without one, a new state, from `init_from` if set."""
    state = saver.restore_latest(shapes, say)
    if state is not None:
        say(f"resuming from step {int(state.step)}")
        return state
    params, extra = recipe.objective.start(init_from, shapes.params, shapes.extra, say)
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    init = jax.jit(init_state, static_argnums=0, out_shardings=shardings)
    return init(recipe, params, extra)
