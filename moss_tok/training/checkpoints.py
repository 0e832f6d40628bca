"""Saving and restoring the train state, each step a checkpoint that `moss_tok.load` reads.

Beside config.json, a step holds `params/` (the averaged weights, if there is an average),
`discriminators/` in the adversarial stage, `language/` and its files where there is a language
model, and `state/`: everything else that a step changes.
"""

from typing import Any

import jax
import orbax.checkpoint as ocp

from moss_tok import sharding, storage
from moss_tok.codec import pretrained
from moss_tok.config import CodecConfig, TrainConfig
from moss_tok.language import pretrained as language_models
from moss_tok.language.config import LanguageConfig
from moss_tok.language.text import Tokenizer
from moss_tok.training.state import TrainState

_DISCRIMINATORS = "discriminators"


class Checkpoints:
    """The saved steps of a run, WORKDIR/checkpoints/STEP; a context manager.

    Saving goes on in the background; leaving the context waits for it.
    """

    def __init__(
        self,
        workdir: storage.Path,
        codec: CodecConfig,
        config: TrainConfig,
        texts: dict[str, str] | None = None,
    ):
        """Of the run `config`; `texts` are files that every step gets, by name."""
        self._folder = storage.absolute(workdir) / pretrained.STEPS_FOLDER
        self._codec, self._texts = codec, texts or {}
        self._keep, self._keep_every = config.keep_checkpoints, config.keep_every
        # The handler writes into the folder at once, so it has to exist.
        options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        self._saver = ocp.AsyncCheckpointer(pretrained.CheckpointHandler(), async_options=options)
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
        folder = self._folder / pretrained.step_name(int(state.step))
        trees = _split(state.best_params) | {"state": _flat(_rest(state))}
        if state.discriminators is not None:
            trees[_DISCRIMINATORS] = state.discriminators
        self._check_space(trees)
        try:
            with storage.named_errors(folder):
                self._saver.save(
                    folder, args=pretrained.CheckpointArgs(self._codec, trees, self._texts)
                )
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(
                f"{folder}: the checkpoint could not be written ({reason}); "
                f"earlier ones are intact: {self._names()}"
            ) from error

    def restore_latest(self, like: TrainState, say: Any) -> TrainState | None:
        """The newest step that can be read; broken ones are set aside, and `say` is told.

        Args:
          like: Structure, shapes and shardings, a tree of ShapeDtypeStructs.
          say: Takes a line of text.

        Returns:
          The state, or None if nothing was saved.

        Raises:
          ValueError: Steps were saved, and none can be read.
        """
        steps = pretrained.saved_steps(self._folder.parent)
        for step in reversed(steps):
            folder = self._folder / pretrained.step_name(step)
            state, error = None, "another process cannot read it"
            try:
                state = _restore(folder, like)
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
            left = [p for p in pretrained.step_folders(self._folder.parent)
                    if not pretrained.is_complete(p)]  # fmt: skip
            for folder in [*left, *self._folder.glob("*.orbax-checkpoint-tmp*")]:
                storage.remove_folder(folder)

    def _check_space(self, trees: dict[str, Any]) -> None:
        """Raises ValueError where the disk is too full for another checkpoint."""
        note = f"; earlier ones are intact: {self._names()}"
        pretrained.check_space(self._folder, trees, note)

    def _names(self) -> str:
        steps = pretrained.saved_steps(self._folder.parent)
        return ", ".join(map(pretrained.step_name, steps)) or "none yet"

    def _remove_old(self) -> None:
        if not sharding.is_main_process():
            return
        for step in pretrained.saved_steps(self._folder.parent)[: -self._keep]:
            if not (self._keep_every and step % self._keep_every == 0):
                storage.remove_folder(self._folder / pretrained.step_name(step))


def load_discriminators(path: str, shapes: Any) -> Any | None:
    """The discriminators of a checkpoint or workdir, of `shapes`, or None if it has none."""
    folder = pretrained.find_checkpoint(path) / _DISCRIMINATORS
    if not folder.is_dir():
        return None
    return pretrained.read_tree(folder, shapes)


def load_language(
    path: str, config: LanguageConfig, tokenizer: Tokenizer, shapes: Any
) -> Any | None:
    """The language model of a checkpoint or workdir, or None if it has not this one."""
    folder = pretrained.find_checkpoint(path)
    found = language_models.load_config(folder)
    if found is None or found[0] != config or found[1].json != tokenizer.json:
        return None
    return pretrained.read_tree(folder / language_models.TREE, shapes)


def _split(params: Any) -> dict[str, Any]:
    """Parameters by folder: what encode and decode need, and the language model."""
    codec = {name: tree for name, tree in params.items() if name != language_models.TREE}
    rest = {name: params[name] for name in params.keys() - codec.keys()}
    return {"params": codec, **rest}


def _restore(folder: storage.Path, like: TrainState) -> TrainState:
    best: dict[str, Any] = {}
    for name, shapes in _split(like.best_params).items():
        tree = pretrained.read_tree(folder / name, shapes)
        best |= tree if name == "params" else {name: tree}
    discriminators = like.discriminators
    if discriminators is not None:
        discriminators = pretrained.read_tree(folder / _DISCRIMINATORS, discriminators)
    shapes = _rest(like)
    flat = pretrained.read_tree(folder / "state", _flat(shapes))
    leaves = [flat[name] for name in _flat(shapes)]
    state = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    state = state.replace(discriminators=discriminators)
    return state.replace(params=best) if like.ema is None else state.replace(ema=best)


def _rest(state: TrainState) -> TrainState:
    """The state without what has trees of its own."""
    state = state.replace(discriminators=None)
    return state.replace(params=None) if state.ema is None else state.replace(ema=None)


def _flat(state: TrainState) -> dict[str, Any]:
    """Leaves by name: optax's nested tuples do not survive a file format."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _free_name(folder: storage.Path) -> storage.Path:
    names = (folder.with_name(f"{folder.name}.broken{i or ''}") for i in range(1000))
    return next(name for name in names if not name.exists())
