"""The command line, run in this process: what it writes, and one line for every user error."""

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile
from helpers import GOLDEN

import moss_tok
from moss_tok import checkpoint
from moss_tok.cli import info
from moss_tok.cli.main import COMMANDS, build_parser, main
from moss_tok.codec import inference

CODEC = str(GOLDEN / "v1_tiny")


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """A folder with a recording `in.wav` and its codes `in.npz`."""
    folder = tmp_path_factory.mktemp("encoded")
    wav = 0.1 * np.random.default_rng(0).standard_normal(30000)
    soundfile.write(folder / "in.wav", wav, 24000)
    paths = [str(folder / name) for name in ("in.wav", "in.npz")]
    assert main(["encode", *paths, "--checkpoint", CODEC]) == 0
    return folder


@pytest.fixture
def folder(encoded, tmp_path, monkeypatch):
    """A working directory with a recording `in.wav` and its codes `in.npz`."""
    shutil.copytree(encoded, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_encode_writes_what_decode_needs(folder):
    with np.load("in.npz", allow_pickle=False) as file:
        fields = {k: file[k] for k in file}
    assert fields.pop("codes").shape == (8, 16)
    assert len(str(fields.pop("quantizer"))) == 16
    numbers = {k: int(v) for k, v in fields.items()}
    assert numbers == {"sample_rate": 24000, "num_samples": 30000, "num_channels": 1,
                       "hop_length": 1920, "codebook_size": 64}  # fmt: skip


@pytest.mark.parametrize("options", [[], ["--num-quantizers", "3"]])
def test_decode_is_exactly_as_long(folder, options, v1_tiny):
    assert main(["decode", "in.npz", "out.wav", "--checkpoint", CODEC, *options]) == 0
    wav, rate = soundfile.read("out.wav", always_2d=True)
    assert (wav.shape, rate) == ((30000, 1), 24000)
    codes = np.load("in.npz")["codes"][: int(options[1]) if options else 8]
    expected = moss_tok.decode(v1_tiny, codes[None]).wav[0, 0, :30000]
    np.testing.assert_allclose(wav[:, 0], np.clip(expected, -1, 1), atol=1e-4)


def test_encode_num_quantizers(folder):
    main(["encode", "in.wav", "few.npz", "--checkpoint", CODEC, "--num-quantizers", "2"])
    np.testing.assert_array_equal(np.load("few.npz")["codes"], np.load("in.npz")["codes"][:2])
    assert main(["decode", "few.npz", "few.wav", "--checkpoint", CODEC]) == 0


@pytest.mark.parametrize("output", ["out.wav", "out.flac", "out.ogg"])
def test_reconstruct(folder, capsys, output):
    assert main(["reconstruct", "in.wav", output, "--checkpoint", CODEC]) == 0
    assert soundfile.info(output).frames == 30000
    assert "600 bit/s (8 quantizers), mel distance" in capsys.readouterr().out


def test_stereo_48k_of_a_mono_file(folder):
    nano = str(GOLDEN / "nano_tiny")
    assert main(["reconstruct", "in.wav", "out.wav", "--checkpoint", nano]) == 0
    info = soundfile.info("out.wav")
    assert (info.channels, info.samplerate, info.frames) == (2, 48000, 60000)


def test_convert_and_info(folder, capsys):
    assert main(["convert", CODEC, "ours"]) == 0
    assert main(["convert", "ours", "official"]) == 0
    capsys.readouterr()
    outputs = []
    for name in (CODEC, "ours", "official"):
        assert main(["info", name]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] == outputs[2]
    assert "75 to 600 bit/s" in outputs[0] and "window 100 frames (1 s)" in outputs[0]


@pytest.mark.parametrize(("preset", "count"), [("v1", "1,774,566,400"), ("nano", "21,969,664")])
def test_info_of_presets(capsys, preset, count):
    assert main(["info", preset]) == 0
    assert count in capsys.readouterr().out
    assert main(["info", "--checkpoint", preset]) == 0
    assert count in capsys.readouterr().out


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
def test_bad_codes(folder, capsys, write, message):
    write()
    run_bad(["decode", "codes.npz", "out.wav", "--checkpoint", CODEC], folder, capsys, message)


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
def test_bad_checkpoints(folder, capsys, write, message, command):
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
    run_bad(argv, folder, capsys, message)


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
        (["info", "v1", "--checkpoint", "v2"], "give one checkpoint, got v1 and --checkpoint=v2"),
        ([*ENCODE, "--a\nb"], "unrecognized arguments: --a b"),
    ],
)
def test_bad_arguments(folder, capsys, argv, message):
    run_bad(argv, folder, capsys, message)


def test_more_quantizers_than_the_file_has(folder, capsys):
    main(["encode", "in.wav", "few.npz", "--checkpoint", CODEC, "--num-quantizers", "2"])
    argv = ["decode", "few.npz", "out.wav", "--checkpoint", CODEC, "--num-quantizers", "3"]
    run_bad(argv, folder, capsys, "num_quantizers must be 1..2 for this file, got 3")


def test_help_lists_every_command():
    argv = [sys.executable, "-m", "moss_tok", "--help"]
    out = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert all(f"  {name}" in out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_an_example(capsys, name):
    """Which the command accepts."""
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    example = capsys.readouterr().out.splitlines()[-1]
    program, command, *argv = shlex.split(example)
    assert (program, command) == ("moss-tok", name)
    build_parser(name).parse_args(argv)


def test_a_training_workdir_is_a_checkpoint(folder, micro):
    from moss_tok.codec import pretrained

    steps = folder / "run" / "checkpoints"
    steps.mkdir(parents=True)
    for step in (3, 20):
        pretrained.save(steps / checkpoint.step_name(step), micro.config, micro.params)
    (steps / "00000030.orbax-checkpoint-tmp").mkdir()
    assert checkpoint.find_checkpoint(folder / "run").name == "00000020"
    assert main(["info", "run"]) == 0
    assert json.loads((steps / "00000020" / "config.json").read_text())["format"] == "moss_tok"


def test_long_files_go_in_blocks(folder, monkeypatch, capsys):
    """With the codes of the whole; the last block is cut."""
    assert main(["reconstruct", "in.wav", "at_once.wav", "--checkpoint", CODEC]) == 0
    monkeypatch.setattr(inference, "WHOLE_SECONDS", 0.4)
    monkeypatch.setattr(inference, "CHUNK_SECONDS", 0.4)
    assert main(["reconstruct", "in.wav", "blocks.wav", "--checkpoint", CODEC]) == 0
    said = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert float(said[1]) == pytest.approx(float(said[0]), rel=0.05)  # frames at the seams
    assert main(["encode", "in.wav", "long.npz", "--checkpoint", CODEC]) == 0
    np.testing.assert_array_equal(np.load("long.npz")["codes"], np.load("in.npz")["codes"])
    assert main(["decode", "long.npz", "long.wav", "--checkpoint", CODEC]) == 0
    monkeypatch.undo()
    os.chdir(folder)
    assert main(["decode", "in.npz", "whole.wav", "--checkpoint", CODEC]) == 0
    wavs = [soundfile.read(f"{name}.wav")[0] for name in ("long", "whole")]
    wavs += [soundfile.read(f"{name}.wav")[0] for name in ("blocks", "at_once")]
    assert all(wav.shape == (30000,) for wav in wavs)
    for wav in wavs[1:]:
        np.testing.assert_allclose(wav, wavs[0], atol=1e-4)


def test_folders(folder, capsys):
    """Files keep their places; a bad one is listed, and the others are done."""
    Path("audio/sub").mkdir(parents=True)
    shutil.copy("in.wav", "audio/a.wav")
    soundfile.write("audio/sub/b.flac", np.full(9000, 0.1), 16000)
    Path("audio/bad.ogg").write_bytes(b"nothing")
    assert main(["encode", "audio", "codes", "--checkpoint", CODEC]) == 1
    captured = capsys.readouterr()
    assert "codes: 2 of 3 files" in captured.out
    assert "failed: audio/bad.ogg: not audio" in captured.err
    np.testing.assert_array_equal(np.load("codes/a.npz")["codes"], np.load("in.npz")["codes"])
    assert main(["decode", "codes", "back", "--checkpoint", CODEC]) == 0
    assert soundfile.info("back/a.wav").frames == 30000
    assert soundfile.info("back/sub/b.wav").frames == 13500
    Path("audio/bad.ogg").unlink()
    assert main(["reconstruct", "audio", "again", "--checkpoint", CODEC]) == 0
    wavs = [soundfile.read(f"{name}/a.wav")[0] for name in ("again", "back")]
    np.testing.assert_allclose(*wavs, atol=1e-4)
    shutil.copy("in.wav", "audio/sub/b.wav")
    capsys.readouterr()
    assert main(["encode", "audio", "more", "--checkpoint", CODEC]) == 2
    assert "would both become more/sub/b.npz" in capsys.readouterr().err
    for argv in (["audio", "audio"], ["audio", "audio/sub/new"], ["in.wav", "in.wav"]):
        before = sorted(Path().rglob("*"))
        assert main(["reconstruct", *argv, "--checkpoint", CODEC]) == 2
        assert "the output must not be the input" in capsys.readouterr().err
        assert sorted(Path().rglob("*")) == before
    assert main(["encode", "back", "back", "--checkpoint", CODEC]) == 0  # codes beside audio
    assert Path("back/sub/b.npz").exists()
    Path("empty").mkdir()
    assert main(["encode", "empty", "more", "--checkpoint", CODEC]) == 2
    assert "empty: no files (.wav, .flac" in capsys.readouterr().err


def live(monkeypatch, capfdbinary, data: bytes, *options: str) -> tuple[int, bytes, bytes]:
    """Exit code, standard output and standard error of `moss-tok stream` fed with `data`."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    code = main(["stream", "--checkpoint", CODEC, *options])
    sys.stdout.flush()
    return code, *capfdbinary.readouterr()


@pytest.mark.parametrize("pcm", ["s16", "f32"])
def test_stream_there_and_back(folder, monkeypatch, capfdbinary, pcm):
    """The codes of `encode`, the audio of `decode`, in whole frames."""
    main(["decode", "in.npz", "whole.wav", "--checkpoint", CODEC])
    whole, _ = soundfile.read("whole.wav", dtype="float32")
    capfdbinary.readouterr()
    wav, _ = soundfile.read("in.wav", dtype="int16")
    data = wav.tobytes() if pcm == "s16" else (wav / np.float32(32768)).tobytes()
    options = ("--pcm", pcm, "--chunk-ms", "300")
    code, text, _ = live(monkeypatch, capfdbinary, data, *options)
    lines = [json.loads(line) for line in text.splitlines()]
    assert code == 0
    assert lines[0]["num_quantizers"] == 8
    assert [len(line["codes"][0]) for line in lines[1:]] == [4, 4, 4, 3, 1]
    codes = np.concatenate([line["codes"] for line in lines[1:]], axis=1)
    np.testing.assert_array_equal(codes, np.load("in.npz")["codes"])
    code, back, _ = live(monkeypatch, capfdbinary, text, "--decode", *options)
    assert code == 0
    scale = 32768 if pcm == "s16" else 1
    wav_hat = np.frombuffer(back, "<i2" if pcm == "s16" else "<f4") / scale
    assert wav_hat.size == 16 * 1920
    np.testing.assert_allclose(np.clip(wav_hat[:30000], -1, 1), whole, atol=1e-4)
    code, some, _ = live(monkeypatch, capfdbinary, text, "--decode", "--num-quantizers", "2")
    assert code == 0
    assert len(some) == 16 * 1920 * 2


def test_a_pipe_of_two_processes(folder):
    """Codes come out while audio still goes in; nothing is lost at the end.

    Nor where reading does not wait, as another program that has the pipe may have set it.
    """
    wav, _ = soundfile.read("in.wav", dtype="int16")
    stream = [sys.executable, "-m", "moss_tok", "stream", "--checkpoint", CODEC]
    source, sink = os.pipe()
    os.set_blocking(source, False)
    coder = subprocess.Popen(stream, stdin=source, stdout=subprocess.PIPE)
    os.close(source)
    player = subprocess.Popen([*stream, "--decode"], stdin=coder.stdout, stdout=subprocess.PIPE)
    coder.stdout.close()
    with open(sink, "wb") as microphone:
        microphone.write(wav[:1920].tobytes())  # a frame
        microphone.flush()
        first = player.stdout.read(2 * 1920)  # comes before the next is there
        microphone.write(wav[1920:].tobytes())
    rest, _ = player.communicate()
    assert (coder.wait(), player.returncode) == (0, 0)
    found = np.frombuffer(first + rest, "<i2") / 32768
    codec = moss_tok.load(CODEC)
    codes = moss_tok.encode(codec, wav[None, None].astype(np.float32) / 32768).codes
    expected = np.clip(moss_tok.decode(codec, codes).wav[0, 0], -1, 1)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_stream_a_file(folder, capsys):
    options = ["--chunk-ms", "400", "--output", "out.wav"]
    assert main(["stream", "--checkpoint", CODEC, "--input", "in.wav", *options]) == 0
    assert soundfile.info("out.wav").frames == 30000
    printed = capsys.readouterr().out.splitlines()
    assert sum("encode" in line for line in printed) == 4
    assert "4 chunks of 400 ms: median" in printed[-1]


def test_a_file_is_kept_though_nobody_listens(folder, monkeypatch):
    """As with `| head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        options = ["--checkpoint", CODEC, "--input", "in.wav", "--chunk-ms", "400"]
        assert main(["stream", *options, "--output", "out.wav"]) == 0
    assert soundfile.info("out.wav").frames == 30000


HEADER = b'{"sample_rate": 24000, "num_channels": 1, "hop_length": 1920, "codebook_size": 64, '
HEADER += b'"num_quantizers": 2}\n'


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (b"abc", [], "ended within a sample of 2 bytes"),
        (b"abc\n", ["--decode"], "line 1: broken JSON"),
        (b"", ["--decode"], "standard input is empty"),
        (b'{"codes": [[1]]}\n', ["--decode"], "line 1: sample_rate must be 24000"),
        (HEADER.replace(b"1920", b"3840"), ["--decode"], "line 1: hop_length must be 1920"),
        (HEADER + b'{"codes": [[1]]}\n', ["--decode"], 'line 2: expected "codes": 2 lists'),
        (HEADER + b'{"codes": [[1], [64]]}\n', ["--decode"], "line 2: slot 0: codes must be 0"),
        (HEADER + b'{"codes": [[1], [1, 2]]}\n', ["--decode"], "line 2: expected"),
        (HEADER + b"{}\n", ["--decode"], "line 2: expected"),
        (b"", ["--chunk-ms", "0"], "chunk-ms must be above 0"),
        (b"", ["--output", "a.wav"], "--output needs --input"),
        (b"", ["--input", "no.wav"], "no.wav: no such file"),
        (
            b"",
            ["--input", "in.wav", "--output", "./in.wav"],
            "in.wav: the output must not be",
        ),
        (b"", ["--input", "in.wav", "--decode"], "--input encodes and decodes"),
    ],
)
def test_bad_streams(folder, monkeypatch, capfdbinary, data, options, message):
    capfdbinary.readouterr()
    code, _, error = live(monkeypatch, capfdbinary, data, *options)
    assert code == 2
    assert error.startswith(b"error: ")
    assert error.count(b"\n") == 1
    assert message in error.decode()


def test_what_is_not_here(folder, capsys):
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


def test_too_little_memory_for_a_run_is_one_line():
    script = """
import jax
from moss_tok.objectives import flags

def main():
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.\\nAllocations:\\n")

flags.define()
flags.run(main)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: RESOURCE_EXHAUSTED") and done.stderr.count("\n") == 1
    assert "batch_size" in done.stderr
