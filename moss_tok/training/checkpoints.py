"""Saving and restoring the train state, each step a checkpoint that `moss_tok.load` reads."""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from moss_tok.codec import pretrained
from moss_tok.config import CodecConfig
from moss_tok.training.state import TrainState


class Checkpoints:
    """The saved steps of a run, WORKDIR/checkpoints/STEP; a context manager.

    Saving goes on in the background; leaving the context waits for it.
    """

    def __init__(self, workdir: Path, codec: CodecConfig, keep: int):
        self._workdir = workdir.absolute()
        self._codec = codec
        self._keep = keep
        # The handler writes into the folder at once, so it has to exist.
        options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        self._saver = ocp.AsyncCheckpointer(pretrained.CheckpointHandler(), async_options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self._saver.wait_until_finished()
        self._remove_old()
        self._saver.close()

    def save(self, state: TrainState) -> None:
        """Starts saving `state`; it may be donated as soon as this returns."""
        self._saver.wait_until_finished()
        self._remove_old()
        folder = self._workdir / pretrained.STEPS_FOLDER
        folder.mkdir(exist_ok=True)
        trees = {"params": state.params, "state": _flat(state)}
        self._saver.save(
            folder / pretrained.step_name(int(state.step)),
            args=pretrained.CheckpointArgs(self._codec, trees),
        )

    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        steps = pretrained.saved_steps(self._workdir)
        return steps[-1] if steps else None

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Reads a step; `like` gives structure and shapes (arrays or ShapeDtypeStructs).

        Raises:
          ValueError: It is broken, or of another model.
        """
        folder = self._workdir / pretrained.STEPS_FOLDER / pretrained.step_name(step)
        shapes = jax.eval_shape(lambda: like) if _concrete(like) else like
        params = pretrained.read_tree(folder / "params", shapes.params)
        flat = pretrained.read_tree(folder / "state", _flat(shapes))
        rest = shapes.replace(params={})
        leaves = [flat[name] for name in _flat(shapes)]
        return jax.tree.unflatten(jax.tree.structure(rest), leaves).replace(params=params)

    def _remove_old(self) -> None:
        for step in pretrained.saved_steps(self._workdir)[: -self._keep]:
            folder = self._workdir / pretrained.STEPS_FOLDER / pretrained.step_name(step)
            shutil.rmtree(folder, ignore_errors=True)


def _flat(state: TrainState) -> dict[str, Any]:
    """Everything but the parameters by name: optax's nested tuples do not survive a file format."""
    leaves = jax.tree_util.tree_leaves_with_path(state.replace(params={}))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _concrete(state: TrainState) -> bool:
    return isinstance(state.step, (jax.Array, np.ndarray))
