"""Whole runs: resume, kills, broken checkpoints, full disks, refusals."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import leaves_equal
from data_test import make_clips
from training_test import ADVERSARIAL, CODEC

import moss_tok
from moss_tok import checkpoint, storage
from moss_tok.evaluation import sweep
from moss_tok.training import checkpoints, loop, writer
from moss_tok.training import state as states

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return make_clips(tmp_path_factory.mktemp("clips"), [1.0, 0.7, 0.1, 2.0, 0.6, 1.2])


def small_run(config, clips, folder, **changes):
    """`config` on the codec and clips of the tests, with a workdir that is not there yet."""
    (folder / "micro.json").write_text(CODEC.to_json())
    return dataclasses.replace(
        config,
        model=str(folder / "micro.json"),
        train_data=str(clips / "manifest.jsonl"),
        workdir=str(folder / "run"),
        log_every=1,
        **changes,
    )


@pytest.fixture(scope="module")
def finished(clips, tmp_path_factory):
    """A run of 4 steps of the second stage with an evaluation every 2, and its config."""
    folder = tmp_path_factory.mktemp("finished")
    config = small_run(
        ADVERSARIAL, clips, folder, num_steps=4, checkpoint_every=2, eval_every=2, num_eval_clips=2,
        profile_steps="3:3",
    )  # fmt: skip
    assert loop.train(config)
    return config


@pytest.fixture
def config(finished, tmp_path):
    """The same with a workdir that is not there yet."""
    return dataclasses.replace(finished, workdir=str(tmp_path / "run"), eval_every=0)


@pytest.fixture
def ended(finished, config):
    """The same with a workdir that holds the whole run."""
    shutil.copytree(finished.workdir, config.workdir)
    return dataclasses.replace(config, num_eval_clips=0)


def rows_without_timing(workdir):
    rows = writer.read_rows(Path(workdir) / writer.METRICS)
    return [{k: v for k, v in row.items() if not k.endswith("_per_second")} for row in rows]


def as_flags(config):
    default = type(config)()
    pairs = dataclasses.asdict(config).items()
    return [f"--{k}={v}" for k, v in pairs if v != getattr(default, k)]


def start(config, *flags, num_devices=1, environment=(), python=()):
    """train.py in a process group of its own; what it compiles is kept, for the next one."""
    xla_flags = os.environ["XLA_FLAGS"].replace("count=8", f"count={num_devices}")
    added = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "XLA_FLAGS": xla_flags}
    cache = f"--compilation_cache_dir={jax.config.jax_compilation_cache_dir}"
    return subprocess.Popen(
        [sys.executable, *python, str(ROOT / "train.py"), *as_flags(config), cache, *flags],
        env=os.environ | added | dict(environment),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition, process, seconds=240):
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    raise TimeoutError


def processes_of(session):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_until_gone(session, seconds=10):
    """multiprocessing's own helper ends a moment after the process that it served."""
    deadline = time.monotonic() + seconds
    while left := processes_of(session):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_a_run_leaves_what_it_promises(finished):
    config, workdir = finished, Path(finished.workdir)
    samples = [f"samples/speech_{n}.wav" for n in ("input", "1_quantizer", "4_quantizers")]
    for name in ("metrics.jsonl", "curves.png", "evaluation.md", "samples/speech.png", *samples):
        assert (workdir / name).stat().st_size > 0
    rows = rows_without_timing(workdir)
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    for row in rows:
        for name in states.term_names(config):
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


def test_killed_runs_end_like_undisturbed_ones(config, tmp_path):
    """20 steps at once; and with kills of the process group at odd moments, one in a save."""
    config = dataclasses.replace(config, num_steps=20, checkpoint_every=6, log_every=2)
    whole = start(config)
    output, _ = whole.communicate()
    assert whole.returncode == 0, output
    parts = dataclasses.replace(config, workdir=str(tmp_path / "parts"), num_workers=1)
    metrics = tmp_path / "parts" / writer.METRICS
    folder = tmp_path / "parts" / "checkpoints"
    moments = [
        lambda: metrics.exists() and metrics.read_text().count("\n") >= 2,  # before any save
        lambda: any(folder.glob("00000006.orbax*")),  # in a save
        lambda: (folder / "00000012").exists(),
    ]
    for number, moment in enumerate(moments):
        process = start(dataclasses.replace(parts, num_workers=number % 3))
        wait_for(moment, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    last = start(parts)
    output, _ = last.communicate()
    assert last.returncode == 0, output
    assert "going on from step 12" in output
    assert rows_without_timing(parts.workdir) == rows_without_timing(config.workdir)
    a, b = (moss_tok.load(c.workdir) for c in (config, parts))
    assert leaves_equal(a.params, b.params)
    assert not any(folder.glob("*.orbax*"))


def test_sigterm_saves_and_says_143(config, tmp_path):
    config = dataclasses.replace(config, num_steps=100000, checkpoint_every=100000, num_workers=2)
    process = start(config)
    metrics = Path(config.workdir) / writer.METRICS
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, process)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGTERM)  # as a scheduler does: the data workers get it too
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert time.monotonic() - began < 30
    assert "stopped by SIGTERM after step" in output and "which is saved" in output
    steps = checkpoint.saved_steps(Path(config.workdir))
    assert len(steps) == 1 and rows_without_timing(config.workdir)[-1]["step"] == steps[0]
    wait_until_gone(process.pid)


def test_sigterm_in_the_last_evaluation_says_143_and_it_is_repeated(ended, monkeypatch, capsys):
    config = dataclasses.replace(ended, num_eval_clips=2)
    evaluate = sweep.evaluate

    def stop(codec, clips, numbers, progress):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(codec, clips, numbers, progress)

    page = Path(config.workdir) / "evaluation.md"
    page.unlink()
    monkeypatch.setattr(sweep, "evaluate", stop)
    assert not loop.train(config) and not page.exists()
    assert "stopped by SIGTERM during the last evaluation" in capsys.readouterr().out
    monkeypatch.undo()
    assert loop.train(config) and page.exists()


def test_workers_end_with_their_parent(config):
    """Also if only the parent is killed, and cannot tell them."""
    config = dataclasses.replace(config, num_steps=100000, num_workers=2)
    process = start(config)
    metrics = Path(config.workdir) / writer.METRICS
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, process)
    assert len(processes_of(process.pid)) > 2
    process.kill()
    process.communicate()
    wait_until_gone(process.pid)


@pytest.mark.parametrize("damage", ["truncated", "missing", "config.json"])
def test_a_broken_checkpoint_falls_back(ended, capsys, damage):
    workdir = Path(ended.workdir)
    expected = moss_tok.load(workdir).params
    newest = workdir / "checkpoints" / "00000004"
    data = max((newest / "state").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    if damage == "truncated":
        data.write_bytes(data.read_bytes()[:-100])
    elif damage == "missing":
        data.unlink()
    else:
        (newest / damage).write_text("")
    assert loop.train(ended)
    printed = capsys.readouterr().out
    assert "broken checkpoint" in printed and "going back to the checkpoint before" in printed
    assert "going on from step 2" in printed
    assert leaves_equal(moss_tok.load(workdir).params, expected)
    assert newest.with_name("00000004.broken").exists()


def test_checkpoints_that_stay(ended):
    loop.train(dataclasses.replace(ended, num_steps=8, keep_every=4, keep_checkpoints=1))
    folder = Path(ended.workdir) / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["00000004", "00000008"]


def test_a_full_disk_leaves_earlier_checkpoints(ended, monkeypatch):
    config = dataclasses.replace(ended, num_steps=6)
    real = checkpoint.CheckpointHandler.finalize

    def full(self, directory):
        real(self, directory)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.CheckpointHandler, "finalize", full)
    with pytest.raises(
        ValueError, match="could not be written .*earlier ones are intact: 00000002, 00000004"
    ):
        loop.train(config)
    monkeypatch.undo()
    folder = Path(config.workdir) / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["00000002", "00000004"]
    assert loop.train(config)


def test_a_run_without_data_makes_its_own(config):
    config = dataclasses.replace(config, train_data="", num_steps=1, num_eval_clips=2)
    loop.train(config)
    assert (Path(config.workdir) / "synthetic" / "manifest.jsonl").exists()


def test_the_second_stage_starts_from_the_first(config, ended, tmp_path, capsys):
    """Generator restored, discriminators fresh; from an adversarial run they come along."""
    still = dataclasses.replace(
        ended, model="", init_from=ended.workdir, workdir=str(tmp_path / "still"), num_steps=1,
        learning_rate=1e-30, discriminator_learning_rate=1e-30, reseed_every=1,
    )  # fmt: skip
    loop.train(still)
    assert "starting from the generator and discriminators of" in capsys.readouterr().out
    shapes = jax.eval_shape(lambda: states.init_discriminators(ended, CODEC))
    for load in (
        lambda c: moss_tok.load(c.workdir).params,
        lambda c: checkpoints.load_discriminators(c.workdir, shapes),
    ):
        a, b = jax.tree.leaves(load(ended)), jax.tree.leaves(load(still))
        assert all(np.allclose(x, y, atol=1e-6) for x, y in zip(a, b, strict=True))
    for folder in Path(ended.workdir, "checkpoints").iterdir():
        shutil.rmtree(folder / "discriminators")
    fresh = dataclasses.replace(still, workdir=str(tmp_path / "fresh"))
    loop.train(fresh)
    assert f"starting from the generator of {ended.workdir}" in capsys.readouterr().out
    found = checkpoints.load_discriminators(fresh.workdir, shapes)
    start = states.init_discriminators(fresh, CODEC)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(start), strict=True)
    assert all(np.allclose(x, y, atol=1e-6) for x, y in pairs)


def test_starts_from_an_official_directory(golden_dir, config, tmp_path):
    start_from = str(golden_dir / "v1_tiny")
    config = dataclasses.replace(
        config, model="", init_from=start_from, trainable="decoder", segment_seconds=0.6,
        num_steps=2, num_eval_clips=0, discriminator_windows="",
    )  # fmt: skip
    loop.train(config)
    before, after = moss_tok.load(start_from), moss_tok.load(config.workdir)
    wav = 0.1 * np.random.default_rng(0).standard_normal((1, 1, 9000)).astype(np.float32)
    np.testing.assert_array_equal(
        moss_tok.encode(before, wav).codes, moss_tok.encode(after, wav).codes
    )
    assert not leaves_equal(before.params["decoder"], after.params["decoder"])


def test_too_many_bad_files_stop_the_run(config, clips, tmp_path, capsys):
    folder = shutil.copytree(clips, tmp_path / "bad")
    for name in ("0.flac", "3.flac"):
        (folder / name).write_bytes(b"fLaC" + b"\0" * 300)
    config = dataclasses.replace(
        config, train_data=str(folder / "manifest.jsonl"), num_steps=100, log_every=5,
        num_eval_clips=0, stage="pretrain",
    )  # fmt: skip
    with pytest.raises(ValueError, match="reads failed, more than max_failed_share 0.1"):
        loop.train(config)
    printed = capsys.readouterr().out
    assert printed.count("0.flac: truncated or corrupt") == 1
    tolerant = dataclasses.replace(
        config, max_failed_share=1.0, num_steps=5, workdir=str(tmp_path / "tolerant")
    )
    assert loop.train(tolerant)
    assert rows_without_timing(tolerant.workdir)[-1]["failed_reads"] > 0


def test_numbers_that_stay_infinite_stop_the_run(ended, monkeypatch):
    config = dataclasses.replace(ended, max_skipped_steps=3, num_steps=20)
    expected = moss_tok.load(config.workdir).params
    real = loop.Run._put

    def spoiled(self, batches):
        batch = real(self, batches)
        return batch | {"wav": batch["wav"] * np.nan}

    monkeypatch.setattr(loop.Run, "_put", spoiled)
    with pytest.raises(
        ValueError, match=r"step 7: .*reconstruction_loss.* not finite; 3 updates in a row"
    ):
        loop.train(config)
    assert leaves_equal(expected, moss_tok.load(config.workdir).params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1e-5}, "holds another run: learning_rate was 0.003, now 1e-05"),
        ({"seed": 5, "stage": "pretrain"}, "stage was 'adversarial', now 'pretrain'; seed was 0"),
    ],
)
def test_a_workdir_of_another_run_is_refused(ended, changes, message):
    with pytest.raises(ValueError, match=message):
        loop.train(dataclasses.replace(ended, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "huge"}, "model must be one of v1, v2, nano, tiny or a config.json"),
        ({"train_data": "/nowhere"}, "/nowhere: no such folder or manifest"),
        ({"eval_data": "/nowhere"}, "/nowhere: no such folder or manifest"),
        ({"segment_seconds": 0.05}, "segment_seconds must be at least 0.064"),
        ({"init_from": "/nowhere"}, "/nowhere: no such checkpoint directory"),
    ],
)
def test_nothing_is_written_where_a_setting_is_wrong(config, changes, message):
    with pytest.raises(ValueError, match=message):
        loop.train(dataclasses.replace(config, **changes))
    assert not Path(config.workdir).exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rat=1"], "Unknown command line flag 'learning_rat'"),
        (["--num_steps=many"], "num_steps"),
        (["--num_steps=0"], "num_steps must be at least 1, got 0"),
        (["--flagfile=gone.flags"], "gone.flags"),
        (["--train_data=gone"], "gone: no such folder or manifest"),
        (["--train_data=a:1,b"], "give all sources a weight or none"),
        (["--dtype=float16"], "dtype must be one of float32, bfloat16, got 'float16'"),
        (["--learning_rate=nan"], "learning_rate must be a finite number, got nan"),
        (["--stage=gan"], "stage must be one of pretrain, adversarial, got 'gan'"),
        (["--trainable=decoder"], "trainable=decoder needs init_from"),
        (["--beta1=1"], "beta1 must be at least 0 and below 1, got 1.0"),
        (["--augment_loudness_db=-10:-20"], "augment_loudness_db must be LOW:HIGH"),
        (["--augment_noise_db=20"], "augment_noise_db must be LOW:HIGH"),
        (["--mel_windows=100"], "mel_windows must be one or more multiples of 32"),
        (["--discriminator_windows=100"], "discriminator_windows must be multiples of 64"),
        (["--workdir=/proc/nothing"], "/proc/nothing"),
        (["extra"], "unexpected argument 'extra'"),
    ],
)
def test_train_py_refuses_in_one_line(tmp_path, flags, message):
    argv = [sys.executable, str(ROOT / "train.py"), f"--workdir={tmp_path / 'run'}", *flags]
    result = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_flag_files_are_valid():
    for path in sorted((ROOT / "experiments").glob("*.flags")):
        argv = [sys.executable, str(ROOT / "train.py"), f"--flagfile={path}", "--train_data=none",
                "--init_from=", "--trainable=all", "--model=none"]  # fmt: skip
        result = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert "error: model must be one of" in result.stderr, (path, result.stderr)


def test_metrics_of_a_killed_writer(tmp_path):
    rows = [{"step": n, "loss": float(n)} for n in (1, 2, 3)]
    text = "".join(json.dumps(r) + "\n" for r in rows)
    (tmp_path / writer.METRICS).write_text(text + '{"step": 4, "lo')
    with writer.MetricsWriter(storage.Mirror(tmp_path), 2) as log:
        log.write(3, {"loss": 9.0})
    found = writer.read_rows(tmp_path / writer.METRICS)
    assert found == [*rows[:2], {"step": 3, "loss": 9.0}]
