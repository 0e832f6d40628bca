"""Saving and restoring the train state, each step a checkpoint that `moss_tok.load` reads.

A step holds the objective's files (config.json, ...), `params/` (the averaged weights, if there is
an average), a folder for each part of the parameters or of the extra state that the objective wants
apart (`language/`, `discriminators/`), and `state/`: everything else that a step changes.
"""

from typing import Any

import jax
import orbax.checkpoint as ocp

from moss_tok import checkpoint, sharding, storage
from moss_tok.training.config import RunConfig
from moss_tok.training.objective import Objective, Say
from moss_tok.training.state import TrainState

_PARAMS = "params"
_STATE = "state"
_COUNTS = ("totals.skipped", "totals.skipped_in_row", "totals.failed_reads")


class Checkpoints:
    """The saved steps of a run, WORKDIR/checkpoints/STEP; a context manager.

    Saving goes on in the background; leaving the context waits for it.
    """

    def __init__(self, workdir: storage.Path, config: RunConfig, objective: Objective):
        """Opens the folder of steps and removes what a killed run left unfinished."""
        self._folder = storage.absolute(workdir) / checkpoint.STEPS_FOLDER
        self._config = config
        self._objective = objective
        self._files = objective.files()
        # The handler writes into the folder at once, so it has to exist.
        options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        self._saver = ocp.AsyncCheckpointer(checkpoint.CheckpointHandler(), async_options=options)
        self._remove_unfinished()  # of a run that was killed
        sharding.barrier("checkpoints")

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        try:
            self.wait()
        except ValueError:
            if kind is None:  # else the first error is the one to show
                raise
        finally:
            self._saver.close()

    def wait(self) -> None:
        """Waits for the save under way. Raises ValueError if it failed."""
        try:
            self._saver.wait_until_finished()
        except Exception as error:  # what the file system makes Orbax and TensorStore raise
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
        folder = self._folder / checkpoint.step_name(int(state.step))
        trees = _folders(self._objective, state)
        trees[_STATE] = _flat(_rest(self._objective, state))
        self._check_space(trees)
        try:
            with storage.named_errors(folder):
                self._saver.save(folder, args=checkpoint.CheckpointArgs(self._files, trees))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(
                f"{folder}: the checkpoint could not be written ({reason}); "
                f"earlier ones are intact: {self._names()}"
            ) from error

    def restore_latest(self, like: TrainState, say: Say) -> TrainState | None:
        """The newest step that can be read; broken ones are set aside, and `say` is told.

        Args:
          like: Structure, shapes and shardings, a tree of ShapeDtypeStructs.
          say: Takes a line of text.

        Returns:
          The state, or None if nothing was saved.

        Raises:
          ValueError: Steps were saved, and none can be read.
        """
        steps = checkpoint.saved_steps(self._folder.parent)
        for step in reversed(steps):
            folder = self._folder / checkpoint.step_name(step)
            state, error = None, "another process cannot read it"
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
            left = [p for p in checkpoint.step_folders(self._folder.parent)
                    if not checkpoint.is_complete(p)]  # fmt: skip
            for folder in [*left, *self._folder.glob("*.orbax-checkpoint-tmp*")]:
                storage.remove_folder(folder)

    def _check_space(self, trees: dict[str, Any]) -> None:
        """Raises ValueError where the disk is too full for another checkpoint."""
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
            if not (every and step % every == 0):
                storage.remove_folder(self._folder / checkpoint.step_name(step))


def load_folder(path: str, name: str, shapes: Any) -> Any | None:
    """The tree in a folder of a checkpoint or workdir, of `shapes`, or None if it has none."""
    folder = checkpoint.find_checkpoint(path) / name
    if not folder.is_dir():
        return None
    return checkpoint.read_tree(folder, shapes)


def _folders(objective: Objective, state: TrainState) -> dict[str, Any]:
    """What others read of a state, a tree per folder."""
    rest = dict(state.best_params)
    trees = {name: rest.pop(name) for name in objective.param_folders if name in rest}
    extra = {name: state.extra[name] for name in objective.extra_folders}
    return {_PARAMS: rest} | trees | extra


def _rest(objective: Objective, state: TrainState) -> TrainState:
    """The state without what has folders of its own."""
    extra = {k: v for k, v in state.extra.items() if k not in objective.extra_folders}
    state = state.replace(extra=extra)
    return state.replace(params=None) if state.ema is None else state.replace(ema=None)


def _restore(folder: storage.Path, objective: Objective, like: TrainState) -> TrainState:
    best: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for name, shapes in _folders(objective, like).items():
        tree = checkpoint.read_tree(folder / name, shapes)
        if name in objective.extra_folders:
            extra[name] = tree
        else:
            best |= tree if name == _PARAMS else {name: tree}
    shapes = _rest(objective, like)
    flat = checkpoint.read_tree(folder / _STATE, _flat(shapes))
    leaves = [flat[name] for name in _flat(shapes)]
    state = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    state = state.replace(extra=state.extra | extra)
    return state.replace(params=best) if like.ema is None else state.replace(ema=best)


def _flat(state: TrainState) -> dict[str, Any]:
    """Leaves by name: optax's nested tuples do not survive a file format."""
    flat = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        flat[_name_on_disk(name)] = leaf
    return flat


def _name_on_disk(name: str) -> str:
    """Runs from before the state had `extra` and `totals` of this form can be resumed."""
    if name.startswith("extra."):
        return name.removeprefix("extra.")
    if name in _COUNTS:
        return name.removeprefix("totals.")
    if name == "totals.metrics.semantic_loss_steps":
        return "totals.metrics.text_steps"
    return name


def _free_name(folder: storage.Path) -> storage.Path:
    names = (folder.with_name(f"{folder.name}.broken{i or ''}") for i in range(1000))
    return next(name for name in names if not name.exists())
