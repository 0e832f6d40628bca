"""The scripts of experiments/speech.md, on a small copy of the Free Spoken Digit Dataset."""

import argparse
import itertools
import json
import sys
from pathlib import Path

import codec_copies
import fsdd
import jiwer
import numpy as np
import pytest
import soundfile
import speech_study
import spoken_digits
import voice_similarity
from helpers import manifest_rows

from moss_tok.codec import pretrained
from moss_tok.codec.inference import decode_one
from moss_tok.data.codes import Item
from moss_tok.language import text

RATE = 8000
NUMBERS = (0, 1, 5, 6, 7, 8)  # of clips
SPEAKERS = ("a", "b")


def frequency_of(digit, speaker, number):
    """The frequency of a clip, Hz: each clip has another one."""
    return 300 + 12 * (10 * (len(SPEAKERS) * number + SPEAKERS.index(speaker)) + digit)


@pytest.fixture(scope="module")
def sequences(tmp_path_factory):
    """The output of spoken_digits.py; each clip is a sine."""
    folder = tmp_path_factory.mktemp("digits")
    (folder / "in").mkdir()
    seconds = np.arange(RATE // 5) / RATE
    for digit, speaker, number in itertools.product(range(10), SPEAKERS, NUMBERS):
        wav = 0.3 * np.sin(2 * np.pi * frequency_of(digit, speaker, number) * seconds)
        soundfile.write(folder / "in" / f"{digit}_{speaker}_{number}.wav", wav, RATE)
    assert fsdd.main([str(folder / "in"), str(folder / "lists")]) == 0
    options = ["--number=60", "--test-number=40"]
    out = folder / "out"
    assert spoken_digits.main([str(folder / "lists"), str(out), *options]) == 0
    return out


def test_no_text_of_the_test_is_in_the_speech(sequences):
    texts = {name: {row["transcript"] for row in manifest_rows(sequences / name)}
             for name in ("speech", "reader", "test")}  # fmt: skip
    assert not texts["speech"] & texts["test"]
    words = fsdd.WORDS
    for row in texts["test"]:
        digits = [words.index(word) for word in row.split()]
        assert 2 <= len(digits) <= 3 and sum(digits) % 7 == 0
    assert {len(row.split()) for row in texts["speech"]} == {1, 2, 3}


@pytest.mark.parametrize(
    ("name", "numbers"), [("speech", (6, 8)), ("reader", (5, 7)), ("test", (0, 1))]
)
def test_each_folder_has_clips_of_its_own(sequences, name, numbers):
    words = fsdd.WORDS
    for row in manifest_rows(sequences / name)[:20]:
        wav, rate = soundfile.read(sequences / name / row["path"])
        assert row["duration_s"] == len(wav) / rate
        digit = words.index(row["transcript"].split()[0])
        possible = [frequency_of(digit, row["speaker"], number) for number in numbers]
        first = int(np.flatnonzero(abs(wav) > 0.01)[0])
        part = wav[first : first + rate // 5]
        found = abs(np.fft.rfft(part, 10 * rate)).argmax() / 10
        assert min(abs(found - frequency) for frequency in possible) < 6


def test_each_word_is_a_token_and_other_words_are_not_lost(sequences):
    tokenizer = text.load(sequences / "tokenizer.json")
    words = fsdd.WORDS
    tokens = [tokenizer.encode(word) for word in words]
    assert {len(word_tokens) for word_tokens in tokens} == {1}
    assert len({tuple(word_tokens) for word_tokens in tokens}) == len(words)
    assert tokenizer.encode(" ".join(words)) == sum(tokens, [])
    assert len(tokenizer.encode("tense")) > 1
    assert text.missing_characters(tokenizer, "seven") == ""


def test_other_manifests_are_refused(sequences, tmp_path, capsys):
    for part in ("train", "validation", "test"):
        line = json.dumps({"path": str(sequences / "test" / "00000.flac"), "transcript": "one"})
        (tmp_path / f"{part}.jsonl").write_text(line.replace("00000", "no-number") + "\n")
    assert spoken_digits.main([str(tmp_path), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "train.jsonl: no-number.flac is not DIGIT_SPEAKER_NUMBER.wav" in error
    assert not (tmp_path / "out").exists()


def test_copies_have_the_texts_and_few_quantizers(micro, tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    items = [
        Item(str(i), random.integers(0, 16, (4, 5 + i)), 100, {"transcript": str(i)})
        for i in range(4)
    ]
    monkeypatch.setattr(codec_copies, "NUMBERS", (1, 4))
    codec_copies.write_copies(micro, items, tmp_path / "out")
    for index, row in enumerate(manifest_rows(tmp_path / "out")):
        assert row["transcript"] == str(index)
        wav, rate = soundfile.read(tmp_path / "out" / row["path"])
        assert row["duration_s"] == len(wav) / rate
        expected = decode_one(micro, items[index].codes, (1, 4)[index % 2])[0]
        np.testing.assert_allclose(wav, np.clip(expected, -1, 1), atol=1e-3)


def test_copies_need_all_quantizers_of_the_same_codec(micro):
    fingerprint = pretrained.fingerprint(micro)

    class Source(list):
        folder = "codes"
        settings = {"codec": fingerprint}

    few = Source([Item("a", np.zeros((2, 3), np.int16), 0, {})])
    with pytest.raises(ValueError, match="codes, a: has 2 quantizers, needs 4"):
        codec_copies.check_codes(micro, few)
    few.settings = {"codec": "0123"}
    with pytest.raises(ValueError, match="codes of codec 0123, --checkpoint is codec"):
        codec_copies.check_codes(micro, few)


def test_prompts_have_another_text_and_the_right_speaker():
    tests = [{"speaker": "ab"[i % 2], "transcript": f"text {i // 4}"} for i in range(12)]
    prompts = speech_study.find_prompts(tests)
    assert prompts["none"] == [None] * 12
    for row, same, other in zip(tests, prompts["same"], prompts["other"], strict=True):
        assert same["speaker"] == row["speaker"] != other["speaker"]
        assert row["transcript"] not in (same["transcript"], other["transcript"])


@pytest.mark.parametrize(("speakers", "texts"), [("aa", "xy"), ("ab", "xy"), ("aab", "xyx")])
def test_prompts_need_speakers_and_texts(speakers, texts):
    tests = [
        {"speaker": speaker, "transcript": said}
        for speaker, said in zip(speakers, texts, strict=True)
    ]
    with pytest.raises(ValueError, match="two or more speakers with two or more texts each"):
        speech_study.find_prompts(tests)


def test_faults_are_counted_in_texts():
    texts = ["one two", "three", "four five", "six"]
    heard = ["one two", "three three", "four", "seven"]
    rows = []
    for said, words in zip(texts, heard, strict=True):
        rows.append({"text": said, "understood": words, "seconds": 2.0, "ended": words != "four"})
    cells = speech_study.table_cells(rows).split(" | ")
    # Errors: one more word, one word less and one wrong word, of six.
    assert [float(cell) for cell in cells if cell] == [0.5, 0.25, 0.25, 0.25, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "needs --codec or --recogniser"),
        (["--codec=CODEC", "--seconds=0.1"], "has no test recordings"),
        (["--codec=CODEC"], "pocketsphinx is not installed: pip install pocketsphinx"),
    ],
)
def test_a_study_without_a_codec_texts_or_reader_is_refused(
    options, message, sequences, micro, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(speech_study.moss_tok, "load", lambda _: micro)
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    out = tmp_path / "out"
    argv = ["words", f"--test={sequences / 'test'}", f"--out={out}", *options]
    assert speech_study.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert not out.exists()


def test_voices_are_compared_without_the_recording_itself():
    compare = voice_similarity.compare
    axes = np.eye(4)
    rows = [
        {"who": "people", "speaker": "a", "embedding": axes[0]},
        {"who": "people", "speaker": "a", "embedding": axes[1]},
        {"who": "people", "speaker": "b", "embedding": axes[2]},
        {"who": "people", "speaker": "b", "embedding": axes[2]},
        {"who": "model", "speaker": "a", "prompt": "b", "embedding": axes[2]},
        {"who": "free", "speaker": "a", "prompt": None, "embedding": axes[2]},
    ]
    means = compare(rows)
    # Without itself, a recording of "a" has nothing in common with the other one.
    np.testing.assert_allclose(means["people"], [0.5, 0, 0.5], atol=1e-6)
    np.testing.assert_allclose(means["model"], [1, 0, 1], atol=1e-6)
    np.testing.assert_allclose(means["free"], [0, 1, 0], atol=1e-6)


def test_a_study_writes_a_page_and_continues(sequences, micro, tmp_path, capsys, monkeypatch):
    texts = [row["transcript"] for row in manifest_rows(sequences / "test")[:3]]
    calls = []

    def read(wavs):
        calls.append(len(wavs))
        return ["nine nine nine", *texts[1:]]

    monkeypatch.setattr(speech_study.moss_tok, "load", lambda _: micro)
    monkeypatch.setattr(speech_study, "find_reader", lambda *_: read)
    argv = ["words", "--codec=CODEC", f"--test={sequences / 'test'}", f"--out={tmp_path / 'out'}"]
    argv += ["--number=3", "--seconds=9", "--quantizers", "1", "4"]
    assert speech_study.main(argv) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    first = capsys.readouterr().out
    assert calls == [3, 3, 3]  # the recordings, and these from 1 and 4 quantizers
    for part in ("people/q4", f"<p>{texts[0]}</p>", "<p>nine nine nine</p>", "syn_audios/000_"):
        assert part in page
    results = json.loads((tmp_path / "out" / "people" / "q4" / "results.json").read_text())
    rate = jiwer.wer(texts, read(texts))
    assert results == {"test": {"wer": rate}, "_meta": {"bps": micro.config.bitrate(4)}}
    assert speech_study.main(argv) == 0
    assert capsys.readouterr().out == first
    assert len(calls) == 4  # nothing is read again
    for changed, message in (
        (["--seconds=8"], "has results of another seconds"),
        (["--checkpoint=a/x", "--checkpoint=b/x"], "have the same name: x, x"),
    ):
        assert speech_study.main([*argv, *changed]) == 2
        assert message in capsys.readouterr().err
    assert len(calls) == 4
    voices = ["voices", *argv[1:-3], f"--out={tmp_path / 'voices'}"]
    assert speech_study.main([*voices, "--number=1"]) == 2
    assert "voices needs two or more speakers" in capsys.readouterr().err
    assert not (tmp_path / "voices").exists()


def test_a_study_knows_which_checkpoint_its_results_are_of(tmp_path, monkeypatch):
    def arguments(*names):
        args = argparse.Namespace(out=tmp_path / "out", recogniser="reader", seconds=2.0)
        args.checkpoint = [f"runs/{name}" for name in names]
        return args

    steps = {"runs/half": "100", "runs/codec": "100", "reader": "100"}
    monkeypatch.setattr(
        speech_study.checkpoint, "find_checkpoint", lambda path: Path(path, steps[path])
    )
    speech_study.begin(arguments("half"))
    speech_study.check_settings(arguments("codec"))
    speech_study.begin(arguments("codec"))
    speech_study.check_settings(arguments("half", "codec"))
    steps["runs/half"] = "200"
    speech_study.check_settings(arguments("codec"))
    with pytest.raises(ValueError, match="has results of another model half$"):
        speech_study.check_settings(arguments("half", "codec"))
    steps["reader"] = "200"
    with pytest.raises(ValueError, match="has results of another recogniser$"):
        speech_study.check_settings(arguments("codec"))
