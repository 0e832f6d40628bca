"""Training on codes that `moss-tok tokenize` wrote: batches, exact resume, refusals."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    PRETRAIN,
    SHALLOW,
    init_params,
    leaves_equal,
    make_clips,
    rows_without_timing,
    train,
)

import moss_tok
from moss_tok.cli.main import main
from moss_tok.codec import pretrained
from moss_tok.data import code_batches
from moss_tok.data.code_batches import CodeShape
from moss_tok.data.codes import CodeSource
from moss_tok.data.config import CodeDataConfig
from moss_tok.language import pretrained as language_models
from moss_tok.language import text
from moss_tok.objectives.config import configure

pytestmark = pytest.mark.usefixtures("small_language_model")
SECONDS = [0.1 + 0.05 * n for n in range(20)]
SHAPE = CodeShape(4, 400, 500.0, text.ByteTokenizer(), 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A codec, recordings, their codes in both formats, and those of another codec."""
    folder = tmp_path_factory.mktemp("codes")
    (folder / "in").mkdir()
    make_clips(folder / "in", SECONDS)
    manifest = folder / "in" / "manifest.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["split"] = "test" if number % 5 == 1 else "train"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pretrained.save(folder / "codec", SHALLOW, init_params(SHALLOW))
    for out, *options in (("codes",), ("lines", "--format=jsonl", "--num-quantizers=3")):
        arguments = [str(manifest), f"--checkpoint={folder / 'codec'}", f"--output={folder / out}"]
        assert main(["tokenize", *arguments, *options]) == 0
    line = {"audio_codes": [[1, 2, 3, 4]] * 9, "text": "a"}
    (folder / "loose.jsonl").write_text(json.dumps(line) + "\n")
    shutil.copytree(folder / "codes", folder / "others")
    plan = json.loads((folder / "codes" / "plan.json").read_text())
    other_plan = plan | {"codec": plan["codec"][::-1]}
    (folder / "others" / "plan.json").write_text(json.dumps(other_plan))
    return folder


def flags_of(folder, workdir, **changes):
    """Batches of two lengths, because each is compiled."""
    names = ("learning_rate", "warmup_steps", "mesh")
    return {name: PRETRAIN[name] for name in names} | {
        "trainable": "language", "language_model": "tiny", "max_text_tokens": 4,
        "init_from": str(folder / "codec"), "train_data": str(folder / "codes"), "batch_size": 4,
        "segment_seconds": 0.22, "workdir": str(workdir), "num_steps": 4, "log_every": 1,
        "checkpoint_every": 2, "num_eval_clips": 2,
    } | changes  # fmt: skip


def some_batches(folder, number, start=0, rows=None, seed=0):
    sets = [code_batches.read_set(CodeSource(folder / name), "train", SHAPE)
            for name in ("codes", "lines")]  # fmt: skip
    config = CodeDataConfig(batch_size=4)
    found = code_batches.batches(config, sets, (3.0, 1.0), SHAPE, seed, start, rows)
    return list(itertools.islice(found, number))


def test_a_batch_is_a_function_of_its_number(folder):
    whole = some_batches(folder, 40)
    later = some_batches(folder, 8, start=32)  # in another window
    for a, b in zip(whole[32:], later, strict=True):
        assert leaves_equal(a, b)
    part = some_batches(folder, 40, rows=[1, 3])
    for a, b in zip(whole, part, strict=True):
        assert all(np.array_equal(a[name][[1, 3]], b[name]) for name in a)
    other = some_batches(folder, 1, seed=1)[0]
    assert other["codes"].shape != whole[0]["codes"].shape or not leaves_equal(other, whole[0])


def test_batches_are_packed_by_length(folder):
    batches = some_batches(folder, 32)
    padded = sum(batch["codes"].shape[0] * batch["codes"].shape[2] for batch in batches)
    assert sum(int(batch["length"].sum()) for batch in batches) > 0.7 * padded
    assert len({batch["codes"].shape for batch in batches}) <= 6
    numbers = np.concatenate([batch["num_quantizers"] for batch in batches])
    assert 0.15 < (numbers == 3).mean() < 0.35  # the weights are 3 : 1
    for batch in batches:
        for codes, size, number in zip(
            batch["codes"], batch["length"], batch["num_quantizers"], strict=True
        ):
            assert not codes[:, size:].any() and not codes[number:].any()
            assert codes[:number, :size].any()


def test_a_run_resumes_exactly(folder, tmp_path):
    whole = flags_of(folder, tmp_path / "whole")
    assert train(whole)
    parts = flags_of(folder, tmp_path / "parts")
    assert train(parts | {"num_steps": 2})
    assert train(parts)
    assert rows_without_timing(whole["workdir"]) == rows_without_timing(parts["workdir"])
    assert leaves_equal(*(language_models.load(x["workdir"]).params for x in (whole, parts)))
    codec = moss_tok.load(whole["workdir"])
    assert leaves_equal(codec.params, moss_tok.load(folder / "codec").params)
    row = rows_without_timing(whole["workdir"])[-1]
    assert row["semantic_loss"] > 0 and "reconstruction_loss" not in row
    table = json.loads((Path(whole["workdir"]) / "evaluation.jsonl").read_text())["table"]
    assert table["text"].keys() == {"1 quantizer", "4 quantizers"}


def test_codes_are_transcribed_by_the_command(folder, tmp_path, capsys):
    """From the codes of `moss-tok encode` with the codec that the run started from."""
    assert train(flags_of(folder, tmp_path / "run", num_steps=1, num_eval_clips=0))
    audio = str(folder / "in" / "0.flac")
    codes = str(tmp_path / "codes.npz")
    assert main(["encode", audio, codes, f"--checkpoint={folder / 'codec'}"]) == 0
    texts = []
    for source in (audio, codes):
        capsys.readouterr()
        options = [f"--checkpoint={tmp_path / 'run'}", "--max-tokens=2"]
        assert main(["transcribe", source, *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_data": "others"}, "holds codes of codec [0-9a-f]+, init_from .* is codec"),
        ({"train_data": "codes,in/manifest.jsonl"}, "train_data mixes codes .* and audio"),
        ({"augment_gain_db": 3.0}, "the objective recognition on codes has no setting augment"),
        ({"language_input": "latents"}, "language_input=latents needs audio, but train_data holds"),
        ({"train_data": "loose.jsonl"}, "loose.jsonl does not say of which codec its codes are"),
        ({"max_text_tokens": 1}, "no recording of the split 'train' .* text of at most"),
        ({"segment_seconds": 0.05}, "no recording of the split 'train' of at most segment_seconds"),
    ],
)
def test_what_is_refused(folder, tmp_path, changes, message):
    if "train_data" in changes:
        names = changes["train_data"].split(",")
        changes = {"train_data": ",".join(str(folder / name) for name in names)}
    with pytest.raises(ValueError, match=message):
        train(flags_of(folder, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_codec_is_not_trained_on_codes(folder):
    with pytest.raises(ValueError, match="the objective codec trains on audio"):
        configure(train_data=str(folder / "codes"))
