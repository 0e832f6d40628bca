"""Losses against numpy, the step, the data pipeline, resume, and the whole run."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest
import soundfile
from conftest import leaves_equal, micro_config

import moss_tok
from moss_tok.audio import manifest, spectral
from moss_tok.codec.quantizer import Quantized
from moss_tok.config import TrainConfig
from moss_tok.data import pipeline, synthetic
from moss_tok.training import loop, losses, writer
from moss_tok.training import state as states
from moss_tok.training import step as steps

ROOT = Path(__file__).parents[1]
RATE = 8000


def numpy_mel_loss(wav, wav_hat, rate):
    """The seven-scale mel loss of [S] signals through librosa."""
    total = 0.0
    for window, mels in losses.MEL_SCALES:
        logs = []
        for x in (wav, wav_hat):
            spectrum = np.abs(
                librosa.stft(x, n_fft=window, hop_length=window // 4, pad_mode="reflect")
            )
            matrix = librosa.filters.mel(sr=rate, n_fft=window, n_mels=mels)
            matrix = matrix[matrix.sum(1) > 0]
            logs.append(np.log10(np.maximum(matrix @ spectrum, 1e-5)))
        total += np.abs(logs[0] - logs[1]).mean()
    return total


@pytest.mark.filterwarnings("ignore:Empty filters")
def test_mel_loss_agrees_with_librosa(rng):
    wav, wav_hat = 0.1 * rng.standard_normal((2, 3, 1, 9600)).astype(np.float32)
    found = losses.reconstruction_loss(wav, wav_hat, jnp.full(3, 9600), 24000)
    expected = [numpy_mel_loss(a[0], b[0], 24000) for a, b in zip(wav, wav_hat, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_mel_loss_of_padded_items(rng):
    """Frames that touch padding weigh nothing: neither its content nor wav_hat's matters there."""
    wav, wav_hat = 0.1 * rng.standard_normal((2, 1, 1, 9600)).astype(np.float32)
    lengths = jnp.array([6000])

    def loss(x, y):
        return losses.reconstruction_loss(jnp.asarray(x), y, lengths, 24000)[0]

    spoiled = wav.copy()
    spoiled[..., 6000:] = 0.7
    assert loss(wav, wav_hat) == loss(spoiled, wav_hat)
    gradient = jax.grad(loss, argnums=1)(wav, jnp.asarray(wav_hat))
    assert np.abs(gradient[..., :5900]).min() >= 0
    np.testing.assert_array_equal(gradient[..., 6000:], 0)
    assert np.abs(gradient[..., :6000]).max() > 0


def test_gradient_is_finite_at_silence():
    silence = jnp.zeros((1, 1, 4096))
    gradient = jax.grad(
        lambda y: losses.reconstruction_loss(silence + 0.1, y, jnp.array([4096]), 24000)[0]
    )(silence)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("window", [32, 128, 256, 2048])
def test_magnitudes(rng, window):
    wav = rng.standard_normal((1, 5000)).astype(np.float32)
    expected = librosa.stft(wav[0], n_fft=window, hop_length=window // 4, pad_mode="reflect")
    found = spectral.magnitude(jnp.asarray(wav), window)[0].T
    np.testing.assert_allclose(found, np.abs(expected), atol=1e-3)


def test_quantizer_losses_follow_dropout_and_lengths(rng):
    per_frame = rng.random((4, 2, 5)).astype(np.float32)  # [Q, B, T]
    quantized = Quantized(None, jnp.zeros((2, 4, 5), int), per_frame, 2 * per_frame, None)
    keep = jnp.array([[True, True, False, False], [True] * 4])
    found = losses.quantizer_losses(quantized, keep, jnp.array([33, 80]), 16)
    expected = [per_frame[:2, 0, :3].mean(-1).sum(), per_frame[:, 1].mean(-1).sum()]
    np.testing.assert_allclose(found["commitment_loss"], expected, rtol=1e-6)
    np.testing.assert_allclose(found["codebook_loss"], 2 * np.array(expected), rtol=1e-6)


CONFIG = TrainConfig(
    learning_rate=3e-3, warmup_steps=2, batch_size=4, segment_seconds=0.256, reseed_every=5
)
CODEC = micro_config()


def random_batch(seed=0, batch_size=4):
    wav = 0.1 * np.random.default_rng(seed).standard_normal((batch_size, 1, 2048))
    return {"wav": jnp.asarray(wav, jnp.float32), "length": jnp.full(batch_size, 2048)}


def run(config, num_steps, state=None, batch=random_batch):
    state = states.init_state(config, CODEC) if state is None else state
    for _ in range(num_steps):
        state, metrics = steps.train_step(config, CODEC, state, batch(int(state.step)))
    return state, metrics


def test_first_step_is_golden():
    """Numbers of a first step, so that a change of the maths does not pass unnoticed."""
    _, metrics = run(CONFIG, 1)
    golden = json.loads((Path(__file__).parent / "golden" / "train_step.json").read_text())
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(golden, rel=1e-3)


def test_all_parameters_learn_and_nothing_is_lost():
    before = jax.tree.map(np.asarray, states.init_state(CONFIG, CODEC).params)
    after, _ = run(CONFIG, 3)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after.params)
    still = [
        jax.tree_util.keystr(k) for k, v in jax.tree_util.tree_leaves_with_path(moved) if not v
    ]
    assert still == []
    assert int(after.step) == 3


def test_microbatches_change_nothing():
    parts = dataclasses.replace(CONFIG, num_microbatches=2)
    (_, a), (_, b) = run(CONFIG, 1), run(parts, 1)
    assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-5)
    assert float(a["gradient_norm"]) == pytest.approx(float(b["gradient_norm"]), rel=1e-3)


def test_overfits_a_clip():
    t = np.arange(2048) / RATE
    wav = jnp.asarray(0.3 * np.sin(2 * np.pi * 440 * t), jnp.float32)[None, None]
    batch = {"wav": jnp.tile(wav, (4, 1, 1)), "length": jnp.full(4, 2048)}
    _, first = run(CONFIG, 1, batch=lambda i: batch)
    _, last = run(CONFIG, 300, batch=lambda i: batch)
    assert float(last["reconstruction_loss"]) < 0.5 * float(first["reconstruction_loss"])


def test_dropout_draws_all_numbers():
    full = steps._quantizer_dropout(CONFIG, CODEC, jax.random.key(0), 4000)
    counts = np.bincount(np.asarray(full.sum(-1)), minlength=5)
    assert counts[0] == 0 and counts[1:].min() > 900
    none = dataclasses.replace(CONFIG, quantizer_dropout=0.0)
    assert steps._quantizer_dropout(none, CODEC, jax.random.key(0), 50).all()


def test_reseeding_moves_dead_codes_only(rng):
    books = jnp.asarray(rng.standard_normal((2, 8, 3)), jnp.float32)
    counts = jnp.array([[8.0] * 7 + [0.0], [1.0] * 8])
    projected = 5 + jnp.asarray(rng.random((1, 2, 3, 4, 3)), jnp.float32)
    moved, after = steps._reseed(books, counts, projected, jax.random.key(0))
    changed = np.asarray((moved != books).any(-1))
    assert changed.tolist() == [[False] * 7 + [True], [False] * 8]
    vectors = np.asarray(projected[0, 0]).reshape(-1, 3)
    assert (vectors == np.asarray(moved[0, 7])).all(-1).any()
    assert after[0, 7] == 7.0


def test_learning_rate_schedule():
    config = TrainConfig(learning_rate=1.0, warmup_steps=10, decay_steps=110)
    schedule = states.learning_rate(config)
    values = [float(schedule(s)) for s in (0, 4, 9, 10, 60, 110, 500)]
    np.testing.assert_allclose(values, [0.1, 0.5, 1, 1, 0.5, 0, 0], atol=1e-6)
    constant = states.learning_rate(dataclasses.replace(config, decay_steps=0))
    assert float(constant(10**6)) == 1


# ---------------------------------------------------------------------------------------- data


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder with manifest: six clips, one shorter than a segment, two for testing."""
    folder = tmp_path_factory.mktemp("clips")
    generator, rows = np.random.default_rng(0), []
    for i, seconds in enumerate([1.0, 0.7, 0.1, 2.0, 0.6, 0.6]):
        wav = 0.1 * generator.standard_normal(int(seconds * RATE))
        soundfile.write(folder / f"{i}.flac", wav, RATE)
        split, domain = ("test", "speech") if i > 3 else ("train", "music")
        rows.append({"path": f"{i}.flac", "split": split, "domain": domain})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def batches(clips, **changes):
    items = [i for i in manifest.find_items(clips / "manifest.jsonl") if i.split == "train"]
    options = {"batch_size": 3, "num_samples": 2048, "sample_rate": RATE, "num_channels": 1,
               "seed": 0} | changes  # fmt: skip
    return pipeline.batches(items, **options)


def test_a_batch_is_a_function_of_its_number(clips):
    stream = batches(clips)
    seen = [next(stream) for _ in range(12)]
    for start in (0, 1, 7, 11):
        again = next(batches(clips, start=start))
        assert all(np.array_equal(seen[start][k], again[k]) for k in again)
    other = next(batches(clips, seed=1))
    assert not np.array_equal(other["wav"], seen[0]["wav"])
    lengths = np.concatenate([b["length"] for b in seen])
    assert set(lengths) == {800, 2048}
    short = next(b["wav"][i] for b in seen for i in range(3) if b["length"][i] == 800)
    np.testing.assert_array_equal(short[:, 800:], 0)


def test_longer_files_are_drawn_more_often(clips):
    items = manifest.find_items(clips / "manifest.jsonl")[:4]
    source = pipeline.SegmentSource(items, 0.256)
    counts = [sum(source[i] is item for i in range(len(source))) for item in items]
    assert counts == [3, 2, 1, 7]


def test_synthetic_sounds(tmp_path):
    path = synthetic.write_dataset(tmp_path / "a", RATE, num_clips=40)
    items = manifest.find_items(path)
    assert {i.split for i in items} == {"train", "test"}
    assert {i.domain for i in items} == {"speech", "music", "sound"}
    for item in items:
        wav = soundfile.read(item.path)[0]
        assert np.isfinite(wav).all() and 0.05 < np.abs(wav).max() <= 0.61
    before = path.stat().st_mtime_ns
    assert synthetic.write_dataset(tmp_path / "a", RATE).stat().st_mtime_ns == before
    again = synthetic.write_dataset(tmp_path / "b", RATE, num_clips=40)
    names = [i.path.name for i in items]
    assert all((tmp_path / "a" / n).read_bytes() == (again.parent / n).read_bytes() for n in names)


# ---------------------------------------------------------------------------------------- runs


@pytest.fixture
def run_config(clips, tmp_path):
    model = tmp_path / "micro.json"
    model.write_text(CODEC.to_json())
    return dataclasses.replace(
        CONFIG,
        model=str(model),
        train_data=str(clips / "manifest.jsonl"),
        workdir=str(tmp_path / "run"),
        num_steps=4,
        log_every=1,
        checkpoint_every=2,
    )


def metrics_without_timing(workdir):
    rows = writer.read_metrics(Path(workdir))
    timing = ("_per_second", "_seconds")
    return [{k: v for k, v in row.items() if not k.endswith(timing)} for row in rows]


def test_a_run_and_a_resumed_run_are_equal(run_config, tmp_path):
    loop.train(run_config)
    workdir = Path(run_config.workdir)
    for name in ("metrics.jsonl", "curves.png", "evaluation.md", "samples/speech_input.wav",
                 "samples/speech_output.wav", "samples/speech.png"):  # fmt: skip
        assert (workdir / name).stat().st_size > 0
    other = dataclasses.replace(run_config, workdir=str(tmp_path / "parts"))
    loop.train(dataclasses.replace(other, num_steps=2))
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:  # a kill after the checkpoint
        file.write('{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    loop.train(other)
    rows = metrics_without_timing(workdir)
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    assert metrics_without_timing(tmp_path / "parts") == rows
    whole, parts = (moss_tok.load(d) for d in (workdir, tmp_path / "parts"))
    assert leaves_equal(whole.params, parts.params)
    assert whole.config == CODEC
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["00000002", "00000004"]


def test_a_run_without_data_makes_its_own(run_config):
    config = dataclasses.replace(run_config, train_data="", num_steps=1, num_eval_clips=2)
    loop.train(config)
    assert (Path(config.workdir) / "synthetic" / "manifest.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1e-5}, "holds another run: learning_rate was 0.003, now 1e-05"),
        ({"seed": 5}, "seed was 0, now 5"),
    ],
)
def test_a_workdir_of_another_run_is_refused(run_config, changes, message):
    loop.train(dataclasses.replace(run_config, num_steps=1, num_eval_clips=0))
    with pytest.raises(ValueError, match=message):
        loop.train(dataclasses.replace(run_config, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "huge"}, "model must be one of v1, v2, nano, tiny or a config.json"),
        ({"train_data": "/nowhere"}, "/nowhere: no such folder or manifest"),
        ({"eval_data": "/nowhere"}, "/nowhere: no such folder or manifest"),
        ({"segment_seconds": 0.1}, "segment_seconds must be at least 0.256"),
    ],
)
def test_nothing_is_written_where_a_setting_is_wrong(run_config, changes, message):
    with pytest.raises(ValueError, match=message):
        loop.train(dataclasses.replace(run_config, **changes))
    assert not Path(run_config.workdir).exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rat=1"], "Unknown command line flag 'learning_rat'"),
        (["--num_steps=many"], "num_steps"),
        (["--num_steps=0"], "num_steps must be an integer of at least 1, got 0"),
        (["--flagfile=gone.flags"], "gone.flags"),
        (["--train_data=gone"], "gone: no such folder or manifest"),
        (["--dtype=float16"], "dtype must be one of float32, bfloat16, got 'float16'"),
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
        argv = [sys.executable, str(ROOT / "train.py"), f"--flagfile={path}", "--model=none"]
        result = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert "error: model must be one of" in result.stderr, path
