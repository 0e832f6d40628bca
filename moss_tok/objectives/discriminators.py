"""Discriminators: multi-period (folded waveforms) and multi-band complex STFT.

Source: the Descript Audio Codec, whose layers the paper uses: multi-period (HiFi-GAN) and complex
multi-band STFT. Each discriminator returns the outputs of all its layers, its score last.

Two things differ from it; without them the discriminators hardly learn in the first thousands of
steps. Initial kernels are larger, so that a signal keeps its size through six layers. Magnitudes of
spectra are compressed, so that the upper bands count as well, which are 40 dB below the lower ones
in speech.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from moss_tok.audio import spectral
from moss_tok.objectives.config import DiscriminatorSettings

BANDS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # band edges, as shares of the spectrum
_PERIOD_WIDTHS = (1, 4, 16, 32, 32)  # multiples of the base width
_PERIOD_STRIDES = (3, 3, 3, 3, 1)
_BAND_KERNELS = ((3, 9), (3, 9), (3, 9), (3, 9), (3, 3))  # time, frequency
_BAND_STRIDES = (1, 2, 2, 2, 1)
_KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
_COMPRESSION = 0.3  # exponent on magnitudes
_SOFT_MAGNITUDE = 1e-2  # no compression far below it, because it would amplify rounding errors


# Not nn.WeightNorm, for the reasons in codec/quantizer.py. Also, its scale could not start as the
# norm of the kernel, so a signal would not keep its size.
class WeightNormConv(nn.Module):
    """Weight-normalised convolution with bias over the axes between batch and channels.

    Pads by half a kernel on both sides; computes in `dtype`, with parameters in float32.
    """

    features: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, ..., in] -> [B, ..., features]."""
        out_axis = "conv_out" if self.features > 1 else None
        axes = (None,) * len(self.kernel) + ("conv_in", out_axis)
        shape = (*self.kernel, x.shape[-1], self.features)
        inputs = tuple(range(len(shape) - 1))

        def gain_init(_, shape, dtype):
            del shape
            return jnp.sqrt(jnp.sum(jnp.square(direction), inputs)).astype(dtype)

        def param(name, init, axes, shape):
            init = nn.with_logical_partitioning(init, axes)
            return self.param(name, init, shape, jnp.float32)

        direction = param("direction", _KERNEL_INIT, axes, shape)
        gain = param("gain", gain_init, axes[-1:], shape[-1:])
        bias = param("bias", nn.initializers.zeros, axes[-1:], shape[-1:])
        norm = jnp.sqrt(jnp.sum(jnp.square(direction), inputs) + 1e-12)
        kernel = direction * (gain / norm)
        spatial = "HW"[-len(self.kernel) :]
        x = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            self.strides,
            padding=[(size // 2, size // 2) for size in self.kernel],
            dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        )
        return x + bias.astype(self.dtype)


def _layers(x: jax.Array, layers: Iterable[tuple[int, Any, Any]], dtype: str) -> list[jax.Array]:
    """Outputs of a stack of convolutions (width, kernel, strides), each with a leaky ReLU."""
    features = []
    for width, kernel, strides in layers:
        x = WeightNormConv(width, kernel, strides, dtype)(x)
        x = jax.nn.leaky_relu(x, 0.1)
        features.append(x)
    return features


class PeriodDiscriminator(nn.Module):
    """Applies a 1-D network to each phase of the waveform, that is to every `period`-th sample."""

    period: int
    channels: int
    dtype: str

    @nn.compact
    def __call__(self, wav: jax.Array) -> list[jax.Array]:
        """[B, C, S], any S -> features [B, period, T, F] of each layer."""
        batch, num_channels, num_samples = wav.shape
        padding = -num_samples % self.period
        wav = jnp.pad(wav, ((0, 0), (0, 0), (0, padding)), mode="reflect")
        x = wav.reshape(batch, num_channels, -1, self.period)
        x = jnp.moveaxis(x, (3, 1), (1, 3))  # [B, period, T, C]
        # The phases are independent, so they become batch items of a 1-D convolution.
        x = x.reshape(batch * self.period, -1, num_channels)
        layers = []
        for width, stride in zip(_PERIOD_WIDTHS, _PERIOD_STRIDES, strict=True):
            layers.append((width * self.channels, (5,), (stride,)))
        features = _layers(x, layers, self.dtype)
        score = WeightNormConv(1, (3,), (1,), self.dtype)(features[-1])
        by_period = []
        for layer in [*features, score]:
            by_period.append(layer.reshape(batch, self.period, *layer.shape[1:]))
        return by_period


class SpectrumDiscriminator(nn.Module):
    """Applies 2-D networks to the complex STFT of one window length, a network to each band."""

    window_length: int
    channels: int
    dtype: str

    @nn.compact
    def __call__(self, wav: jax.Array) -> list[jax.Array]:
        """[B, C, S] -> features [B, T, F, channels] of all layers of all bands; then the score."""
        batch, num_channels, num_samples = wav.shape
        spectra = _compressed_stft(wav.reshape(-1, num_samples), self.window_length)
        spectra = spectra.reshape(batch, num_channels, *spectra.shape[1:])
        x = jnp.concatenate([spectra.real, spectra.imag], axis=1)  # [B, 2 C, T, F]
        x = jnp.moveaxis(x, 1, -1)  # [B, T, F, 2 C]
        num_bins = x.shape[2]
        layers = []
        for kernel, stride in zip(_BAND_KERNELS, _BAND_STRIDES, strict=True):
            layers.append((self.channels, kernel, (1, stride)))
        features = []
        bands = []
        for low, high in zip(BANDS[:-1], BANDS[1:], strict=True):
            band = x[:, :, int(low * num_bins) : int(high * num_bins)]
            features += _layers(band, layers, self.dtype)
            bands.append(features[-1])
        joined = jnp.concatenate(bands, axis=2)
        score = WeightNormConv(1, (3, 3), (1, 1), self.dtype)(joined)
        return [*features, score]


def _compressed_stft(wav: jax.Array, window_length: int) -> jax.Array:
    """[B, S] -> complex spectra [B, T, F] with magnitudes to the power of `_COMPRESSION`."""
    # Divided by the energy of the Hann window, so that white noise keeps its level.
    energy = 3 / 8 * window_length
    spectra = spectral.stft(wav, window_length) / jnp.sqrt(energy)
    power = jnp.square(spectra.real) + jnp.square(spectra.imag) + _SOFT_MAGNITUDE**2
    return spectra * power ** ((_COMPRESSION - 1) / 2)


def make_discriminators(
    config: DiscriminatorSettings,
    dtype: str = "float32",
) -> dict[str, nn.Module]:
    """All discriminators, by the names of their parameters in `Discriminators`."""
    channels = config.discriminator_channels
    models: dict[str, nn.Module] = {}
    for period in config.discriminator_periods:
        name = f"period_{period}"
        models[name] = PeriodDiscriminator(period, channels, dtype, name=name)
    for window in config.discriminator_windows:
        name = f"window_{window}"
        models[name] = SpectrumDiscriminator(window, channels, dtype, name=name)
    return models


class Discriminators(nn.Module):
    """All discriminators as one module; for audio with a peak of about 1."""

    config: DiscriminatorSettings
    dtype: str = "float32"

    @nn.compact
    def __call__(self, wav: jax.Array) -> list[list[jax.Array]]:
        """[B, C, S] -> for each discriminator, the outputs of its layers, the score last."""
        models = make_discriminators(self.config, self.dtype)
        return [model(wav) for model in models.values()]
