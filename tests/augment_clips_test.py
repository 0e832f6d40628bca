"""experiments/augment_clips.py: augmented copies of the training recordings of a manifest."""

import json
from pathlib import Path

import augment_clips
import numpy as np
import pytest
import soundfile

RATE = 8000


@pytest.fixture
def manifest(tmp_path):
    """Two recordings for training, one of them silent, and one for testing."""
    rows = []
    for name, split, level in (("a", "train", 0.1), ("b", "train", 0.0), ("c", "test", 0.1)):
        noise = np.random.default_rng(0).standard_normal(RATE // 2)
        soundfile.write(tmp_path / f"{name}.wav", level * noise, RATE)
        rows.append({"path": f"{name}.wav", "split": split, "transcript": name, "speaker": "s"})
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def copies_of(manifest, name, *options):
    """The rows of the new manifest by transcript, and the audio of the copies of "a"."""
    folder = manifest.parent / name
    augment_clips.main(
        [str(manifest), str(folder), "--copies=2", f"--sample_rate={RATE}", *options]
    )
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    found = {text: [row for row in rows if row["transcript"] == text] for text in "abc"}
    return found, [soundfile.read(row["path"])[0] for row in found["a"][1:]]


def test_copies_have_their_text_and_differ(manifest):
    rows, wavs = copies_of(manifest, "out", "--tempo=0.3", "--augment_speed=0.2",
                           "--augment_noise_db=10:20", "--augment_gain_db=3")  # fmt: skip
    assert [len(rows[text]) for text in "abc"] == [3, 3, 1]
    assert all(row["speaker"] == "s" and Path(row["path"]).is_file() for row in rows["a"])
    assert {row["split"] for row in rows["a"] + rows["b"]} == {"train"}
    assert len({len(wav) for wav in wavs} | {RATE // 2}) == 3
    for row, wav in zip(rows["a"][1:], wavs, strict=True):
        assert row["duration_s"] == len(wav) / RATE
        assert 0.5 * np.exp(-0.3) / 1.25 < row["duration_s"] < 0.5 * np.exp(0.3) / 0.75
    assert not soundfile.read(rows["b"][1]["path"])[0].any()


def test_tempo_keeps_the_pitch_and_the_seed_decides(manifest):
    seconds = np.arange(RATE) / RATE
    soundfile.write(manifest.parent / "a.wav", 0.5 * np.sin(2 * np.pi * 440 * seconds), RATE)
    _, wavs = copies_of(manifest, "out", "--tempo=0.3")
    for wav in wavs:
        spectrum = np.abs(np.fft.rfft(wav * np.hanning(len(wav))))
        assert abs(spectrum.argmax() * RATE / len(wav) - 440) < 3
        assert len(wav) != RATE
    _, same = copies_of(manifest, "same", "--tempo=0.3")
    _, other = copies_of(manifest, "other", "--tempo=0.3", "--seed=1")
    assert all(np.array_equal(a, b) for a, b in zip(wavs, same, strict=True))
    assert len(other[0]) != len(wavs[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--augment_speed=0.9"], "error: augment_speed must be"),
        (["--augment_noise_db=x"], "error: augment_noise_db must be"),
    ],
)
def test_errors_are_one_line(manifest, capsys, options, message):
    argv = [str(manifest), str(manifest.parent / "out"), *options]
    assert augment_clips.main(argv) == 2
    assert capsys.readouterr().err.startswith(message)
    assert not (manifest.parent / "out").exists()
