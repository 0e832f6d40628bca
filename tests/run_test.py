"""Whole runs: resume, kills, broken checkpoints, full disks, refusals."""

import json
import os
import re
import shutil
import signal
import tarfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import (
    ADVERSARIAL,
    CODEC,
    GOLDEN,
    PRETRAIN,
    SECOND_STAGE,
    SHALLOW,
    init_state,
    leaves_equal,
    make_clips,
    make_recipe,
    processes_of,
    rows_without_timing,
    small_run,
    start,
    train,
    wait_for,
    wait_until_gone,
)

import moss_tok
from moss_tok import checkpoint, sharding, storage
from moss_tok.evaluation import sweep
from moss_tok.language import config as language_config
from moss_tok.language import pretrained as language_models
from moss_tok.training import checkpoints, loop, writer
from moss_tok.training import start as run_starts
from moss_tok.training import state as states
from moss_tok.training.config import RunConfig


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return make_clips(tmp_path_factory.mktemp("clips"), [1.0, 0.7, 0.1, 2.0, 0.6, 1.2])


@pytest.fixture(scope="module")
def finished(clips, tmp_path_factory):
    """A run of 4 steps of the second stage with an evaluation every 2, and its config."""
    folder = tmp_path_factory.mktemp("finished")
    config = small_run(
        SECOND_STAGE, clips, folder, num_steps=4, checkpoint_every=2, eval_every=2,
        num_eval_clips=2, profile_steps="3:3",
    )  # fmt: skip
    assert train(config, draws_curves=True)
    return config


@pytest.fixture
def second_stage(finished, tmp_path):
    """The same with a workdir that is not there yet."""
    return finished | dict(workdir=str(tmp_path / "run"), eval_every=0)


@pytest.fixture
def ended_second_stage(finished, second_stage):
    """The same with a workdir that holds the whole run."""
    shutil.copytree(finished["workdir"], second_stage["workdir"])
    return second_stage | dict(num_eval_clips=0)


@pytest.fixture(scope="module")
def first_stage(clips, tmp_path_factory):
    """A run of 4 steps of the first stage, which compiles faster, and its config."""
    folder = tmp_path_factory.mktemp("first")
    config = small_run(PRETRAIN, clips, folder, num_steps=4, checkpoint_every=2, num_eval_clips=0)
    assert train(config)
    return config | dict(num_eval_clips=2)


@pytest.fixture
def config(first_stage, tmp_path):
    """The same with a workdir that is not there yet."""
    return first_stage | dict(workdir=str(tmp_path / "run"))


@pytest.fixture
def ended(first_stage, config):
    """The same with a workdir that holds the whole run."""
    shutil.copytree(first_stage["workdir"], config["workdir"])
    return config | dict(num_eval_clips=0)


def test_a_run_leaves_what_it_promises(finished):
    config, workdir = finished, Path(finished["workdir"])
    samples = [f"samples/speech_{n}.wav" for n in ("input", "1_quantizer", "4_quantizers")]
    for name in ("metrics.jsonl", "curves.png", "evaluation.md", "samples/speech.png", *samples):
        assert (workdir / name).stat().st_size > 0
    rows = rows_without_timing(workdir)
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    for row in rows:
        for name in make_recipe(config, SHALLOW).objective.term_names:
            assert row[f"music/{name}"] == pytest.approx(row[name], rel=1e-5)
        assert len(row["codebook_perplexity"]) == len(row["codebook_usage"]) == 4
        assert row["gradient_norm"] > 0 and row["discriminator_gradient_norm"] > 0
        assert 0 <= row["dead_codes"] <= 1 and row["skipped_updates"] == 0
    assert list((workdir / "profile").rglob("*.xplane.pb"))
    evaluations = writer.read_rows(workdir / writer.EVALUATION)
    assert [e["step"] for e in evaluations] == [2, 4]
    scores = evaluations[-1]["table"]["speech"]["4 quantizers"]
    assert scores.keys() == {"mel_loss", "stft", "stoi"}
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import RecordWriter  # noqa: F401  the format is TensorFlow's

    data = b"".join(p.read_bytes() for p in (workdir / "tensorboard").iterdir())
    assert event_pb2.Event and all(
        tag in data for tag in (b"train/loss", b"codebook_usage/00", b"spectrograms/speech",
                                b"speech/input", b"evaluation_speech_stoi")
    )  # fmt: skip


def test_killed_runs_end_like_undisturbed_ones(config, tmp_path, capsys):
    """14 steps at once; and with kills at odd moments, one in a save; the rest in this process.

    First the process is killed alone, and cannot tell its workers, which end, too; then its group.
    """
    config = config | dict(num_steps=14, checkpoint_every=6, log_every=2, num_eval_clips=0)
    assert train(config)
    parts = config | dict(workdir=str(tmp_path / "parts"), num_workers=1)
    metrics = tmp_path / "parts" / writer.METRICS
    folder = tmp_path / "parts" / "checkpoints"
    process = start(parts | dict(num_workers=2))
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, process)
    assert len(processes_of(process.pid)) > 2
    process.kill()  # before any save
    process.communicate()
    wait_until_gone(process.pid)
    process = start(parts | dict(num_workers=0))
    wait_for(lambda: any(folder.glob("00000012*")), process)  # in a save, or just after it
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    capsys.readouterr()
    assert train(parts | dict(num_workers=0))
    assert re.search("resuming from step (6|12)\n", capsys.readouterr().out)
    assert rows_without_timing(parts["workdir"]) == rows_without_timing(config["workdir"])
    a, b = (moss_tok.load(c["workdir"]) for c in (config, parts))
    assert leaves_equal(a.params, b.params)
    assert not any(folder.glob("*.orbax*"))


def test_sigterm_saves_and_says_143(config, tmp_path):
    config = config | dict(num_steps=100000, checkpoint_every=100000, num_workers=1)
    process = start(config)
    metrics = Path(config["workdir"]) / writer.METRICS
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, process)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGTERM)  # as a scheduler does: the data workers get it too
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert time.monotonic() - began < 30
    assert "stopped by SIGTERM after step" in output and "which is saved" in output
    steps = checkpoint.saved_steps(Path(config["workdir"]))
    assert len(steps) == 1 and rows_without_timing(config["workdir"])[-1]["step"] == steps[0]
    wait_until_gone(process.pid)


def test_sigterm_in_the_last_evaluation_says_143_and_it_is_repeated(ended, monkeypatch, capsys):
    config = ended | dict(num_eval_clips=2)
    evaluate = sweep.evaluate

    def stop(codec, clips, numbers, progress):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(codec, clips, numbers, progress)

    page = Path(config["workdir"]) / "evaluation.md"
    page.unlink(missing_ok=True)
    monkeypatch.setattr(sweep, "evaluate", stop)
    assert not train(config) and not page.exists()
    assert "stopped by SIGTERM during the last evaluation" in capsys.readouterr().out
    monkeypatch.undo()
    assert train(config) and page.exists()


@pytest.mark.parametrize(
    ("run", "damage"),
    [("ended_second_stage", "truncated"), ("ended", "missing"), ("ended", "config.json")],
)
def test_a_broken_checkpoint_falls_back(request, capsys, run, damage):
    ended = request.getfixturevalue(run)
    workdir = Path(ended["workdir"])
    expected = moss_tok.load(workdir).params
    newest = workdir / "checkpoints" / "00000004"
    data = max((newest / "state").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    if damage == "truncated":
        data.write_bytes(data.read_bytes()[:-100])
    elif damage == "missing":
        data.unlink()
    else:
        (newest / damage).write_text("")
    assert train(ended)
    printed = capsys.readouterr().out
    assert "broken checkpoint" in printed and "going back to the checkpoint before" in printed
    assert "resuming from step 2" in printed
    assert leaves_equal(moss_tok.load(workdir).params, expected)
    assert newest.with_name("00000004.broken").exists()


def test_checkpoints_that_stay(ended):
    train(ended | dict(num_steps=8, keep_every=4, keep_checkpoints=1))
    folder = Path(ended["workdir"]) / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["00000004", "00000008"]


def test_a_full_disk_leaves_earlier_checkpoints(ended, monkeypatch):
    config = ended | dict(num_steps=6)
    real = checkpoint.CheckpointHandler.finalize

    def full(self, directory):
        real(self, directory)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.CheckpointHandler, "finalize", full)
    with pytest.raises(
        ValueError, match="could not be written .*earlier ones are intact: 00000002, 00000004"
    ):
        train(config)
    monkeypatch.undo()
    folder = Path(config["workdir"]) / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["00000002", "00000004"]
    assert train(config)


def test_a_run_without_data_makes_its_own(config):
    config = config | dict(train_data="", num_steps=1, num_eval_clips=1)
    train(config)
    assert (Path(config["workdir"]) / "synthetic" / "manifest.jsonl").exists()


def test_the_second_stage_starts_from_the_first(ended_second_stage, tmp_path, capsys):
    """Generator restored, discriminators fresh; from an adversarial run they come along."""
    workdir = ended_second_stage["workdir"]
    recipe = make_recipe(SECOND_STAGE, SHALLOW)
    shapes = states.state_shapes(recipe, sharding.make_mesh("data:1"))

    def begin():
        saver = checkpoints.Checkpoints(tmp_path / "none", RunConfig(), recipe.objective, {})
        return run_starts.first_state(recipe, workdir, shapes, saver, print)

    state = begin()
    assert "starting from the generator and discriminators of" in capsys.readouterr().out
    params = moss_tok.load(workdir).params
    assert leaves_equal(state.params, params) and leaves_equal(state.ema, params)
    like = shapes.extra["discriminators"]
    restored = checkpoints.load_folder(workdir, "discriminators", like)
    assert leaves_equal(state.extra["discriminators"], restored)
    for folder in Path(workdir, "checkpoints").iterdir():
        shutil.rmtree(folder / "discriminators")
    state = begin()
    assert f"starting from the generator of {workdir}" in capsys.readouterr().out
    assert leaves_equal(state.params, params) and leaves_equal(state.ema, params)
    fresh = init_state(recipe).extra["discriminators"]
    assert leaves_equal(state.extra["discriminators"], fresh)
    assert not leaves_equal(fresh, restored)


def test_starts_from_an_official_directory(golden_dir, config):
    """And trains its decoder alone; of the first stage, which compiles faster."""
    start_from = str(golden_dir / "v1_tiny")
    config = config | dict(
        model="", init_from=start_from, trainable="decoder", segment_seconds=0.6, num_steps=2,
        num_eval_clips=0,
    )  # fmt: skip
    train(config)
    before, after = moss_tok.load(start_from), moss_tok.load(config["workdir"])
    wav = 0.1 * np.random.default_rng(0).standard_normal((1, 1, 9000)).astype(np.float32)
    np.testing.assert_array_equal(
        moss_tok.encode(before, wav).codes, moss_tok.encode(after, wav).codes
    )
    assert not leaves_equal(before.params["decoder"], after.params["decoder"])


def test_too_many_bad_files_stop_the_run(config, clips, tmp_path, capsys):
    folder = shutil.copytree(clips, tmp_path / "bad")
    for name in ("0.flac", "3.flac"):
        (folder / name).write_bytes(b"fLaC" + b"\0" * 300)
    config = config | dict(
        train_data=str(folder / "manifest.jsonl"), num_steps=100, log_every=5, num_eval_clips=0
    )
    with pytest.raises(ValueError, match="reads failed, more than max_failed_share 0.1"):
        train(config)
    printed = capsys.readouterr().out
    assert printed.count("0.flac: truncated or corrupt") == 1
    tolerant = config | dict(max_failed_share=1.0, num_steps=5, workdir=str(tmp_path / "tolerant"))
    assert train(tolerant)
    assert rows_without_timing(tolerant["workdir"])[-1]["failed_reads"] > 0


def test_numbers_that_stay_infinite_stop_the_run(ended, monkeypatch):
    config = ended | dict(max_skipped_steps=3, num_steps=20)
    expected = moss_tok.load(config["workdir"]).params
    real = loop.Run._put

    def spoiled(self, batches):
        batch = real(self, batches)
        return batch | {"wav": batch["wav"] * np.nan}

    monkeypatch.setattr(loop.Run, "_put", spoiled)
    with pytest.raises(
        ValueError, match=r"step 7: .*reconstruction_loss.* not finite; 3 updates in a row"
    ):
        train(config)
    assert leaves_equal(expected, moss_tok.load(config["workdir"]).params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1e-5}, "holds another run: learning_rate was 0.003, now 1e-05"),
        ({"seed": 5, "beta1": 0.5}, "seed was 0, now 5; beta1 was 0.8, now 0.5"),
    ],
)
def test_a_workdir_of_another_run_is_refused(ended, changes, message):
    with pytest.raises(ValueError, match=message):
        train(ended | changes)


def test_a_workdir_of_before_there_were_objectives_is_resumed(tmp_path, monkeypatch, capsys):
    """Its settings, its state and what it had sampled: the next steps are those it had taken."""
    monkeypatch.setitem(language_config._SHAPES, "tiny", (16, 1, 2, 1, 24))
    monkeypatch.chdir(tmp_path)
    with tarfile.open(GOLDEN / "workdir_before_objectives.tar.gz") as packed:
        packed.extractall(tmp_path, filter="data")
    (tmp_path / "clips").mkdir()
    make_clips(tmp_path / "clips", [1.0, 0.2, 0.1, 0.2, 0.2, 0.1])
    (tmp_path / "micro.json").write_text(CODEC.to_json())
    flags = ADVERSARIAL | {
        "language_model": "tiny", "max_text_tokens": 4, "model": "micro.json", "workdir": "run",
        "train_data": "clips/manifest.jsonl", "num_steps": 4, "log_every": 1, "num_eval_clips": 0,
    }  # fmt: skip
    before = (moss_tok.load("run").params["encoder"], language_models.load("run").params)
    assert train(flags)
    after = (moss_tok.load("run").params["encoder"], language_models.load("run").params)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    encoder, language = map(jax.tree.leaves, moved)
    assert all(encoder) and any(language)  # the second stage learns from texts as well
    assert "resuming from step 2" in capsys.readouterr().out
    rows = rows_without_timing("run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    expected = json.loads((GOLDEN / "workdir_before_objectives.json").read_text())
    for row, wanted in zip(rows[2:], expected, strict=True):
        assert row.keys() == wanted.keys()
        for name, value in wanted.items():
            assert row[name] == pytest.approx(value, rel=1e-3), name


def test_metrics_of_a_killed_writer(tmp_path):
    rows = [{"step": n, "loss": float(n)} for n in (1, 2, 3)]
    text = "".join(json.dumps(r) + "\n" for r in rows)
    (tmp_path / writer.METRICS).write_text(text + '{"step": 4, "lo')
    with writer.MetricsWriter(storage.Mirror(tmp_path), 2) as log:
        log.write(3, {"loss": 9.0})
    found = writer.read_rows(tmp_path / writer.METRICS)
    assert found == [*rows[:2], {"step": 3, "loss": 9.0}]
