"""Other codecs beside ours: their tools, stood in for by copies, and folders."""

import json
import os

import numpy as np
import pytest
import soundfile
from helpers import GOLDEN

from moss_tok.cli.main import main
from moss_tok.evaluation import baselines


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Programs called as the codecs' tools that copy their second last argument to the last."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("opusenc", "opusdec", "c2enc", "c2dec"):
        script = f'#!/bin/sh\necho "$@" >> {tmp_path}/{name}.log\n'
        script += 'for x; do a="$b"; b="$x"; done; cp "$a" "$b"\n'
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return tmp_path


def test_tools(tools, rng):
    wav = 0.1 * np.sin(np.arange(24000) / 20).astype(np.float32)[None]
    opus, codec2 = baselines.parse("opus:6,codec2:3200")
    assert (opus.name, opus.bps) == ("opus/6kbps", 6000)
    assert (codec2.name, codec2.bps) == ("codec2/3200bps", 3200)
    np.testing.assert_allclose(opus.code(tools, wav, 24000), wav, atol=1e-4)
    # The copy has no delay, so the output is 16 ms early: 384 samples.
    early = codec2.code(tools, wav.repeat(2, 0), 24000)
    assert early.shape == (2, 24000)
    np.testing.assert_allclose(early[0, 500:-900], wav[0, 884:-516], atol=1e-3)
    assert "--bitrate 6 " in (tools / "opusenc.log").read_text()
    assert "--rate 24000 " in (tools / "opusdec.log").read_text()
    assert (tools / "c2enc.log").read_text().startswith("3200 ")


def test_in_an_evaluation(tools, monkeypatch, rng, capsys):
    """Baselines get results, curves and players like our codec."""
    monkeypatch.chdir(tools)
    os.mkdir("others")
    soundfile.write("a.wav", 0.1 * rng.standard_normal(9000), 24000)
    soundfile.write("others/a.flac", 0.1 * rng.standard_normal(8000), 24000)
    (tools / "set.jsonl").write_text('{"path": "a.wav"}\n')
    options = ["--checkpoint", str(GOLDEN / "v1_tiny"), "--dataset", "set.jsonl", "--output", "out",
               "--num-quantizers", "8", "--metrics", "mel_loss", "--num-workers", "1",
               "--baselines", "opus:6,theirs=others,theirs:1.5=others"]  # fmt: skip
    assert main(["evaluate", *options]) == 0
    results = json.loads((tools / "out" / "opus" / "6kbps" / "results.json").read_text())
    assert results["_meta"]["bps"] == 6000
    assert results["set"]["mel_loss"] < 0.1  # a copy
    results = json.loads((tools / "out" / "theirs" / "results.json").read_text())
    assert results["set"]["mel_loss"] > 0.1
    rated = json.loads((tools / "out" / "theirs" / "1.5kbps" / "results.json").read_text())
    assert rated["_meta"]["bps"] == 1500 and rated["set"]["mel_loss"] == results["set"]["mel_loss"]
    text = (tools / "out" / "report.html").read_text()
    for part in ("opus/6kbps", "theirs", "theirs/1.5kbps", "v1_tiny/rvq8"):
        assert f"<b>{part}</b>" in text
    # The same folder with other audio is another codec.
    soundfile.write("others/a.flac", 0.2 * rng.standard_normal(8000), 24000)
    assert main(["evaluate", *options]) == 2
    assert "theirs/set: holds results of another codec or data set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mp3:64", "baselines must be opus:KBPS"),
        ("opus", "baselines must be opus:KBPS"),
        ("theirs:x=.", "theirs:x=.: KBPS must be a number of kbit/s"),
        ("theirs:0=.", "KBPS must be a number"),
        ("opus:3", "opus takes 6..256 kbit/s"),
        ("codec2:3000", "codec2 takes 3200, 2400"),
        ("theirs=no", "needs a name and a folder that exists"),
    ],
)
def test_errors(tools, text, message):
    with pytest.raises(ValueError, match=message):
        baselines.parse(text)


def test_what_goes_wrong(tools, monkeypatch):
    wav = np.zeros((1, 100), np.float32)
    (baseline,) = baselines.parse(f"theirs={tools}")
    with pytest.raises(ValueError, match="no reconstruction called b"):
        baseline.code(tools / "b.wav", wav, 24000)
    (tools / "bin" / "opusenc").write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    (baseline,) = baselines.parse("opus:6")
    with pytest.raises(ValueError, match="opusenc failed: broken"):
        baseline.code(tools / "b.wav", wav, 24000)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="opusenc is not installed"):
        baselines.parse("opus:6")
