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


class Side(nn.Module):
    """The modules of one side in order: the encoder folds patches, the decoder unfolds them."""

    config: CodecConfig
    compute: ComputeConfig
    side: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Frames [B, T, D] of the stream to latents, or back; float32."""
        fold = patchify if self.side == "encoder" else unpatchify
        modules, windows = getattr(self.config, self.side), self.config.windows(self.side)
        for i, (module, window) in enumerate(zip(modules, windows, strict=True)):
            if isinstance(module, PatchConfig):
                x = fold(x, module.patch_size)
            else:
                x = Stage(module, self.compute, window, name=f"stage_{i}")(x)
        return x.astype(jnp.float32)


class CodecModel(nn.Module):
    """Encoder, quantizer and decoder; apply with `method=` one of the functions below."""

    config: CodecConfig
    compute: ComputeConfig = ComputeConfig()

    def setup(self) -> None:
        """Declares the parameters."""
        self.encoder = Side(self.config, self.compute, "encoder")
        self.quantizer = ResidualQuantizer(self.config.quantizer)
        self.decoder = Side(self.config, self.compute, "decoder")

    def __call__(
        self, wav: jax.Array, keep: jax.Array | None = None
    ) -> tuple[jax.Array, Quantized]:
        """Reconstructs [B, C, S]; keep bool [B, Q] masks quantizers per item (training)."""
        num_quantizers = self.config.quantizer.num_quantizers
        quantized = self.quantizer(self.latents(wav), num_quantizers, keep)
        return self._audio(quantized.latents), quantized

    def encode(self, wav: jax.Array, num_quantizers: int) -> Quantized:
        """[B, C, S] -> `Quantized`."""
        return self.quantizer(self.latents(wav), num_quantizers)

    def latents(self, wav: jax.Array) -> jax.Array:
        """[B, C, S], S a multiple of hop_length -> latents before quantizing [B, T, D]."""
        return self.encoder(interleave(wav))

    def decode(self, codes: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        """Codes [B, q, T] -> [B, C, S]; keep bool [B, q] leaves quantizers out per item."""
        return self._audio(self.quantizer.decode(codes, keep))

    def _audio(self, latents: jax.Array) -> jax.Array:
        return deinterleave(self.decoder(latents), self.config.num_channels)
