"""Checkpoints as people have them: links, pointers, half copies, other precisions."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from helpers import GOLDEN, leaves_equal

import moss_tok
from moss_tok import tensors
from moss_tok.codec import codes, pretrained
from moss_tok.data import prepare, records
from moss_tok.language import text

SETTINGS = prepare.Settings(num_shards=1)


@pytest.fixture
def cached(tmp_path):
    """An official checkpoint as the cache of the Hugging Face Hub has it: links into blobs."""
    top = tmp_path / "models--openmoss--tiny"
    snapshot = top / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (top / "blobs").mkdir()
    (top / "refs").mkdir()
    (top / "refs" / "main").write_text("0123abc")
    for number, name in enumerate(("config.json", "model.safetensors")):
        shutil.copy(GOLDEN / "v1_tiny" / name, top / "blobs" / f"{number}")
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    return top


def test_the_cache_of_the_hub(cached, v1_tiny):
    for path in (cached, cached / "snapshots" / "0123abc"):
        assert leaves_equal(moss_tok.load(path).params, v1_tiny.params)
    (cached / "blobs" / "1").unlink()
    with pytest.raises(ValueError, match="model.safetensors: a link to a missing file"):
        moss_tok.load(cached)
    index = cached / "snapshots" / "0123abc" / tensors.INDEX_NAME
    index.write_text('{"weight_map": {"a": "model.safetensors"}}')
    with pytest.raises(ValueError, match="model.safetensors: a link to a missing file"):
        moss_tok.load(cached)
    (cached / "refs" / "main").write_text("another")
    with pytest.raises(ValueError, match="no config.json, so it is not a checkpoint"):
        moss_tok.load(cached)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 7\n"


def test_pointers_of_git_lfs(micro, cached, tmp_path):
    pretrained.save(tmp_path / "ours", micro.config, micro.params)
    largest = max((tmp_path / "ours" / "params").rglob("*"), key=lambda p: p.stat().st_size)
    paths = [cached / "blobs" / "1", largest]
    for name in ("a.npz", "tokenizer.json", "a.array_record"):
        paths.append(tmp_path / name)
    for path in paths:
        path.write_bytes(POINTER)
    for call, name in (
        (lambda: moss_tok.load(cached), "model.safetensors: "),
        (lambda: moss_tok.load(tmp_path / "ours"), "broken checkpoint: params/.*: "),
        (lambda: codes.read(tmp_path / "a.npz", micro), r"a.npz: not a .npz .*\("),
        (lambda: text.load(tmp_path), r"tokenizer.json: not a tokenizer.json \("),
        (lambda: records.shard(tmp_path / "a.array_record"), r"no ArrayRecord files \("),
    ):
        with pytest.raises(
            ValueError, match=f"{name}this is a git-lfs pointer: run `git lfs pull`"
        ):
            call()


def test_a_checkpoint_that_was_copied_halfway(micro, tmp_path, capfd):
    """Whichever file is missing or cut; one line, and nothing that Orbax prints."""
    whole = tmp_path / "whole"
    pretrained.save(whole, micro.config, micro.params)
    names = ["files.json", *json.loads((whole / "files.json").read_text())]
    for name in names:
        for size in (None, 0, 7):
            half = shutil.copytree(whole, tmp_path / "half")
            data = (half / name).read_bytes()
            (half / name).unlink()
            if size is not None:
                (half / name).write_bytes(data[:size])
            if size is None or len(data) != size:
                with pytest.raises(ValueError, match="broken|no config.json") as error:
                    moss_tok.load(half)
                assert "\n" not in str(error.value)
            shutil.rmtree(half)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_weights_of_other_precisions(tmp_path, v1_tiny, dtype):
    """As they are: what was rounded when they were written."""
    folder = shutil.copytree(GOLDEN / "v1_tiny", tmp_path / "official")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    kind = jnp.dtype(dtype)
    rounded = {name: x.astype(kind) for name, x in tensors.items()}
    safetensors.numpy.save_file(rounded, folder / "model.safetensors")
    fields = json.loads((folder / "config.json").read_text()) | {"dtype": dtype}
    (folder / "config.json").write_text(json.dumps(fields))
    found = moss_tok.load(folder)
    back = {name: x.astype(np.float32) for name, x in rounded.items()}
    safetensors.numpy.save_file(back, folder / "model.safetensors")
    assert leaves_equal(found.params, moss_tok.load(folder).params)
    wav = 0.1 * np.sin(np.arange(3840, dtype=np.float32))[None, None]
    assert moss_tok.encode(found, wav).codes.shape == moss_tok.encode(v1_tiny, wav).codes.shape
