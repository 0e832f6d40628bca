"""Exported programs: in a process without moss_tok they give the codes and the audio of ours."""

import json
import subprocess
import sys

import numpy as np
import pytest
from helpers import GOLDEN

import moss_tok
from moss_tok.cli.main import main
from moss_tok.codec import export

# A user's program: jax and safetensors, no moss_tok. Inputs and outputs are arrays in files.
CALLER = """
import sys, numpy as np
sys.path = [p for p in sys.path if "moss_tok" not in p]
from jax import export
import json, pathlib, safetensors.numpy

def steps(x):
    shapes = signature["arguments"][len(params)]
    state = {k: np.zeros([len(x) if n == "B" else n for n in s["shape"]], s["dtype"])
             for k, s in shapes.items()}
    parts = []
    for start in range(0, x.shape[-1], size):
        part = np.ascontiguousarray(x[..., start : start + size])
        lengths = np.full(len(x), part.shape[-1], np.int32)
        state, out = program.call(*params, state, part, lengths)
        parts.append(np.asarray(out))
    return np.concatenate(parts, axis=-1)

def whole(x):
    return program.call(*params, x, np.full(len(x), x.shape[-1], np.int32))[0]

for argument in sys.argv[1:]:
    function, size = argument.split(":")
    folder, size = pathlib.Path(function), int(size)
    program = export.deserialize(bytearray((folder / f"{function}.jaxexport").read_bytes()))
    signature = json.loads((folder / "signature.json").read_text())
    params = [safetensors.numpy.load_file(p) for p in folder.glob("params.safetensors")]
    call = steps if function.endswith("_step") else whole
    results = {name: call(x) for name, x in np.load(f"{function}.in.npz").items()}
    np.savez(f"{function}.out.npz", **results)
assert "moss_tok" not in sys.modules
"""
CHUNK_FRAMES = 3


@pytest.fixture(scope="module")
def called(tmp_path_factory, nano_tiny):
    """By function: the inputs, and the results of all functions from one process."""
    folder, hop = tmp_path_factory.mktemp("exported"), nano_tiny.config.hop_length
    wav = 0.1 * np.random.default_rng(0).standard_normal((3, 2, 12 * hop), np.float32)
    part = wav[..., :-100]
    codes = np.asarray(moss_tok.encode(nano_tiny, wav).codes).copy()
    codes[0, 0, 0] = -1
    inputs = {
        "encode": [part, part[:1, :, : 5 * hop + 1]],  # the same program takes other shapes
        "decode": [codes],
        "encode_step": [wav],
        "decode_step": [codes],
    }
    sizes = {"encode": 0, "decode": 0, "encode_step": CHUNK_FRAMES * hop,
             "decode_step": CHUNK_FRAMES}  # fmt: skip
    for function, arrays in inputs.items():
        weights = "inside" if function == "encode" else "beside"
        options = ["--function", function, "--weights", weights]
        options += ["--chunk-frames", str(CHUNK_FRAMES)]
        out = folder / function
        assert main(["export", str(GOLDEN / "nano_tiny"), str(out), *options]) == 0
        assert (out / "params.safetensors").exists() == (weights == "beside")
        np.savez(folder / f"{function}.in.npz", *arrays)
    arguments = [f"{function}:{size}" for function, size in sizes.items()]
    subprocess.run([sys.executable, "-c", CALLER, *arguments], cwd=folder, check=True, timeout=300)
    results = {name: list(np.load(folder / f"{name}.out.npz").values()) for name in inputs}
    return {name: (inputs[name], results[name]) for name in inputs}


@pytest.mark.parametrize("function", export.FUNCTIONS)
def test_a_process_without_moss_tok_gives_the_same(called, function, nano_tiny):
    """For codes as well that are out of range, which it clamps."""
    inputs, results = called[function]
    for given, found in zip(inputs, results, strict=True):
        if function.startswith("encode"):
            np.testing.assert_array_equal(found, moss_tok.encode(nano_tiny, given).codes)
            continue
        expected = np.asarray(moss_tok.decode(nano_tiny, given.clip(0)).wav)
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_files_have_the_mode_of_new_ones(tmp_path):
    (tmp_path / "new").touch()
    params = {"a": np.zeros(3, np.float32)}
    export.write(tmp_path, "decode", b"program", params, {})
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_num_quantizers(v1_tiny):
    _, params, signature = export.export(v1_tiny, "encode", num_quantizers=2)
    assert signature["results"][0]["shape"][:2] == ["B", 2]
    assert signature["arguments"][0] == "params"
    assert not any(name.startswith("decoder") for name in params)
    json.dumps(signature)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--function", "both"], "function must be one of encode, decode"),
        (["--function", "encode", "--weights", "no"], "weights must be one of beside, inside"),
        (["--function", "encode_step", "--chunk-frames", "0"], "chunk_frames must be 1..4096"),
        (["--function", "encode", "--num-quantizers", "9"], "num_quantizers must be 1..8"),
    ],
)
def test_errors(tmp_path, capsys, options, message):
    capsys.readouterr()
    assert main(["export", str(GOLDEN / "v1_tiny"), str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_weights_that_are_too_large(v1_tiny, monkeypatch):
    monkeypatch.setattr(export, "LARGEST_INSIDE_BYTES", 1000)
    with pytest.raises(ValueError, match="do not fit inside a program"):
        export.export(v1_tiny, "decode", weights="inside")


def test_without_flatbuffers(v1_tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(ValueError, match=r"pip install 'moss_tok\[export\]'"):
        export.export(v1_tiny, "decode")
