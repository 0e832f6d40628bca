"""Discriminators: a waveform folded at several periods, and bands of complex spectra.

Source: the Descript Audio Codec, whose layers the paper takes over: multi-period (HiFi-GAN) and
complex multi-band STFT. Each returns the outputs of all of its layers, the last one the judgement.

Two things differ, without which they hardly learn in the first thousands of steps: kernels start
larger, so that six layers keep the size of a signal, and the magnitudes of spectra are compressed,
so that the upper bands, 40 dB below the lower ones in speech, are seen as well.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from moss_tok.audio import spectral
from moss_tok.objectives.config import DiscriminatorSettings

BANDS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # edges, as shares of the spectrum
_PERIOD_WIDTHS = (1, 4, 16, 32, 32)  # times the base width
_PERIOD_STRIDES = (3, 3, 3, 3, 1)
_BAND_KERNELS = ((3, 9), (3, 9), (3, 9), (3, 9), (3, 3))  # time, frequency
_BAND_STRIDES = (1, 2, 2, 2, 1)
_KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
_COMPRESSION = 0.3  # exponent of magnitudes
_SOFT_MAGNITUDE = 1e-2  # below it they are not compressed further, or rounding errors would grow


class WeightNormConv(nn.Module):
    """Weight-normalised convolution with bias over the axes between batch and channels.

    Padded by half a kernel on both sides; compute in `dtype`, parameters in float32.
    """

    features: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, ..., in] -> [B, ..., features]."""
        axes = (None,) * len(self.kernel) + ("conv_in", "conv_out" if self.features > 1 else None)
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
        spatial = "HW"[-len(self.kernel) :]
        x = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            (direction * (gain / norm)).astype(self.dtype),
            self.strides,
            [(k // 2, k // 2) for k in self.kernel],
            dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        )
        return x + bias.astype(self.dtype)


def _layers(x: jax.Array, layers: Iterable[tuple[int, Any, Any]], dtype: str) -> list[jax.Array]:
    """Outputs of convolutions (width, kernel, strides), a leaky ReLU after each."""
    features = []
    for width, kernel, strides in layers:
        x = jax.nn.leaky_relu(WeightNormConv(width, kernel, strides, dtype)(x), 0.1)
        features.append(x)
    return features


class PeriodDiscriminator(nn.Module):
    """Judges every `period`-th sample as a signal of its own."""

    period: int
    channels: int
    dtype: str

    @nn.compact
    def __call__(self, wav: jax.Array) -> list[jax.Array]:
        """[B, C, S], any S -> features [B, period, T, F] of each layer."""
        batch, num_channels, num_samples = wav.shape
        wav = jnp.pad(wav, ((0, 0), (0, 0), (0, -num_samples % self.period)), mode="reflect")
        x = wav.reshape(batch, num_channels, -1, self.period)
        # A period's phases are independent: they go into the batch of a 1-D convolution.
        x = jnp.moveaxis(x, (3, 1), (1, 3)).reshape(batch * self.period, -1, num_channels)
        rows = zip(_PERIOD_WIDTHS, _PERIOD_STRIDES, strict=True)
        layers = [(width * self.channels, (5,), (stride,)) for width, stride in rows]
        features = _layers(x, layers, self.dtype)
        features.append(WeightNormConv(1, (3,), (1,), self.dtype)(features[-1]))
        return [f.reshape(batch, self.period, *f.shape[1:]) for f in features]


class SpectrumDiscriminator(nn.Module):
    """Judges the complex spectrum of one window length, each band with layers of its own."""

    window_length: int
    channels: int
    dtype: str

    @nn.compact
    def __call__(self, wav: jax.Array) -> list[jax.Array]:
        """[B, C, S] -> features [B, T, F, channels] of all layers of all bands; the judgement."""
        batch, num_channels, num_samples = wav.shape
        spectra = _compressed_stft(wav.reshape(-1, num_samples), self.window_length)
        spectra = spectra.reshape(batch, num_channels, *spectra.shape[1:])
        x = jnp.concatenate([spectra.real, spectra.imag], axis=1)  # [B, 2 C, T, F]
        x = jnp.moveaxis(x, 1, -1)
        num_bins = x.shape[2]
        features, bands = [], []
        for low, high in zip(BANDS[:-1], BANDS[1:], strict=True):
            band = x[:, :, int(low * num_bins) : int(high * num_bins)]
            rows = zip(_BAND_KERNELS, _BAND_STRIDES, strict=True)
            layers = [(self.channels, kernel, (1, stride)) for kernel, stride in rows]
            features += _layers(band, layers, self.dtype)
            bands.append(features[-1])
        joined = jnp.concatenate(bands, axis=2)
        return [*features, WeightNormConv(1, (3, 3), (1, 1), self.dtype)(joined)]


def _compressed_stft(wav: jax.Array, window_length: int) -> jax.Array:
    """Complex spectra [B, S] -> [B, T, F], their magnitudes to the power of `_COMPRESSION`."""
    energy = 3 / 8 * window_length  # of the Hann window: white noise keeps its level
    spectra = spectral.stft(wav, window_length) / jnp.sqrt(energy)
    power = jnp.square(spectra.real) + jnp.square(spectra.imag) + _SOFT_MAGNITUDE**2
    return spectra * power ** ((_COMPRESSION - 1) / 2)


def judges(config: DiscriminatorSettings, dtype: str = "float32") -> dict[str, nn.Module]:
    """Each discriminator, by the name of its parameters in `Discriminators`."""
    channels = config.discriminator_channels
    made: dict[str, nn.Module] = {}
    for period in config.discriminator_periods:
        name = f"period_{period}"
        made[name] = PeriodDiscriminator(period, channels, dtype, name=name)
    for window in config.discriminator_windows:
        name = f"window_{window}"
        made[name] = SpectrumDiscriminator(window, channels, dtype, name=name)
    return made


class Discriminators(nn.Module):
    """All of them; for audio whose peak is about 1."""

    config: DiscriminatorSettings
    dtype: str = "float32"

    @nn.compact
    def __call__(self, wav: jax.Array) -> list[list[jax.Array]]:
        """[B, C, S] -> per discriminator the outputs of its layers, the judgement last."""
        return [judge(wav) for judge in judges(self.config, self.dtype).values()]
