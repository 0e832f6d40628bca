"""The lists of recordings that experiments/data.py makes for training."""

import json

import data
import pytest


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
