"""Metrics against the official toolkit's answers; the sweep's baselines."""

import io
import json
import sys

import numpy as np
import pytest
import soundfile

import moss_tok
from moss_tok.evaluation import metrics, sweep


def signal(rate, channels):
    """The signal described in golden/eval_metrics.json, through PCM_16 FLAC."""
    t = np.arange(3 * rate) / rate
    f0 = 120 + 30 * np.sin(2 * np.pi * 0.7 * t)
    phase = 2 * np.pi * np.cumsum(f0) / rate
    envelope = (0.5 * (1 + np.sin(2 * np.pi * 3 * t))) ** 2
    reference = 0.3 * envelope * sum(np.sin(k * phase) / k for k in range(1, 21))
    noise = np.random.RandomState(0).standard_normal(3 * rate)
    synthesis = 0.8 * reference + 0.02 * np.sin(2 * np.pi * 1000 * t) + 0.005 * noise
    pair = []
    for wav in (reference, synthesis):
        wav = np.stack([wav, 0.5 * wav[::-1]][:channels], axis=1).astype(np.float32)
        file = io.BytesIO()
        soundfile.write(file, np.clip(wav, -1, 1), rate, format="FLAC", subtype="PCM_16")
        file.seek(0)
        pair.append(soundfile.read(file, dtype="float32", always_2d=True)[0].T)
    return pair


@pytest.mark.parametrize(("rate", "channels"), [(16000, 1), (24000, 1), (48000, 2)])
def test_official_answers(golden_dir, rate, channels):
    golden = json.loads((golden_dir / "eval_metrics.json").read_text())[f"{rate}x{channels}"]
    found = metrics.compute(*signal(rate, channels), rate, tuple(metrics.METRICS))
    assert found == {name: pytest.approx(golden[name], abs=1e-3) for name in found}
    assert found.keys() == golden.keys()
    assert metrics.compute(*signal(rate, channels), rate).keys() == {"mel_loss", "stft", "stoi"}


def test_equal_signals():
    reference, _ = signal(24000, 1)
    found = metrics.compute(reference, reference, 24000)
    assert found == {"mel_loss": 0, "stft": 0, "stoi": pytest.approx(1)}


def test_errors():
    wav = np.zeros((1, 100))
    with pytest.raises(ValueError, match="unknown metric 'snr'; accepted: stoi, pesq-nb"):
        metrics.compute(wav, wav, 24000, ("snr",))
    with pytest.raises(ValueError, match="shape"):
        metrics.compute(wav[0], wav[0], 24000)
    noise = 0.1 * np.random.default_rng(0).standard_normal((1, 2000))
    with pytest.raises(ValueError, match="pesq-wb: "):  # too short for an utterance
        metrics.compute(noise, noise, 24000, ("pesq-wb",))


@pytest.mark.parametrize(("name", "module"), [("pesq-nb", "pesq"), ("sdr", "mir_eval")])
def test_without_the_extra(monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=r"pip install 'moss_tok\[eval\]'"):
        metrics.compute(*signal(16000, 1), 16000, (name,))


def test_what_is_defined_for_short_and_silent_clips():
    """As for the official toolkit, whose answers the numbers are."""
    wav = 0.1 * np.sin(np.arange(1024, dtype=np.float32))[None]
    names = ("mel_loss", "stft", "spectral_convergence", "sisdr")
    values, errors = metrics.compute_each(wav, 0 * wav, 16000, names)
    assert values == {"spectral_convergence": pytest.approx(1), "sisdr": pytest.approx(69.897)}
    assert errors["mel_loss"] == "needs more than 1024 samples at 16 kHz, got 1024"
    values, _ = metrics.compute_each(0 * wav, wav, 16000, names[2:])
    assert values["sisdr"] == 0 and values["spectral_convergence"] > 1e12


def test_long_audio_is_computed_in_parts(rng, monkeypatch):
    wav = rng.standard_normal((2, 5000)).astype(np.float32)
    resampled = metrics.resample(wav, 44100, 16000)
    distances = metrics.mel_loss(*wav), metrics.stft(*wav)
    monkeypatch.setattr(metrics, "_SAMPLES_AT_ONCE", 3)
    monkeypatch.setattr(metrics, "_WINDOWS_AT_ONCE", 2)
    np.testing.assert_allclose(metrics.resample(wav, 44100, 16000), resampled, atol=1e-6)
    parts = metrics.mel_loss(*wav), metrics.stft(*wav)
    np.testing.assert_allclose(parts, distances, rtol=1e-9)


def test_resampling_from_a_rate_without_a_common_divisor():
    """Its kernels have a row for each of 16000 positions, but no more taps than at other rates."""
    sine = np.sin(2 * np.pi * 440 * np.arange(44099) / 44099)[None]
    expected = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    resampled = metrics.resample(sine, 44099, 16000)[0]
    np.testing.assert_allclose(resampled[100:-100], expected[100:-100], atol=1e-3)
    assert metrics._sinc_kernels(44099, 16000).nbytes < 6e6


def test_shaped_noise_keeps_the_spectrum():
    reference, _ = signal(16000, 1)
    noise = sweep.shaped_noise(reference)
    spectra = [np.abs(np.fft.rfft(x))[0, 1:-1] for x in (reference, noise)]
    np.testing.assert_allclose(*spectra, rtol=0.05, atol=0.5)
    assert metrics.compute(reference, noise, 16000, ("stoi",))["stoi"] < 0.6


def test_sweep(micro, rng):
    sizes = (9000, 100, 8000)
    wavs = [0.1 * rng.standard_normal((1, n), np.float32) for n in sizes]
    done = []
    table = sweep.evaluate(
        micro, [sweep.Clip(w, "music") for w in wavs], [1, 4], lambda: done.append(1)
    )
    assert len(done) == 3
    systems = ["silence", "shaped noise", "1 quantizer", "4 quantizers"]
    assert list(table["music"]) == systems
    text = sweep.format_table(table)
    assert text.count("\n") == 5 and "| silence | " in text


@pytest.mark.parametrize("size", [100, 8000, 9001])
def test_every_prefix_is_what_decode_gives(micro, rng, size):
    wav = 0.1 * rng.standard_normal((1, size), np.float32)
    found = sweep.reconstruct(micro, wav, [1, 3, 4])
    codes = moss_tok.encode(micro, wav[None]).codes
    for n, wav_hat in found.items():
        expected = moss_tok.decode(micro, codes[:, :n]).wav[0, :, :size]
        np.testing.assert_allclose(wav_hat, np.clip(expected, -1, 1), atol=1e-5)
