"""Checkpoints as folders: finding, reading and writing them.

A checkpoint is a directory with `config.json` and `params/` (Orbax); a training step adds `state/`.
It is written under a temporary name and renamed when it is complete. `files.json` lists every file
and its size, so that a damaged copy is noticed before it is read.
"""

import asyncio
import contextlib
import dataclasses
import glob
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from moss_tok import sharding, storage, tensors
from moss_tok.json_files import read_json_object

STEPS_FOLDER = "checkpoints"
_FILES_NAME = "files.json"
_COMMIT_MARKER = "commit_success.txt"


def find_checkpoint(path: str | storage.Path) -> storage.Path:
    """The directory that holds the weights `path` stands for; ValueError if there is none."""
    folder = storage.to_path(path)
    if not folder.exists():
        folder = _download(str(path))
    if not folder.is_dir():
        raise ValueError(f"{path}: not a checkpoint directory")
    if (folder / STEPS_FOLDER).is_dir():
        steps = saved_steps(folder)
        if not steps:
            raise ValueError(f"{path}: no checkpoint was saved yet")
        return folder / STEPS_FOLDER / step_name(steps[-1])
    if not (folder / "config.json").exists():
        folder = _snapshot(folder) or folder
    if not (folder / "config.json").exists():
        raise ValueError(f"{path}: no config.json, so it is no checkpoint")
    official = tensors.is_official(folder)
    if official and storage.is_remote(folder):
        raise ValueError(f"{folder}: an official directory has to be on this machine")
    for name in (tensors.WEIGHTS_NAME, tensors.INDEX_NAME):
        if not official and os.path.islink(folder / name):
            raise ValueError(f"{folder / name}: a link to a file that is not there")
    if not (official or (folder / "params").is_dir()):
        raise ValueError(f"{path}: neither params/ nor {tensors.WEIGHTS_NAME} beside config.json")
    return folder


def _snapshot(folder: storage.Path) -> storage.Path | None:
    """The main version in a cache folder of the Hugging Face Hub, models--ORGANIZATION--NAME."""
    reference = folder / "refs" / "main"
    if not reference.is_file():
        return None
    return folder / "snapshots" / reference.read_text().strip()


def _download(name: str) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"{name}: no such checkpoint directory")
    try:
        import huggingface_hub
    except ImportError as error:
        hint = "to fetch it from the Hugging Face Hub, pip install huggingface_hub"
        raise ValueError(f"{name}: no such checkpoint directory ({hint})") from error
    try:
        files = ["config.json", "*.safetensors", "*.safetensors.index.json"]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
    except Exception as error:  # the Hub's errors share no base class
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{name}: no such directory, and not on the Hub: {reason}") from error


def step_name(step: int) -> str:
    """Name of the folder of a saved training step."""
    return f"{step:08d}"


def saved_steps(workdir: storage.Path) -> list[int]:
    """Complete training steps saved in `workdir`, ascending."""
    return sorted(int(p.name) for p in step_folders(workdir) if is_complete(p))


def step_folders(workdir: storage.Path) -> list[storage.Path]:
    """Folders of training steps in `workdir`, complete or not."""
    folder = workdir / STEPS_FOLDER
    if not folder.is_dir():
        return []
    return [p for p in folder.iterdir() if re.fullmatch(r"\d{8,}", p.name)]


def is_complete(step_folder: storage.Path) -> bool:
    """In buckets, where nothing can be renamed at once, Orbax writes a marker last."""
    return not storage.is_remote(step_folder) or (step_folder / _COMMIT_MARKER).exists()


def read_tree(folder: storage.Path, shapes: Any) -> Any:
    """Reads the arrays of `shapes`, a tree of ShapeDtypeStructs, and nothing else.

    Where a struct has a sharding, the array comes with it.

    Raises:
      ValueError: Something is missing, misshapen or corrupt.
    """
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def arguments(x):
        sharding = x.sharding or device
        return ocp.ArrayRestoreArgs(dtype=x.dtype, sharding=sharding, global_shape=x.shape)

    restore = ocp.args.PyTreeRestore(
        item=shapes, restore_args=jax.tree.map(arguments, shapes), partial_restore=True
    )
    _check_files(folder)
    handler = ocp.PyTreeCheckpointHandler()
    path = storage.absolute(folder)
    try:
        found = handler.metadata(path).tree
        _check_shapes(folder, shapes, found)
        return handler.restore(path, args=restore)
    except _BadParametersError:
        raise
    except Exception as error:  # Orbax and TensorStore raise anything on damaged files
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{folder}: broken checkpoint: {reason[:200]}") from error


class _BadParametersError(ValueError):
    """Parameters are missing or misshapen."""


def _check_files(folder: storage.Path) -> None:
    """Raises ValueError if a file under `folder`, or a text beside it, is missing or cut.

    See `_FILES_NAME`.
    """
    listing = folder.parent / _FILES_NAME
    if not listing.exists():  # Orbax would print pages before it says what it lacks
        raise ValueError(
            f"{folder.parent}: broken checkpoint: {_FILES_NAME} is missing, was it copied halfway?"
        )
    for name, size_bytes in read_json_object(listing).items():
        file = folder.parent / name
        if folder not in file.parents and file.parent != folder.parent:
            continue
        if not file.is_file():
            raise ValueError(f"{folder.parent}: broken checkpoint: {name} is missing")
        found = storage.size_bytes(file)
        if found != size_bytes:
            reason = storage.pointer_hint(file) or f"it has {found} bytes, not {size_bytes}"
            raise ValueError(f"{folder.parent}: broken checkpoint: {name}: {reason}")


def _check_shapes(folder: storage.Path, wanted: Any, found: Any) -> None:
    def flat(tree):
        return {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(tree)}

    found = flat(found)
    problems = []
    for name, want in flat(wanted).items():
        if name not in found:
            problems.append(f"missing {name}")
        elif tuple(found[name].shape) != want.shape:
            problems.append(f"{name} has shape {found[name].shape}, not {want.shape}")
    if problems:
        listing = "; ".join(problems)
        raise _BadParametersError(f"{folder}: {len(problems)} bad parameters: {listing}")


class CheckpointHandler(ocp.AsyncCheckpointHandler):
    """Writes `config.json` and a folder per tree; Orbax renames the whole when it is complete."""

    def __init__(self):
        # One gigabyte in flight: Orbax's default holds a second copy of all arrays.
        self._trees = ocp.PyTreeCheckpointHandler(save_concurrent_gb=1)
        self._names: tuple[str, ...] = ()
        self._texts: tuple[str, ...] = ()

    async def async_save(self, directory: epath.Path, args: "CheckpointArgs"):
        """Starts writing; the futures end when the arrays are on disk."""
        if sharding.is_main_process():
            for name, text in args.files.items():
                (directory / name).write_text(text)
        self._names, self._texts = tuple(args.trees), tuple(args.files)
        futures = []
        for name, tree in args.trees.items():
            (directory / name).mkdir(exist_ok=True)
            tree = ocp.args.PyTreeSave(tree)
            futures += await self._trees.async_save(directory / name, args=tree) or []
        return futures

    def save(self, directory: epath.Path, args: "CheckpointArgs") -> None:
        """Writes and waits."""

        async def run():
            for future in await self.async_save(directory, args):
                future.result()

        asyncio.run(run())

    def restore(self, directory: epath.Path, args: Any = None) -> Any:
        """Not used: `read_tree` reads what it needs."""
        raise NotImplementedError

    def finalize(self, directory: epath.Path) -> None:
        """Merges what the processes wrote, and lists it."""
        for name in self._names:
            self._trees.finalize(directory / name)
        if sharding.is_main_process():
            files = [p for name in self._names for p in storage.files_under(directory / name)]
            files += [directory / name for name in self._texts]
            sizes = {str(p.relative_to(directory)): storage.size_bytes(p) for p in files}
            (directory / _FILES_NAME).write_text(json.dumps(sizes, indent=2) + "\n")

    def close(self) -> None:
        """Frees the handler's resources."""
        self._trees.close()


@ocp.args.register_with_handler(CheckpointHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class CheckpointArgs(ocp.args.CheckpointArgs):
    """What a checkpoint is made of.

    Attributes:
      files: Text files by name: "config.json", ...
      trees: Arrays by folder: "params", "state", ...
    """

    files: dict[str, str]
    trees: dict[str, Any]


def check_destination(path: Path) -> None:
    """Raises ValueError unless `path` can become a new directory."""
    os.fspath(path).encode()  # TensorStore takes UTF-8 only
    if os.path.lexists(path):
        raise ValueError(f"{path} exists already")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"no such folder: {path.absolute().parent}")


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory that becomes `path` when all went well, and else is removed."""
    check_destination(path)
    temporary = Path(tempfile.mkdtemp(dir=path.absolute().parent, prefix=".incomplete-"))
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_space(folder: storage.Path, trees: Any, note: str = "") -> None:
    """Raises ValueError where a folder has no room for `trees`: before writing half, not after."""
    if storage.is_remote(folder):
        return
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(trees)) / 1e6
    free = shutil.disk_usage(folder).free / 1e6
    if free < 1.1 * needed:
        sizes = f"{needed:.1f} MB, {free:.1f} MB are free"
        raise ValueError(f"{folder}: a checkpoint needs {sizes}{note}")


def save(path: str | Path, files: dict[str, str], trees: dict[str, Any]) -> None:
    """Writes a checkpoint; it appears under `path` only when it is complete.

    Args:
      path: New directory.
      files: Its text files by name, "config.json" among them.
      trees: Its trees of jax arrays by folder; Orbax would copy numpy arrays first.

    Raises:
      ValueError: `path` exists, or its folder does not or has no room.
    """
    path = storage.to_local_path(path).absolute()
    check_destination(path)
    check_space(path.parent, trees)
    try:
        with ocp.Checkpointer(CheckpointHandler()) as checkpointer:
            checkpointer.save(path, args=CheckpointArgs(files, trees))
    except BaseException:
        for left in path.parent.glob(f"{glob.escape(path.name)}.orbax-checkpoint-tmp*"):
            shutil.rmtree(left, ignore_errors=True)
        raise
