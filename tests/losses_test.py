"""Losses against straightforward numpy versions, and the discriminators."""

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest

from moss_tok.audio import spectral
from moss_tok.codec.quantizer import Quantized
from moss_tok.objectives import discriminators, losses
from moss_tok.objectives.config import CodecSettings, DiscriminatorSettings

WINDOWS = CodecSettings().mel_windows


def mel_loss(*args):
    """The multi-scale mel loss alone."""
    return losses.reconstruction_losses(*args)["reconstruction_loss"]


def numpy_mel_loss(wav, wav_hat, rate, floor=lambda window: 1e-5, windows=WINDOWS):
    """The multi-scale mel loss of [S] signals through librosa, and that of loudness."""
    total, loudness = 0.0, 0.0
    for window in windows:
        mels, logs = 5 * window // 32, []
        for x in (wav, wav_hat):
            spectrum = np.abs(
                librosa.stft(x, n_fft=window, hop_length=window // 4, pad_mode="reflect")
            )
            matrix = librosa.filters.mel(sr=rate, n_fft=window, n_mels=mels)
            matrix = matrix[matrix.sum(1) > 0]
            logs.append(np.log10(np.maximum(matrix @ spectrum, floor(window))))
        total += np.abs(logs[0] - logs[1]).mean()
        reference, synthesis = (10 ** (0.45 * x) for x in logs)
        loudness += np.abs(reference - synthesis).mean() / reference.mean()
    return total, loudness


@pytest.mark.filterwarnings("ignore:Empty filters")
@pytest.mark.parametrize("windows", [WINDOWS, (96, 4096)])
def test_mel_loss_agrees_with_librosa(rng, windows):
    wav, wav_hat = 0.1 * rng.standard_normal((2, 3, 1, 9600)).astype(np.float32)
    lengths = jnp.full(3, 9600)
    found = losses.reconstruction_losses(wav, wav_hat, lengths, 24000, windows)
    pairs = zip(wav, wav_hat, strict=True)
    expected = [numpy_mel_loss(a[0], b[0], 24000, windows=windows) for a, b in pairs]
    found = np.stack([found["reconstruction_loss"], found["loudness_loss"]], axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Empty filters")
def test_mel_loss_with_a_floor(rng):
    """The floor is what noise of that level gives, at every window where that is above 1e-5."""
    wav, wav_hat = 0.02 * rng.standard_normal((2, 1, 1, 24000)).astype(np.float32)
    wav[..., 12000:] *= 1e-3
    noise = 10 ** (-50 / 20) * rng.standard_normal((1, 24000)).astype(np.float32)
    floors = {}
    for window in WINDOWS:
        mels = 5 * window // 32
        floors[window] = 10 ** float(spectral.log_mel(0 * noise, 24000, window, mels, -50).min())
        mean = np.mean(10 ** spectral.log_mel(noise, 24000, window, mels))
        assert floors[window] == pytest.approx(max(1e-5, mean), rel=0.25)
    found = mel_loss(wav, wav_hat, jnp.full(1, 24000), 24000, WINDOWS, -50)
    expected, _ = numpy_mel_loss(wav[0, 0], wav_hat[0, 0], 24000, floors.get)
    np.testing.assert_allclose(found[0], expected, rtol=1e-4)


def sum_of_spectral_losses(wav, wav_hat, lengths):
    """The sum of the mel losses and the loss of complex spectra, of the first item."""
    terms = losses.reconstruction_losses(wav, wav_hat, lengths, 24000, WINDOWS)
    spectrum = losses.spectrum_loss(wav, wav_hat, lengths, WINDOWS)
    return sum(terms.values(), spectrum)[0]


def test_spectrum_loss_agrees_with_librosa(rng):
    wav, wav_hat = 0.1 * rng.standard_normal((2, 2, 1, 5000)).astype(np.float32)
    found = losses.spectrum_loss(wav, wav_hat, jnp.full(2, 5000), (64, 512))
    for item in range(2):
        total = 0.0
        for window in (64, 512):
            x, y = (
                librosa.stft(a[item, 0], n_fft=window, hop_length=window // 4, pad_mode="reflect")
                for a in (wav, wav_hat)
            )
            x, y = x * abs(x) ** -0.55, y * abs(y) ** -0.55
            total += abs(x - y).mean() / abs(x).mean()
        assert found[item] == pytest.approx(total, rel=1e-3)


def test_spectrum_loss_hears_the_sign(rng):
    wav = 0.1 * rng.standard_normal((1, 1, 5000)).astype(np.float32)
    lengths = jnp.full(1, 5000)
    assert float(losses.spectrum_loss(wav, wav, lengths, WINDOWS)[0]) < 1e-2
    opposite = float(losses.spectrum_loss(wav, -wav, lengths, WINDOWS)[0])
    assert opposite == pytest.approx(2 * len(WINDOWS), rel=1e-3)


def test_mel_loss_of_padded_items(rng):
    """Frames that touch padding weigh nothing: neither its content nor wav_hat's matters there."""
    wav, wav_hat = 0.1 * rng.standard_normal((2, 1, 1, 9600)).astype(np.float32)
    lengths = jnp.array([6000])

    @jax.jit
    def differentiate(x, y):
        def loss(y):
            return sum_of_spectral_losses(x, y, lengths)

        return jax.value_and_grad(loss)(y)

    spoiled = wav.copy()
    spoiled[..., 6000:] = 0.7
    (loss, gradient), (same, _) = differentiate(wav, wav_hat), differentiate(spoiled, wav_hat)
    assert loss == same
    np.testing.assert_array_equal(gradient[..., 6000:], 0)
    assert np.abs(gradient[..., :6000]).max() > 0


def test_waveform_loss(rng):
    wav, wav_hat = rng.standard_normal((2, 2, 1, 500)).astype(np.float32)
    found = losses.waveform_loss(wav, wav_hat, jnp.array([500, 300]))
    for item, length in enumerate((500, 300)):
        x, y = wav[item, 0, :length], wav_hat[item, 0, :length]
        expected = np.abs(x - y).mean() / (np.abs(x).mean() + 1e-3)
        assert found[item] == pytest.approx(expected, rel=1e-5)


def test_gradient_is_finite_at_silence():
    silence = jnp.zeros((1, 1, 4096))

    @jax.jit
    @jax.grad
    def differentiate(y):
        return sum_of_spectral_losses(silence + 0.1, y, jnp.array([4096]))

    gradient = differentiate(silence)
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


def random_features(rng, offset=0.0):
    """Three discriminators of 2, 3 and 4 layers on 2 items."""
    return [
        [jnp.asarray(offset + rng.standard_normal((2, 3 + k, 5)), jnp.float32) for k in range(n)]
        for n in (2, 3, 4)
    ]


def test_adversarial_losses(rng):
    for real, fake in zip(random_features(rng), random_features(rng, 0.3), strict=True):
        for item, (r, f) in enumerate(zip(np.asarray(real[-1]), np.asarray(fake[-1]), strict=True)):
            expected = ((1 - r) ** 2).mean() + (f**2).mean()
            assert losses.discriminator_loss(real, fake)[item] == pytest.approx(expected, rel=1e-5)
            expected = ((1 - f) ** 2).mean()
            assert losses.adversarial_loss(fake)[item] == pytest.approx(expected, rel=1e-5)


def test_feature_matching_loss(rng):
    for real, fake in zip(random_features(rng), random_features(rng, 0.3), strict=True):
        found = losses.feature_matching_loss(real, fake)
        for item in range(2):
            pairs = [(x[item], y[item]) for x, y in zip(real[:-1], fake[:-1], strict=True)]
            ratios = [np.abs(x - y).mean() / np.abs(x).mean() for x, y in pairs]
            assert found[item] == pytest.approx(np.mean(ratios), rel=1e-4)
        assert (losses.feature_matching_loss(real, real) == 0).all()


def test_losses_are_float32_whatever_the_features(rng):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_features(rng)[0])
    for loss in (losses.discriminator_loss(half, half), losses.feature_matching_loss(half, half)):
        assert loss.dtype == jnp.float32


@pytest.fixture(scope="module")
def judges():
    model = discriminators.Discriminators(DiscriminatorSettings(2, (2, 11), (2048, 512)))
    params = model.init(jax.random.key(0), jnp.zeros((1, 1, 4096)))
    return lambda wav: model.apply(params, wav)


@pytest.mark.parametrize("num_samples", [2048, 5003])
def test_discriminators_take_any_length(judges, rng, num_samples):
    wav = jnp.asarray(0.1 * rng.standard_normal((2, 1, num_samples)), jnp.float32)
    features = judges(wav)
    assert all(np.isfinite(layer).all() and layer.shape[0] == 2 for f in features for layer in f)
    assert [len(f) for f in features] == [6, 6, 26, 26]
    swapped = judges(wav[::-1])  # an item's features do not depend on the others
    for f, g in zip(features, swapped, strict=True):
        np.testing.assert_allclose(f[-1][0], g[-1][1], atol=1e-5)


def test_spectra_are_compressed_and_keep_their_phases(rng):
    wav = rng.standard_normal(4096).astype(np.float32)
    spectra = librosa.stft(wav, n_fft=512, hop_length=128, pad_mode="reflect").T
    spectra /= np.sqrt(np.square(np.hanning(513)[:-1]).sum())
    found = discriminators._compressed_stft(wav[None], 512)[0]
    softened = np.sqrt(np.abs(spectra) ** 2 + 1e-4)
    np.testing.assert_allclose(found, spectra * softened**-0.7, atol=1e-4)
    assert 0.9 < np.abs(found).mean() < 1  # white noise of level 1
    gradient = jax.grad(lambda x: discriminators._compressed_stft(x, 64).real.sum())
    assert np.isfinite(gradient(jnp.zeros((1, 256)))).all()


def test_fresh_discriminators_keep_the_size_of_a_signal(judges, rng):
    wav = jnp.asarray(rng.standard_normal((1, 1, 5000)), jnp.float32)
    for features in judges(wav):
        assert all(0.02 < np.abs(layer).mean() < 50 for layer in features)


def test_period_discriminator_folds_the_signal(rng):
    """Samples `period` apart are neighbours; the phases do not see each other."""
    model = discriminators.PeriodDiscriminator(3, 2, "float32")
    wav = jnp.asarray(rng.standard_normal((1, 1, 3000)), jnp.float32)
    params = model.init(jax.random.key(0), wav)
    gradient = jax.grad(lambda x: model.apply(params, x)[-1][0, 1].sum())(wav)
    touched = np.flatnonzero(np.asarray(gradient[0, 0]))
    assert set(touched % 3) == {1}


def test_convolution_is_that_of_scipy(rng):
    scipy_signal = pytest.importorskip("scipy.signal")
    model = discriminators.WeightNormConv(1, (3, 9), (1, 2), "float32")
    x = rng.standard_normal((1, 6, 20, 2)).astype(np.float32)
    variables = jax.tree.map(
        lambda p: p.unbox() if hasattr(p, "unbox") else p,
        model.init(jax.random.key(0), x),
        is_leaf=lambda p: hasattr(p, "unbox"),
    )
    p = variables["params"]
    kernel = p["direction"] / np.linalg.norm(p["direction"]) * p["gain"]
    full = sum(
        scipy_signal.correlate2d(
            np.pad(x[0, ..., c], ((1, 1), (4, 4))), kernel[:, :, c, 0], "valid"
        )
        for c in range(2)
    )
    found = model.apply(variables, x)[0, ..., 0]
    np.testing.assert_allclose(found, full[:, ::2] + p["bias"], atol=1e-5)
