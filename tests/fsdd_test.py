"""experiments/fsdd.py: the manifests of a small copy of the Free Spoken Digit Dataset."""

import fsdd
import pytest
import soundfile

from moss_tok.audio import manifest


def make_recordings(folder, names):
    """Writes a short recording of each name."""
    folder.mkdir()
    for name in names:
        soundfile.write(folder / f"{name}.wav", [0.0] * 100, 8000)
    return folder


def test_numbers_decide_the_manifest(tmp_path):
    names = [f"{digit}_{who}_{n}" for digit in (0, 7) for who in ("a", "b") for n in range(12)]
    folder = make_recordings(tmp_path / "in", [*names, "readme", "7_a_x"])
    assert fsdd.main([str(folder), str(tmp_path / "out")]) == 0
    found = {}
    for part in ("train", "validation", "test"):
        items = manifest.find_items(tmp_path / "out" / f"{part}.jsonl")
        found[part] = {item.path.stem for item in items}
        assert {item.split for item in items} == {"train" if part == "train" else "test"}
        for item in items:
            digit, speaker, _ = item.path.stem.split("_")
            assert item.metadata["transcript"] == {"0": "zero", "7": "seven"}[digit]
            assert item.metadata["speaker"] == speaker
    assert {name.split("_")[2] for name in found["test"]} == {"0"}
    assert {name.split("_")[2] for name in found["validation"]} == {"1", "2", "3", "4"}
    assert sorted(name for part in found.values() for name in part) == sorted(names)


@pytest.mark.parametrize("names", [[], ["readme"], ["1_a_0", "1_a_1"]])
def test_nothing_is_written_without_recordings(tmp_path, capsys, names):
    folder = make_recordings(tmp_path / "in", names)
    assert fsdd.main([str(folder), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "no recordings DIGIT_SPEAKER_NUMBER.wav for t" in error
    assert not (tmp_path / "out").exists()


def test_no_folder(tmp_path, capsys):
    assert fsdd.main([str(tmp_path / "no"), str(tmp_path / "out")]) == 2
    assert "no: no such folder" in capsys.readouterr().err
