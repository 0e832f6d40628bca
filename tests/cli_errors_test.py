"""One line for every error that a user of the command line can make, and nothing written."""

import io
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import GOLDEN, train_py

from moss_tok.cli import info
from moss_tok.cli.main import main

CODEC = str(GOLDEN / "v1_tiny")


def npz(**changes):
    """Writes codes.npz with some fields changed; None drops one."""
    with np.load("in.npz") as file:
        fields = {k: file[k] for k in file} | changes
    np.savez("codes.npz", **{k: v for k, v in fields.items() if v is not None})


def huge_header():
    """An npz whose array claims a terabyte."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<i2", "fortran_order": False, "shape": (8, 2**36)}
    )
    with np.load("in.npz") as file:
        arrays = {k: file[k] for k in file if k != "codes"}
    np.savez("codes.npz", **arrays)
    with zipfile.ZipFile("codes.npz", "a") as archive:
        archive.writestr("codes.npy", header.getvalue())


def odd_member(content):
    """An npz whose codes.npy is no array."""
    with np.load("in.npz") as file:
        np.savez("codes.npz", **{k: file[k] for k in file if k != "codes"})
    with zipfile.ZipFile("codes.npz", "a") as archive:
        archive.writestr("codes.npy", content)


def pickled(name):
    with open(name, "wb") as file:
        np.save(file, np.array([{"a": 1}], object), allow_pickle=True)


def single_array(name):
    with open(name, "wb") as file:
        np.save(file, CODES)


def corrupt_zip():
    data = bytearray(Path("in.npz").read_bytes())
    at = data.index(b"codes.npy") + 200
    data[at : at + 50] = bytes(50)
    Path("codes.npz").write_bytes(data)


CODES = np.zeros((8, 16), np.int16)
BAD_CODES = [
    (lambda: npz(codes=CODES + 64), "codes must be 0..63, got 64..64"),
    (lambda: npz(codes=CODES - 1), "codes must be 0..63, got -1..-1"),
    (lambda: npz(codes=CODES[0]), "codes must be integers [Q, T], got int16 [16]"),
    (lambda: npz(codes=CODES.astype(float)), "codes must be integers [Q, T], got float64"),
    (lambda: npz(codes=CODES > 0), "codes must be integers"),
    (lambda: npz(codes=np.zeros((9, 16), int)), "codes must have 1..8 quantizers, got 9"),
    (lambda: npz(codes=CODES[:0]), "codes are empty"),
    (lambda: npz(codes=CODES[:, :0]), "codes are empty"),
    (lambda: npz(codes=CODES[:, :7]), "num_samples 30000 does not match 7 frames"),
    (lambda: npz(num_samples=0), "num_samples 0 does not match"),
    (lambda: npz(num_samples=-5), "num_samples -5 does not match"),
    (lambda: npz(num_samples=1.5), "num_samples must be one integer"),
    (lambda: npz(sample_rate=48000), "sample_rate must be 24000 for this checkpoint, got 48000"),
    (lambda: npz(num_channels=2), "num_channels must be 1"),
    (lambda: npz(codebook_size=1024), "codebook_size must be 64"),
    (lambda: npz(hop_length=960), "hop_length must be 1920"),
    (lambda: npz(hop_length=np.array([1920])), "hop_length must be one integer"),
    (lambda: npz(codes=None), "missing key 'codes'"),
    (lambda: npz(num_samples=None), "missing key 'num_samples'"),
    (lambda: npz(codes=np.array([{"a": 1}], object)), "not a .npz file of codes"),
    (lambda: pickled("codes.npz"), "not a .npz file of codes"),
    (lambda: single_array("codes.npz"), "not a .npz file of codes (it holds a single array)"),
    (lambda: Path("codes.npz").write_text("hello"), "not a .npz file of codes"),
    (lambda: Path("codes.npz").touch(), "not a .npz file of codes"),
    (lambda: shutil.copy("in.wav", "codes.npz"), "not a .npz file of codes"),
    (corrupt_zip, "not a .npz file of codes"),
    (huge_header, "not a .npz file of codes"),
    (lambda: odd_member(b""), "not a .npz file of codes"),
    (lambda: odd_member(b"junk" * 10), "not a .npz file of codes"),
    (
        lambda: odd_member(b"\x93NUMPY\x01\x00\x10\x00{'shape': (8,     "),
        "not a .npz file of codes",
    ),
    (lambda: npz(num_samples=np.timedelta64(5, "s")), "num_samples must be one integer"),
    (lambda: None, "codes.npz: no such file"),
]


def run_bad(argv, folder, capsys, message):
    """Runs a command that must fail: one line, exit code 2, no file written."""
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    try:
        code = main(argv)
    except SystemExit as exit_:
        code = exit_.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert message in err
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(("write", "message"), BAD_CODES)
@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_bad_codes(coded_folder, capsys, write, message):
    write()
    argv = ["decode", "codes.npz", "out.wav", "--checkpoint", CODEC]
    run_bad(argv, coded_folder, capsys, message)


def bad_checkpoint(kind):
    shutil.rmtree("bad", ignore_errors=True)
    if kind == "ours":
        assert main(["convert", CODEC, "bad"]) == 0
    else:
        shutil.copytree(CODEC, "bad")


def edit(change, kind="official"):
    bad_checkpoint(kind)
    change()


def remove(path):
    shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


def cut_largest(folder):
    files = [p for p in Path(folder).rglob("*") if p.is_file()]
    file = max(files, key=lambda p: p.stat().st_size)
    file.write_bytes(file.read_bytes()[:1000])


BAD_CHECKPOINTS = [
    (lambda: None, "bad: no such checkpoint directory"),
    (lambda: Path("bad").touch(), "bad: not a checkpoint directory"),
    (lambda: Path("bad").mkdir(), "bad: no config.json, so it is not a checkpoint"),
    (
        lambda: edit(lambda: remove("bad/config.json")),
        "bad: no config.json, so it is not a checkpoint",
    ),
    (lambda: edit(lambda: Path("bad/config.json").write_text("{")), "broken JSON"),
    (lambda: edit(lambda: Path("bad/config.json").write_bytes(b"\xff\xfe")), "config.json"),
    (lambda: edit(lambda: Path("bad/model.safetensors").write_text("x")), "corrupt safetensors"),
    (
        lambda: edit(lambda: remove("bad/config.json"), "ours"),
        "bad: no config.json, so it is not a checkpoint",
    ),
    (lambda: edit(lambda: Path("bad/config.json").write_text("[]"), "ours"), "bad/config.json"),
    (lambda: edit(lambda: Path("bad/config.json").write_bytes(b"\xff"), "ours"), "config.json"),
    (lambda: edit(lambda: remove("bad/params"), "ours"), "neither params/ nor model.safetensors"),
    (lambda: edit(lambda: remove("bad/params/d"), "ours"), "broken checkpoint"),
    (lambda: edit(lambda: remove("bad/params/_METADATA"), "ours"), "params/_METADATA is missing"),
    (lambda: edit(lambda: cut_largest("bad/params"), "ours"), "broken checkpoint: params/"),
]


@pytest.mark.parametrize(("write", "message"), BAD_CHECKPOINTS)
@pytest.mark.parametrize("command", ["encode", "decode", "reconstruct", "convert", "info"])
def test_bad_checkpoints(coded_folder, capsys, write, message, command):
    if command == "info" and ("broken ch" in message or "params/_M" in message):
        pytest.skip("info reads no weights")
    write()
    argv = {
        "encode": ["encode", "in.wav", "out.npz", "--checkpoint", "bad"],
        "decode": ["decode", "in.npz", "out.wav", "--checkpoint", "bad"],
        "reconstruct": ["reconstruct", "in.wav", "out.wav", "--checkpoint", "bad"],
        "convert": ["convert", "bad", "out"],
        "info": ["info", "bad"],
    }[command]
    run_bad(argv, coded_folder, capsys, message)


ENCODE = ["encode", "in.wav", "out.npz", "--checkpoint", CODEC]
DECODE = ["decode", "in.npz", "out.wav", "--checkpoint", CODEC]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required"),
        (["frob"], "unknown command 'frob'; accepted: encode"),
        (["--frob"], "required"),
        ([*ENCODE, "--frob"], "unrecognized arguments: --frob"),
        (["encode"], "required"),
        (["encode", "gone.wav", *ENCODE[2:]], "gone.wav: no such file"),
        (["encode", "in.npz", *ENCODE[2:]], "in.npz: not audio"),
        (["encode", "in.wav", "no/out.npz", *ENCODE[3:]], "no such folder: no"),
        (["encode", "in.wav", "out.txt", *ENCODE[3:]], "the name must end in .npz"),
        ([*ENCODE, "--num-quantizers", "0"], "num_quantizers must be 1..8, got 0"),
        ([*ENCODE, "--num-quantizers", "-1"], "num_quantizers must be 1..8, got -1"),
        ([*ENCODE, "--num-quantizers", "9"], "num_quantizers must be 1..8, got 9"),
        ([*ENCODE, "--num-quantizers", "two"], "invalid int value: 'two'"),
        ([*ENCODE, "--num-quantizers", "1.5"], "invalid int value: '1.5'"),
        ([*DECODE, "--num-quantizers", "9"], "num_quantizers must be 1..8, got 9"),
        (["decode", "in.npz", "no/out.wav", *DECODE[3:]], "no such folder: no"),
        (["decode", "in.npz", "out.xyz", *DECODE[3:]], "the name must end in .wav"),
        (["reconstruct", "in.wav", "no/out.wav", *DECODE[3:]], "no such folder: no"),
        (["convert", CODEC, "no/out"], "no such folder"),
        (["convert", CODEC, "."], "exists already"),
        (["convert", CODEC, "out", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["info", "frob"], "frob: no such checkpoint directory"),
        (["info", "~nouser"], "~nouser: no such checkpoint directory"),
        ([*ENCODE, "--a\nb"], "unrecognized arguments: --a b"),
    ],
)
def test_bad_arguments(coded_folder, capsys, argv, message):
    run_bad(argv, coded_folder, capsys, message)


def test_more_quantizers_than_the_file_has(coded_folder, capsys):
    main(["encode", "in.wav", "few.npz", "--checkpoint", CODEC, "--num-quantizers", "2"])
    argv = ["decode", "few.npz", "out.wav", "--checkpoint", CODEC, "--num-quantizers", "3"]
    run_bad(argv, coded_folder, capsys, "num_quantizers must be 1..2 for this file, got 3")


def test_what_is_not_here(coded_folder, capsys):
    """Addresses, which a path would change; and packages of an extra."""
    for command in ("encode", "decode", "reconstruct"):
        assert main([command, "gs://b/in.wav", "out.wav", "--checkpoint", CODEC]) == 2
        assert capsys.readouterr().err == "error: gs://b/in.wav: must be on this machine\n"
    argv = ["tokenize", ".", "--checkpoint", CODEC, "--output", "codes"]
    code = "import sys; sys.modules['grain'] = None; from moss_tok.cli import main; "
    code += f"sys.exit(main.main({argv!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: grain is not installed: pip install 'moss_tok[train]'\n"


def test_too_little_memory_is_one_line(monkeypatch, capsys):
    def full(args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.\nAllocations:\n")

    monkeypatch.setattr(info, "run", full)
    assert main(["info", "tiny"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: RESOURCE_EXHAUSTED") and error.count("\n") == 1

    def broken(args):
        raise RuntimeError("something else")

    monkeypatch.setattr(info, "run", broken)
    with pytest.raises(RuntimeError, match="something else"):
        main(["info", "tiny"])


def test_too_little_memory_for_a_run_is_one_line(capsys):
    def full():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.\nAllocations:\n")

    assert train_py(main=full) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: RESOURCE_EXHAUSTED") and error.count("\n") == 1
    assert "batch_size" in error
