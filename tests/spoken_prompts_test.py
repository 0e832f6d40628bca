"""Recordings of prompts and numbers of one voice, for experiments/speech.md."""

import gzip
import json

import numpy as np
import pytest
import soundfile
import spoken_prompts
from helpers import manifest_rows

from moss_tok.language import text

RATE = 16000
TEXTS = {
    **{f"digits/{number}": str(number) for number in (*range(20), *range(20, 100, 10))},
    "digits/hundred": "hundred",
    "digits/thousand": "thousand",
    "agent-pass": "Please enter 5 or 12, and don't hang up!",
    "beep": "[this is a beep]",
    "silence/1": "one second of silence",
    "goodbye": "Goodbye.",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of the inputs and the output of spoken_prompts.py."""
    folder = tmp_path_factory.mktemp("prompts")
    random = np.random.default_rng(0)
    lines = []
    for index, name in enumerate(TEXTS):
        seconds = 5 if name == "goodbye" else 0.25
        wav = 0.2 * random.standard_normal(int(seconds * RATE))
        soundfile.write(folder / f"{index}.flac", wav, RATE)
        source_path = f"usr/share/asterisk/sounds/en_US_f_Allison/{name}.g722"
        lines.append({
            "path": f"{index}.flac", "source": spoken_prompts.SOURCE, "source_path": source_path,
            "duration_s": seconds,
        })  # fmt: skip
    text_lines = "; a comment\n\n" + "".join(f"{name}: {value}\n" for name, value in TEXTS.items())
    with gzip.open(folder / "texts.txt.gz", "wt") as file:
        file.write(text_lines)
    (folder / "speech.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(folder, "texts.txt.gz") == 0
    return folder


def run(folder, texts):
    """Runs the script."""
    return spoken_prompts.main(
        [str(folder), str(folder / texts), str(folder / "out"), "--number=80"]
    )


def test_prompts_are_the_short_recordings_with_words(made):
    texts = [row["transcript"] for row in manifest_rows(made / "out" / "prompts")]
    assert "please enter five or twelve and don't hang up" in texts
    assert not {"goodbye", "one second of silence"} & set(texts)
    assert len(texts) == len(TEXTS) - 3
    for row in manifest_rows(made / "out" / "prompts"):
        assert soundfile.info(row["path"]).duration == row["duration_s"]


def test_numbers_are_joined_from_the_recordings_of_their_words(made):
    folder = made / "out" / "numbers"
    rows = manifest_rows(folder)
    assert len(rows) == 80
    for row in rows:
        info = soundfile.info(folder / row["path"])
        assert info.samplerate == RATE
        assert info.duration == row["duration_s"] <= 4
        words = row["transcript"].split()
        edges = 2 * 0.06 + 0.01 * (len(words) - 1)
        assert 0.2 * len(words) + edges <= row["duration_s"] <= 0.3 * len(words) + 0.3
    lengths = {len(row["transcript"].split()) for row in rows}
    assert {1, 6} <= lengths


def test_texts_of_the_test_are_not_in_training(made):
    for name in ("prompts", "numbers"):
        rows = manifest_rows(made / "out" / name)
        texts = {split: {row["transcript"] for row in rows if row["split"] == split}
                 for split in ("train", "test")}  # fmt: skip
        assert texts["train"] and texts["test"]
        assert not texts["train"] & texts["test"]


def test_the_tokenizer_keeps_all_texts(made):
    tokenizer = text.load(made / "out" / "tokenizer.json")
    for row in manifest_rows(made / "out" / "numbers"):
        tokens = tokenizer.encode(row["transcript"])
        assert len(tokens) <= 2 * len(row["transcript"].split())
        assert tokenizer.decode(tokens) == row["transcript"]
        assert text.missing_characters(tokenizer, row["transcript"]) == ""


def test_a_number_is_read_as_a_whole_or_digit_by_digit():
    assert spoken_prompts.spell("0") == "zero"
    assert spoken_prompts.spell("472") == "four hundred seventy two"
    assert spoken_prompts.spell("120305") == "one hundred twenty thousand three hundred five"
    assert spoken_prompts.spell("007") == "zero zero seven"


def test_recordings_that_are_shorter_than_a_word_are_refused(made, tmp_path, capsys):
    texts = [str(made), str(made / "texts.txt.gz"), str(tmp_path / "out"), "--number=2"]
    assert spoken_prompts.main([*texts, "--seconds=0.3"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --seconds must be at least 0.5") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["", "; nothing\n", "tone: [a tone]\n"])
def test_a_file_without_texts_is_refused(made, capsys, content):
    (made / "empty.txt").write_text(content)
    assert run(made, "empty.txt") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "empty.txt: has no lines NAME: TEXT" in error
