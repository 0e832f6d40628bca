"""`moss-tok stream`: pipes and files, in whole frames."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from helpers import GOLDEN

import moss_tok
from moss_tok.cli.main import main

CODEC = str(GOLDEN / "v1_tiny")


def live(monkeypatch, capfdbinary, data: bytes, *options: str) -> tuple[int, bytes, bytes]:
    """Exit code, standard output and standard error of `moss-tok stream` fed with `data`."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    code = main(["stream", "--checkpoint", CODEC, *options])
    sys.stdout.flush()
    return code, *capfdbinary.readouterr()


@pytest.mark.parametrize("pcm", ["s16", "f32"])
def test_stream_there_and_back(coded_folder, monkeypatch, capfdbinary, pcm):
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


def test_a_pipe_of_two_processes(coded_folder):
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


def test_stream_a_file(coded_folder, capsys):
    options = ["--chunk-ms", "400", "--output", "out.wav"]
    assert main(["stream", "--checkpoint", CODEC, "--input", "in.wav", *options]) == 0
    assert soundfile.info("out.wav").frames == 30000
    printed = capsys.readouterr().out.splitlines()
    assert sum("encode" in line for line in printed) == 4
    assert "4 chunks of 400 ms: median" in printed[-1]


def test_a_file_is_kept_though_nobody_listens(coded_folder, monkeypatch):
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
        (b"", ["--input", "in.wav", "--pcm", "f32"], "--pcm is for standard input and output"),
        (b"", ["--input", "in.wav", "--output", ""], "output must be a file, got ''"),
        (b"", ["--input", ""], "input must be a file, got ''"),
    ],
)
def test_bad_streams(coded_folder, monkeypatch, capfdbinary, data, options, message):
    capfdbinary.readouterr()
    code, _, error = live(monkeypatch, capfdbinary, data, *options)
    assert code == 2
    assert error.startswith(b"error: ")
    assert error.count(b"\n") == 1
    assert message in error.decode()


def test_closed_standard_input(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", None)
    assert main(["stream", "--checkpoint", "none"]) == 2
    assert capsys.readouterr().err == "error: standard input is closed\n"


@pytest.mark.parametrize("argv", [["stream"], ["speak", "hello", "-", "--checkpoint", "gone"]])
def test_closed_standard_output(monkeypatch, capsys, argv):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    monkeypatch.setattr(sys, "stdout", None)
    assert main(argv) == 2
    assert capsys.readouterr().err == "error: standard output is closed\n"
