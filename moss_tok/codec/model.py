"""The codec as one Linen module: interleave, encoder, quantizer, decoder."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from moss_tok.codec.quantizer import Quantized, ResidualQuantizer
from moss_tok.codec.transformer import Stage
from moss_tok.config import CodecConfig, ComputeConfig, PatchConfig


def patchify(x: jax.Array, patch_size: int) -> jax.Array:
    """[B, T * P, D] -> [B, T, D * P], channel-major: new channel = channel * P + offset."""
    batch, frames, dim = x.shape
    x = x.reshape(batch, frames // patch_size, patch_size, dim)
    return x.swapaxes(2, 3).reshape(batch, frames // patch_size, dim * patch_size)


def unpatchify(x: jax.Array, patch_size: int) -> jax.Array:
    """[B, T, D * P] -> [B, T * P, D], the inverse of `patchify`."""
    batch, frames, dim = x.shape
    x = x.reshape(batch, frames, dim // patch_size, patch_size)
    return x.swapaxes(2, 3).reshape(batch, frames * patch_size, dim // patch_size)


def interleave(wav: jax.Array) -> jax.Array:
    """Audio [B, C, S] to one stream [B, S * C, 1]: all channels of a sample, then the next."""
    return wav.swapaxes(1, 2).reshape(wav.shape[0], -1, 1)


def deinterleave(stream: jax.Array, num_channels: int) -> jax.Array:
    """Stream [B, S * C, 1] to audio [B, C, S]."""
    return stream.reshape(stream.shape[0], -1, num_channels).swapaxes(1, 2)


class Encoder(nn.Module):
    """Audio to latents."""

    config: CodecConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, wav: jax.Array) -> jax.Array:
        """[B, C, S], S a multiple of hop_length -> latents [B, T, D] float32."""
        x = interleave(wav)
        windows = self.config.windows("encoder")
        for i, (module, window) in enumerate(zip(self.config.encoder, windows, strict=True)):
            if isinstance(module, PatchConfig):
                x = patchify(x, module.patch_size)
            else:
                x = Stage(module, self.compute, window, name=f"stage_{i}")(x)
        return x.astype(jnp.float32)


class Decoder(nn.Module):
    """Quantized latents to audio."""

    config: CodecConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, latents: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, C, T * hop_length] float32."""
        x = latents
        windows = self.config.windows("decoder")
        for i, (module, window) in enumerate(zip(self.config.decoder, windows, strict=True)):
            if isinstance(module, PatchConfig):
                x = unpatchify(x, module.patch_size)
            else:
                x = Stage(module, self.compute, window, name=f"stage_{i}")(x)
        return deinterleave(x.astype(jnp.float32), self.config.num_channels)


class CodecModel(nn.Module):
    """Encoder, quantizer and decoder; apply with `method=` one of the functions below."""

    config: CodecConfig
    compute: ComputeConfig = ComputeConfig()

    def setup(self) -> None:
        """Declares the parameters."""
        self.encoder = Encoder(self.config, self.compute)
        self.quantizer = ResidualQuantizer(self.config.quantizer)
        self.decoder = Decoder(self.config, self.compute)

    def __call__(
        self, wav: jax.Array, keep: jax.Array | None = None
    ) -> tuple[jax.Array, Quantized]:
        """Reconstructs [B, C, S]; keep bool [B, Q] masks quantizers per item (training)."""
        num_quantizers = self.config.quantizer.num_quantizers
        quantized = self.quantizer(self.encoder(wav), num_quantizers, keep)
        return self.decoder(quantized.latents), quantized

    def encode(self, wav: jax.Array, num_quantizers: int) -> Quantized:
        """[B, C, S] -> `Quantized`."""
        return self.quantizer(self.encoder(wav), num_quantizers)

    def latents(self, wav: jax.Array) -> jax.Array:
        """[B, C, S] -> latents before quantizing [B, T, D]."""
        return self.encoder(wav)

    def decode(self, codes: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        """Codes [B, q, T] -> [B, C, S]; keep bool [B, q] leaves quantizers out per item."""
        return self.decoder(self.quantizer.decode(codes, keep))
