"""Recordings of numbers by synthesizers, for experiments/speech.md."""

import number_voices
import numpy as np
import pytest
import soundfile
import spoken_digits
from helpers import manifest_rows

RATE = 16000
COPY = """#!/bin/sh
for path; do :; done
/bin/cp {wav} "$path"
"""


@pytest.fixture
def digits(tmp_path, monkeypatch):
    """An output of fsdd.py with one speaker, beside synthesizers that write noise."""
    wav = 0.2 * np.random.default_rng(0).standard_normal(RATE // 4)
    soundfile.write(tmp_path / "word.wav", wav, RATE)
    for name in ("flite", "text2wave", "espeak-ng"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(COPY.format(wav=tmp_path / "word.wav"))
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(number_voices, "STRETCHES", (1.0,))
    monkeypatch.setattr(number_voices, "ACCENTS", ("en-us",))
    clips = {word: [wav] for word in spoken_digits.WORDS}
    people = dict.fromkeys(spoken_digits.FOLDERS, {"jackson": clips})
    monkeypatch.setattr(number_voices, "read_clips", lambda folder, rate: people)
    return tmp_path


def test_numbers_have_all_kinds_of_voices(digits):
    out = digits / "out"
    assert number_voices.main([str(digits), str(out), "--number=120"]) == 0
    rows = manifest_rows(out)
    assert len(rows) == 120
    assert sum(row["split"] == "test" for row in rows) == 3
    assert {"kal16-1.0", "ked_diphone-1.0", "en-us+f1", "jackson"} <= {
        row["speaker"] for row in rows
    }
    for row in rows:
        info = soundfile.info(out / row["path"])
        assert info.samplerate == RATE
        assert info.duration == row["duration_s"] <= 4
        words = row["transcript"].split()
        assert set(words) <= set(number_voices.WORDS)
        if row["speaker"] == "jackson":
            assert set(words) <= set(spoken_digits.WORDS)
        slowest = (0.3 * len(words) + 0.3) * number_voices.FASTEST
        assert 0.2 * len(words) / number_voices.FASTEST < row["duration_s"] < slowest


def test_a_synthesizer_that_is_not_installed_is_named(digits, capsys):
    (digits / "bin" / "text2wave").unlink()
    assert number_voices.main([str(digits), str(digits / "out")]) == 2
    assert "error: not installed: text2wave" in capsys.readouterr().err
    assert not (digits / "out").exists()


def test_a_synthesizer_that_fails_is_named(digits, capsys):
    (digits / "bin" / "flite").write_text("#!/bin/sh\necho no such voice >&2\nexit 1\n")
    assert number_voices.main([str(digits), str(digits / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: flite -voice kal16") and "no such voice" in error
    assert not (digits / "out").exists()
