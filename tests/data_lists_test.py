"""The lists of recordings that experiments/data.py makes for training."""

import json

import data
import numpy as np
import pytest
import soundfile
import unseen
from helpers import write_wav


def write(path, rows):
    """A manifest of lines (path, split)."""
    lines = []
    for name, split in rows:
        row = {"path": name, "split": split, "licence": "CC0", "duration_s": 2, "domain": "speech"}
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))


def test_other_cuts_of_a_tested_reading_are_left_out(tmp_path, capsys):
    manifest = tmp_path / "manifest.jsonl"
    write(manifest, [
        ("a/27-124992-0076.flac", "train"), ("a/27-124992-0077.flac", "test"),
        ("a/27-124993-0001.flac", "train"), ("b/8_lucas_0.flac", "test"),
        ("b/8_lucas_5.flac", "train"), ("LJ001-0031.wav", "test"), ("LJ001-0002.wav", "train"),
    ])  # fmt: skip
    lines = data.corpus_lines(manifest, tmp_path)
    names = [line["path"].rsplit("/", 1)[-1] for line in lines]
    assert names == ["27-124993-0001.flac", "8_lucas_5.flac"]
    assert {line["split"] for line in lines} <= {"train", "test"}
    assert "2 train lines are left out" in capsys.readouterr().out


def test_a_line_without_a_licence_is_refused(tmp_path):
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text('{"path": "a.wav", "split": "train", "duration_s": 1, "domain": "sound"}\n')
    with pytest.raises(ValueError, match="manifest.jsonl.*has no licence"):
        data.corpus_lines(manifest, tmp_path)


def test_a_list_is_the_same_wherever_the_folders_are(tmp_path):
    lists = []
    for name in ("one", "two"):
        corpus = tmp_path / name / "corpus"
        corpus.mkdir(parents=True)
        write(corpus / "manifest.jsonl", [("speech/a.flac", "train")])
        lists.append(data.corpus_lines(corpus / "manifest.jsonl", tmp_path / name / "data"))
    assert lists[0] == lists[1]
    assert lists[0][0]["path"] == "../corpus/speech/a.flac"


def test_recordings_of_another_source(tmp_path):
    folder = tmp_path / "source"
    for name, seconds in (("long", 25.0), ("short", 0.5), ("left_out", 2.0), ("sentence", 2.0)):
        write_wav(folder / "speech" / f"{name}.wav", seconds)
    soundfile.write(folder / "speech" / "silence.wav", np.zeros(32000), 16000)
    (folder / "speech" / "broken.wav").write_bytes(b"RIFFnothing")
    choice = unseen.Choice("a/source", "speech/*.wav", "speech", cuts=2, skip=("left_out",))
    lines = unseen.write(choice, folder, tmp_path / "out")
    durations = {line["path"]: line["duration_s"] for line in lines}
    assert durations == {
        "audio/a-source/speech_long-0.flac": 10.0,
        "audio/a-source/speech_long-1.flac": 10.0,
        "audio/a-source/speech_sentence-0.flac": 2.0,
    }
    assert all((tmp_path / "out" / path).is_file() for path in durations)


def test_cuts_are_spread_over_a_recording():
    wav = np.arange(250)
    first, second = unseen.cut(wav, 10, 2)
    assert (first[0], second[0], first.size, second.size) == (50, 100, 100, 100)
