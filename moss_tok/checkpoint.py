"""Finds, reads and writes checkpoints, which are directories.

A checkpoint has `config.json` and `params/` (Orbax). A checkpoint of a training step also has
`state/`, and `training.json`, which describes the run. It is written under a temporary name and
renamed when it is complete. `files.json` lists every file and its size, so that a damaged copy is
detected before it is read.
"""

import asyncio
import contextlib
import dataclasses
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from moss_tok import assets, sharding, storage, tensors
from moss_tok.json_files import format_json, read_json_object

STEPS_FOLDER = "checkpoints"
TRAINING_NAME = "training.json"
RUN_CONFIG_NAME = "train_config.json"
_FILES_NAME = "files.json"
_COMMIT_MARKER = "commit_success.txt"


def find_checkpoint(path: str | storage.Path | None) -> storage.Path:
    """Returns the directory with the weights that `path` names.

    Args:
      path: A checkpoint, a training workdir (its newest complete step), a directory in the official
        layout, a cache folder of the Hugging Face Hub, or a Hub id, which is downloaded. None: the
        codec that comes with the package.

    Raises:
      ValueError: There is no checkpoint at `path`.
    """
    if path is None:
        return assets.codec_folder()
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
        raise ValueError(f"{path}: no config.json, so it is not a checkpoint")
    official = tensors.is_official(folder)
    if official and storage.is_remote(folder):
        raise ValueError(f"{folder}: a directory in the official layout must be on this machine")
    for name in (tensors.WEIGHTS_NAME, tensors.INDEX_NAME):
        if not official and os.path.islink(folder / name):
            raise ValueError(f"{folder / name}: a link to a missing file")
    if not (official or (folder / "params").is_dir()):
        raise ValueError(f"{path}: neither params/ nor {tensors.WEIGHTS_NAME} beside config.json")
    return folder


def _snapshot(folder: storage.Path) -> storage.Path | None:
    """The main revision in a Hugging Face cache folder, models--ORGANIZATION--NAME; or None."""
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
        files = ["config.json", "tokenizer.json", "*.safetensors", "*.safetensors.index.json"]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
    except Exception as error:  # the Hub's errors share no base class
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{name}: no such directory, and not on the Hub: {reason}") from error


def read_training(folder: storage.Path) -> dict[str, Any]:
    """The content of training.json, see `training.provenance`; {} if it is unknown.

    Checkpoints of earlier versions lack the file. For those in a workdir, train_config.json gives
    the flags and the seed.
    """
    if (folder / TRAINING_NAME).exists():
        return read_json_object(folder / TRAINING_NAME)
    run_config = folder.parent.parent / RUN_CONFIG_NAME
    if folder.parent.name != STEPS_FOLDER or not run_config.exists():
        return {}
    flags = read_json_object(run_config)
    for name, value in flags.items():
        flags[name] = short_name(value)
    return {"steps": int(folder.name), "flags": flags, "seed": flags.pop("seed", None)}


def short_name(value: Any) -> Any:
    """The last part of an absolute path, whose folders mean nothing on another machine."""
    if isinstance(value, str) and os.path.isabs(value):
        return os.path.basename(value)
    return value


def step_name(step: int) -> str:
    """Name of the folder of a training step's checkpoint."""
    return f"{step:08d}"


def saved_steps(workdir: storage.Path) -> list[int]:
    """Training steps with a complete checkpoint in `workdir`, in ascending order."""
    return sorted(int(p.name) for p in step_folders(workdir) if is_complete(p))


def read_newest(workdir: storage.Path, read: Callable[[storage.Path], Any]) -> Any:
    """Calls `read` with the newest complete checkpoint in `workdir` that it can read.

    The newest checkpoint may be damaged, see `training.checkpoints`.

    Returns:
      The result of `read`; None if there is no checkpoint.

    Raises:
      ValueError, OSError: No checkpoint can be read; this is the error of the oldest one.
    """
    steps = saved_steps(workdir)
    for step in reversed(steps):
        try:
            return read(workdir / STEPS_FOLDER / step_name(step))
        except (ValueError, OSError):
            if step == steps[0]:
                raise
    return None


def step_folders(workdir: storage.Path) -> list[storage.Path]:
    """Folders of the checkpoints in `workdir`, complete or not."""
    folder = workdir / STEPS_FOLDER
    if not folder.is_dir():
        return []
    return [p for p in folder.iterdir() if re.fullmatch(r"\d{8,}", p.name)]


def is_complete(step_folder: storage.Path) -> bool:
    """Whether a checkpoint was written to its end."""
    # Buckets have no atomic rename; there, Orbax writes a marker last.
    return not storage.is_remote(step_folder) or (step_folder / _COMMIT_MARKER).exists()


def read_tree(folder: storage.Path, shapes: Any) -> Any:
    """Reads the arrays that `shapes` lists.

    Args:
      folder: The folder of the tree in a checkpoint, "params" for example.
      shapes: Tree of ShapeDtypeStructs. The sharding of a struct, if any, is that of its array.

    Raises:
      ValueError: An array is missing, misshapen or corrupt, or the checkpoint is incomplete.
    """
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def arguments(shape):
        sharding = shape.sharding or device
        return ocp.ArrayRestoreArgs(dtype=shape.dtype, sharding=sharding, global_shape=shape.shape)

    restore = ocp.args.PyTreeRestore(
        item=shapes, restore_args=jax.tree.map(arguments, shapes), partial_restore=True
    )
    _check_files(folder)
    handler = ocp.PyTreeCheckpointHandler()
    path = storage.absolute(folder)
    try:
        _check_shapes(folder, shapes, handler.metadata(path).tree)
        return handler.restore(path, args=restore)
    except _BadParametersError:
        raise
    except Exception as error:  # Orbax and TensorStore raise any type on damaged files
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{folder}: broken checkpoint: {reason[:200]}") from error


class _BadParametersError(ValueError):
    """Parameters are missing or misshapen."""


def _check_files(folder: storage.Path) -> None:
    """Raises ValueError if a file under `folder`, or a file beside it, is missing or truncated.

    The files and their sizes are listed in files.json.
    """
    listing = folder.parent / _FILES_NAME
    if not listing.exists():  # Orbax would print pages before it names the missing file
        raise ValueError(
            f"{folder.parent}: broken checkpoint: {_FILES_NAME} is missing, was the copy "
            "interrupted?"
        )
    for name, size_bytes in read_json_object(listing).items():
        file = folder.parent / name
        if folder not in file.parents and file.parent != folder.parent:
            continue
        if not file.is_file():
            raise ValueError(f"{folder.parent}: broken checkpoint: {name} is missing")
        actual_bytes = storage.size_bytes(file)
        if actual_bytes != size_bytes:
            reason = storage.pointer_hint(file) or f"it has {actual_bytes} bytes, not {size_bytes}"
            raise ValueError(f"{folder.parent}: broken checkpoint: {name}: {reason}")


def _check_shapes(folder: storage.Path, expected: Any, metadata: Any) -> None:
    """Raises an error that names all arrays of `expected` that are missing or misshapen."""
    stored = _leaves_by_name(metadata)
    problems = []
    for name, array in _leaves_by_name(expected).items():
        if name not in stored:
            problems.append(f"missing {name}")
        elif tuple(stored[name].shape) != array.shape:
            problems.append(f"{name} has shape {stored[name].shape}, not {array.shape}")
    if problems:
        listing = "; ".join(problems)
        raise _BadParametersError(f"{folder}: {len(problems)} bad parameters: {listing}")


def _leaves_by_name(tree: Any) -> dict[str, Any]:
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        leaves[jax.tree_util.keystr(path)] = leaf
    return leaves


class CheckpointHandler(ocp.AsyncCheckpointHandler):
    """Writes text files and a folder per tree; Orbax renames the checkpoint when it is complete."""

    def __init__(self):
        # Limits buffers to one gigabyte; Orbax's default holds a second copy of all arrays.
        self._trees = ocp.PyTreeCheckpointHandler(save_concurrent_gb=1)
        self._names: tuple[str, ...] = ()
        self._texts: tuple[str, ...] = ()

    async def async_save(self, directory: epath.Path, args: "CheckpointArgs"):
        """Starts writing; the returned futures complete when the arrays are on disk."""
        if sharding.is_main_process():
            for name, text in args.files.items():
                (directory / name).write_text(text)
        self._names = tuple(args.trees)
        self._texts = tuple(args.files)
        futures = []
        for name, tree in args.trees.items():
            (directory / name).mkdir(exist_ok=True)
            tree = ocp.args.PyTreeSave(tree)
            futures += await self._trees.async_save(directory / name, args=tree) or []
        return futures

    def save(self, directory: epath.Path, args: "CheckpointArgs") -> None:
        """Writes a checkpoint and waits until it is on disk."""

        async def run():
            for future in await self.async_save(directory, args):
                future.result()

        asyncio.run(run())

    def restore(self, directory: epath.Path, args: Any = None) -> Any:
        """Not used: `read_tree` reads what it needs."""
        raise NotImplementedError

    def finalize(self, directory: epath.Path) -> None:
        """Merges the files of all processes, and writes `files.json`."""
        for name in self._names:
            self._trees.finalize(directory / name)
        if not sharding.is_main_process():
            return
        files = []
        for name in self._names:
            files += storage.files_under(directory / name)
        for name in self._texts:
            files.append(directory / name)
        sizes = {}
        for file in files:
            sizes[str(file.relative_to(directory))] = storage.size_bytes(file)
        (directory / _FILES_NAME).write_text(format_json(sizes))

    def close(self) -> None:
        """Frees the handler's resources."""
        self._trees.close()


@ocp.args.register_with_handler(CheckpointHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class CheckpointArgs(ocp.args.CheckpointArgs):
    """The contents of a checkpoint.

    Attributes:
      files: Contents of the text files by name: "config.json", ...
      trees: Trees of arrays by folder: "params", "state", ...
    """

    files: dict[str, str]
    trees: dict[str, Any]


def check_destination(path: Path) -> None:
    """Raises ValueError unless a new directory can be created at `path`."""
    os.fspath(path).encode()  # raises if the name is not UTF-8; TensorStore cannot write it
    if os.path.lexists(path):
        raise ValueError(f"{path} exists already")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"no such folder: {path.absolute().parent}")


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory that is renamed to `path` on success and removed on failure."""
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
    """Raises ValueError before anything is written if a folder has no room for `trees`.

    Args:
      folder: The folder of the checkpoint; buckets have no limit.
      trees: Trees of arrays.
      note: Appended to the message.
    """
    if storage.is_remote(folder):
        return
    needed_mb = sum(leaf.nbytes for leaf in jax.tree.leaves(trees)) / 1e6
    free_mb = shutil.disk_usage(folder).free / 1e6
    if free_mb < 1.1 * needed_mb:
        sizes = f"{needed_mb:.1f} MB, {free_mb:.1f} MB are free"
        raise ValueError(f"{folder}: a checkpoint needs {sizes}{note}")


def save(path: str | Path, files: dict[str, str], trees: dict[str, Any]) -> None:
    """Writes a checkpoint; it appears at `path` only when it is complete.

    Args:
      path: New directory.
      files: Contents of its text files by name, "config.json" among them.
      trees: Its trees of jax arrays by folder. Orbax would copy numpy arrays first.

    Raises:
      ValueError: `path` exists, its parent folder does not, or there is no room.
    """
    path = storage.to_local_path(path).absolute()
    check_destination(path)
    check_space(path.parent, trees)
    try:
        with ocp.Checkpointer(CheckpointHandler()) as checkpointer:
            checkpointer.save(path, args=CheckpointArgs(files, trees))
    except BaseException:
        for partial in path.parent.glob(f"{glob.escape(path.name)}.orbax-checkpoint-tmp*"):
            shutil.rmtree(partial, ignore_errors=True)
        raise
