"""Saving and restoring the train state; each saved step is a checkpoint for `moss_tok.load`.

A saved step holds the objective's files (config.json, ...), `training.json`, `params/` (the
averaged weights, if there is an average), a folder for each part of the parameters or of the extra
state that the objective stores separately (`language/`, `discriminators/`), and `state/`:
everything else that a training step changes.
"""

from typing import Any

import jax
import orbax.checkpoint as ocp

from moss_tok import checkpoint, sharding, storage
from moss_tok.training import provenance
from moss_tok.training.config import RunConfig
from moss_tok.training.objective import Objective, Say
from moss_tok.training.state import TrainState

_PARAMS = "params"
_STATE = "state"
_COUNTS = ("totals.skipped", "totals.skipped_in_row", "totals.failed_reads")


# Orbax's CheckpointManager and Composite are not used. Composite puts everything, config.json too,
# into a folder per item, so a step would no longer be a checkpoint for `moss_tok.load`, and older
# workdirs could not be resumed. Also, files.json, which reveals truncated copies, could not be
# written before the atomic rename. CheckpointManager restores only the newest step; here, a broken
# step is renamed and all processes go back to the same earlier one.
class Checkpoints:
    """The saved steps of a run, WORKDIR/checkpoints/STEP; a context manager.

    Saves run in the background; leaving the context waits for them.
    """

    def __init__(
        self,
        workdir: storage.Path,
        config: RunConfig,
        objective: Objective,
        training: dict[str, Any],
    ):
        """Opens the folder of steps and removes unfinished saves of a killed run.

        `training` has the fields of training.json, see `provenance.describe`.
        """
        self._folder = storage.absolute(workdir) / checkpoint.STEPS_FOLDER
        self._config = config
        self._objective = objective
        self._files = objective.files()
        self._training = training
        # The handler writes into the folder immediately, so the folder has to exist.
        options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        self._saver = ocp.AsyncCheckpointer(checkpoint.CheckpointHandler(), async_options=options)
        self._remove_unfinished()
        sharding.barrier("checkpoints")

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        try:
            self.wait()
        except ValueError:
            if kind is None:  # otherwise show the first error
                raise
        finally:
            self._saver.close()

    def wait(self) -> None:
        """Waits for the save in progress. Raises ValueError if it failed."""
        try:
            self._saver.wait_until_finished()
        except Exception as error:  # Orbax and TensorStore raise many types for file-system errors
            self._remove_unfinished()
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{self._folder}: the checkpoint could not be written ({reason}); "
                f"earlier ones are intact: {self._names()}"
            ) from error
        self._remove_old()

    def save(self, state: TrainState) -> None:
        """Starts saving `state`; it may be donated as soon as this returns."""
        self.wait()
        with storage.named_errors(self._folder):
            self._folder.mkdir(exist_ok=True)
        step = int(state.step)
        folder = self._folder / checkpoint.step_name(step)
        texts = {checkpoint.TRAINING_NAME: provenance.to_text(self._training, step)}
        trees = _folders(self._objective, state)
        trees[_STATE] = _flat(_without_folders(self._objective, state))
        self._check_space(trees)
        try:
            with storage.named_errors(folder):
                self._saver.save(folder, args=checkpoint.CheckpointArgs(self._files | texts, trees))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(
                f"{folder}: the checkpoint could not be written ({reason}); "
                f"earlier ones are intact: {self._names()}"
            ) from error

    def restore_latest(self, like: TrainState, say: Say) -> TrainState | None:
        """Restores the newest readable step; broken ones are renamed, with a warning through `say`.

        Args:
          like: Structure, shapes and shardings of the state, a tree of ShapeDtypeStructs.
          say: Prints a line of text.

        Returns:
          The state, or None if nothing was saved.

        Raises:
          ValueError: Steps were saved, but none can be read.
        """
        steps = checkpoint.saved_steps(self._folder.parent)
        for step in reversed(steps):
            folder = self._folder / checkpoint.step_name(step)
            state = None
            error: str | ValueError = "another process cannot read it"
            try:
                state = _restore(folder, self._objective, like)
            except ValueError as reason:
                error = reason
            if sharding.all_agree(state is not None):
                return state
            if step == steps[0]:
                raise ValueError(error)
            say(f"warning: {error}; going back to the checkpoint before it")
            if sharding.is_main_process():
                folder.rename(_free_name(folder))
        return None

    def _remove_unfinished(self) -> None:
        if sharding.is_main_process():
            for folder in checkpoint.step_folders(self._folder.parent):
                if not checkpoint.is_complete(folder):
                    storage.remove_folder(folder)
            for folder in self._folder.glob("*.orbax-checkpoint-tmp*"):
                storage.remove_folder(folder)

    def _check_space(self, trees: dict[str, Any]) -> None:
        """Raises ValueError if the disk is too full for another checkpoint."""
        note = f"; earlier ones are intact: {self._names()}"
        checkpoint.check_space(self._folder, trees, note)

    def _names(self) -> str:
        steps = checkpoint.saved_steps(self._folder.parent)
        return ", ".join(map(checkpoint.step_name, steps)) or "none yet"

    def _remove_old(self) -> None:
        if not sharding.is_main_process():
            return
        newest = self._config.keep_checkpoints
        every = self._config.keep_every
        for step in checkpoint.saved_steps(self._folder.parent)[:-newest]:
            permanent = every and step % every == 0
            if not permanent:
                storage.remove_folder(self._folder / checkpoint.step_name(step))


def load_folder(path: str, name: str, shapes: Any) -> Any | None:
    """Reads the tree in folder `name` of a checkpoint or workdir; None if there is no such folder.

    `shapes` has the structure, shapes and shardings of the tree.
    """
    folder = checkpoint.find_checkpoint(path) / name
    if not folder.is_dir():
        return None
    return checkpoint.read_tree(folder, shapes)


def _folders(objective: Objective, state: TrainState) -> dict[str, Any]:
    """The parts of a state that have folders of their own in a checkpoint: name -> tree."""
    params = dict(state.best_params)
    trees: dict[str, Any] = {_PARAMS: params}
    for name in objective.param_folders:
        if name in params:
            trees[name] = params.pop(name)
    for name in objective.extra_folders:
        trees[name] = state.extra[name]
    return trees


def _without_folders(objective: Objective, state: TrainState) -> TrainState:
    """The state without the parts that `_folders` returns."""
    extra = dict(state.extra)
    for name in objective.extra_folders:
        extra.pop(name, None)
    state = state.replace(extra=extra)
    if state.ema is None:
        return state.replace(params=None)
    return state.replace(ema=None)


def _restore(folder: storage.Path, objective: Objective, like: TrainState) -> TrainState:
    best: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for name, shapes in _folders(objective, like).items():
        tree = checkpoint.read_tree(folder / name, shapes)
        if name in objective.extra_folders:
            extra[name] = tree
        elif name == _PARAMS:
            best |= tree
        else:
            best[name] = tree
    shapes = _without_folders(objective, like)
    flat = checkpoint.read_tree(folder / _STATE, _flat(shapes))
    leaves = [flat[name] for name in _flat(shapes)]
    state = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    state = state.replace(extra=state.extra | extra)
    if like.ema is None:
        return state.replace(params=best)
    return state.replace(ema=best)


def _flat(state: TrainState) -> dict[str, Any]:
    """Leaves by name, because files cannot store optax's nested tuples."""
    flat = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        flat[_name_on_disk(name)] = leaf
    return flat


def _name_on_disk(name: str) -> str:
    """Name of a leaf in files; keeps the names of older runs, so that they can be resumed."""
    if name.startswith("extra."):
        return name.removeprefix("extra.")
    if name in _COUNTS:
        return name.removeprefix("totals.")
    if name == "totals.metrics.semantic_loss_steps":
        return "totals.metrics.text_steps"
    return name


def _free_name(folder: storage.Path) -> storage.Path:
    """The first of NAME.broken, NAME.broken1, NAME.broken2, ... that does not exist."""
    path = folder.with_name(f"{folder.name}.broken")
    number = 0
    while path.exists():
        number += 1
        path = folder.with_name(f"{folder.name}.broken{number}")
    return path
