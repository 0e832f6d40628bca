"""experiments/test_sets.py: what it lists of small copies of the paper's test sets."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import test_sets

from moss_tok.evaluation import datasets

SCRIPT = Path(__file__).parents[1] / "experiments" / "test_sets.py"


def tree(root, *names):
    """Makes a file of each name: of audio, or of the text behind a colon."""
    for name in names:
        name, _, text = name.partition(":")
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if text:
            (root / name).write_text(text)
        else:
            soundfile.write(root / name, [0.0] * 100, 24000)
    return root


TREES = {
    "librispeech": (
        ["1/2/1-2-0.flac", "1/2/1-2-1.flac", "1/2/1-2.trans.txt:1-2-0 AN E\n1-2-1 B\n"],
        [("1/2/1-2-0.flac", "speech", "AN E"), ("1/2/1-2-1.flac", "speech", "B")],
    ),
    "aishell2": (
        ["wav/T1/I2.wav", "wav/T1/I1.wav", "trans.txt:I1\t你好\n", "wav.scp:I1\twav/T1/I1.wav\n"],
        [("wav/T1/I1.wav", "speech", "你好")],
    ),
    "audioset": (
        ["a/x.wav", "b.flac", "c.txt:no"],
        [("a/x.wav", "sound", None), ("b.flac", "sound", None)],
    ),
    "musdb18hq": (
        ["test/A - B/mixture.wav", "test/A - B/vocals.wav", "train/C/mixture.wav"],
        [("test/A - B/mixture.wav", "music", None)],
    ),
}


@pytest.mark.parametrize("kind", TREES)
def test_listings(tmp_path, kind):
    names, expected = TREES[kind]
    root = tree(tmp_path / "in", *names)
    assert test_sets.main([kind, str(root), str(tmp_path / "out.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    found = [(row["path"], row["domain"], row.get("transcript")) for row in rows]
    assert found == [(str(root / name), *others) for name, *others in expected]
    dataset = datasets.read_dataset(tmp_path / "out.jsonl")
    assert list(dataset.texts) == [text or "" for *_, text in expected]


def test_aishell2_without_a_list(tmp_path):
    tree(tmp_path, "wav/T1/I2.wav", "wav/T1/I1.wav")
    assert test_sets.main(["aishell2", str(tmp_path), str(tmp_path / "out.jsonl")]) == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("kind", "names", "message"),
    [
        ("librispeech", ["a.wav"], "nothing of librispeech, which has SPEAKER/CHAPTER/"),
        ("librispeech", ["1/2/1-2.trans.txt:1-2-0 A"], "no audio of 1-2-0, which has a"),
        ("librispeech", ["1/2/1-2.trans.txt:1-2-0 A\n\n"], "line 2: must be NAME TEXT, got ''"),
        ("aishell2", ["wav.scp:I1 wav/I1.wav"], "wav.scp: no such file: "),
        ("musdb18hq", ["test/mixture.wav"], "nothing of musdb18hq"),
    ],
)
def test_errors(tmp_path, capsys, kind, names, message):
    root = tree(tmp_path / "in", *names)
    assert test_sets.main([kind, str(root), str(tmp_path / "out.jsonl")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_wrong_arguments(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        test_sets.main(["mp3", "a", "b"])
    assert test_sets.main(["musdb18hq", str(tmp_path / "no"), "out.jsonl"]) == 2
    assert "no such folder" in capsys.readouterr().err
    tree(tmp_path, "a.wav")
    assert test_sets.main(["audioset", str(tmp_path), str(tmp_path / "no" / "out.jsonl")]) == 2
    assert "no such folder: " in capsys.readouterr().err


def test_as_a_program(tmp_path):
    command = [sys.executable, str(SCRIPT), "audioset", str(tmp_path), "out.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
