"""The codec as one Linen module: interleave, encoder, quantizer, decoder."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from moss_tok.codec.config import CodecConfig, PatchConfig
from moss_tok.codec.quantizer import Quantized, ResidualQuantizer
from moss_tok.codec.transformer import Stage
from moss_tok.nn.cache import Cache, Span
from moss_tok.nn.compute import ComputeConfig

Caches = dict[str, Cache]  # by stage


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


def empty_caches(config: CodecConfig, compute: ComputeConfig, side: str, batch_size: int) -> Caches:
    """Caches of one side for streams that have not begun."""
    caches = {}
    for i, (module, window) in enumerate(
        zip(getattr(config, side), config.windows(side), strict=True)
    ):
        if window is not None:
            c = module
            shape = (c.num_layers, batch_size, c.num_heads, window - 1, c.head_dim)
            caches[f"stage_{i}"] = Cache(*(jnp.zeros(shape, compute.dtype) for _ in range(2)))
    return caches


class Side(nn.Module):
    """The modules of one side in order: the encoder folds patches, the decoder unfolds them."""

    config: CodecConfig
    compute: ComputeConfig
    side: str

    @nn.compact
    def __call__(
        self, x: jax.Array, caches: Caches | None = None, span: Span | None = None
    ) -> tuple[jax.Array, Caches]:
        """Frames [B, T, D] of the stream to latents, or back; float32.

        With caches, chunks of streams: `span` counts code frames. Returns the next caches too.
        """
        fold = patchify if self.side == "encoder" else unpatchify
        modules, windows = getattr(self.config, self.side), self.config.windows(self.side)
        rates, found = self.config.stage_rates(self.side), {}
        for i, (module, window, rate) in enumerate(zip(modules, windows, rates, strict=True)):
            if isinstance(module, PatchConfig):
                x = fold(x, module.patch_size)
                continue
            name, here = f"stage_{i}", None
            if span is not None:
                here = jax.tree.map(lambda n, r=rate: n * round(r / self.config.frame_rate), span)
            stage = Stage(module, self.compute, window, name=name)
            x, found[name] = stage(x, (caches or {}).get(name), here)
        return x.astype(jnp.float32), found


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
        _, quantized = self.quantize(wav, keep)
        return self.audio(quantized.latents), quantized

    def quantize(
        self, wav: jax.Array, keep: jax.Array | None = None
    ) -> tuple[jax.Array, Quantized]:
        """The half of the above before the decoder: latents [B, T, D], and what is left of them."""
        latents = self.latents(wav)
        return latents, self.quantizer(latents, self.config.quantizer.num_quantizers, keep)

    def encode(self, wav: jax.Array, num_quantizers: int) -> Quantized:
        """[B, C, S] -> `Quantized`."""
        return self.quantizer(self.latents(wav), num_quantizers)

    def latents(self, wav: jax.Array) -> jax.Array:
        """[B, C, S], S a multiple of hop_length -> latents before quantizing [B, T, D]."""
        return self.encoder(interleave(wav))[0]

    def decode(self, codes: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        """Codes [B, q, T] -> [B, C, S]; keep bool [B, q] leaves quantizers out per item."""
        return self.audio(self.quantizer.decode(codes, keep))

    def dequantize(self, codes: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        """Codes [B, q, T] -> quantized latents [B, T, D]; keep as in `decode`."""
        return self.quantizer.decode(codes, keep)

    def encode_step(
        self, wav: jax.Array, num_quantizers: int, caches: Caches, span: Span
    ) -> tuple[jax.Array, Caches]:
        """A chunk [B, C, T * hop_length] of streams -> codes [B, Q, T], and the next caches."""
        latents, caches = self.encoder(interleave(wav), caches, span)
        return self.quantizer(latents, num_quantizers).codes, caches

    def decode_step(
        self, codes: jax.Array, caches: Caches, span: Span, keep: jax.Array | None = None
    ) -> tuple[jax.Array, Caches]:
        """A chunk [B, q, T] of streams -> [B, C, T * hop_length], and the next caches."""
        stream, caches = self.decoder(self.quantizer.decode(codes, keep), caches, span)
        return deinterleave(stream, self.config.num_channels), caches

    def audio(self, latents: jax.Array) -> jax.Array:
        """Quantized latents [B, T, D] -> [B, C, S]."""
        return deinterleave(self.decoder(latents)[0], self.config.num_channels)
