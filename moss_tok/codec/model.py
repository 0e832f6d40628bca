"""The codec as one Linen module: channel interleaving, encoder, quantizer, decoder."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from moss_tok.codec.config import CodecConfig, PatchConfig
from moss_tok.codec.quantizer import Quantized, ResidualQuantizer
from moss_tok.codec.transformer import Stage
from moss_tok.nn.cache import Cache, Span
from moss_tok.nn.compute import ComputeConfig

Caches = dict[str, Cache]  # by name of the stage


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
    """Audio [B, C, S] to one stream [B, S * C, 1], in which the channels alternate."""
    return wav.swapaxes(1, 2).reshape(wav.shape[0], -1, 1)


def deinterleave(stream: jax.Array, num_channels: int) -> jax.Array:
    """Stream [B, S * C, 1] to audio [B, C, S]."""
    return stream.reshape(stream.shape[0], -1, num_channels).swapaxes(1, 2)


def empty_caches(config: CodecConfig, compute: ComputeConfig, side: str, batch_size: int) -> Caches:
    """Caches of one side, "encoder" or "decoder", at the start of `batch_size` streams."""
    caches = {}
    modules = zip(getattr(config, side), config.windows(side), strict=True)
    for i, (module, window) in enumerate(modules):
        if window is not None:
            shape = (module.num_layers, batch_size, module.num_heads, window - 1, module.head_dim)
            keys = jnp.zeros(shape, compute.dtype)
            values = jnp.zeros(shape, compute.dtype)
            caches[f"stage_{i}"] = Cache(keys, values)
    return caches


class Side(nn.Module):
    """The modules of one side, in order; the encoder folds patches, the decoder unfolds them."""

    config: CodecConfig
    compute: ComputeConfig
    side: str

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        caches: Caches | None = None,
        span: Span | None = None,
    ) -> tuple[jax.Array, Caches]:
        """Maps frames of the stream [B, T, D] to latents, or latents to the stream.

        Args:
          x: Input frames.
          caches: For a chunk of streams, the state after the chunks before it.
          span: For a chunk of streams, which code frames it holds.

        Returns:
          Output frames in float32, and the next caches.
        """
        fold = patchify if self.side == "encoder" else unpatchify
        modules = getattr(self.config, self.side)
        windows = self.config.windows(self.side)
        rates = self.config.stage_rates(self.side)
        next_caches = {}
        for i, (module, window, rate) in enumerate(zip(modules, windows, rates, strict=True)):
            if isinstance(module, PatchConfig):
                x = fold(x, module.patch_size)
                continue
            name = f"stage_{i}"
            stage_span = None
            if span is not None:
                frames_per_code = round(rate / self.config.frame_rate)
                stage_span = Span(span.start * frames_per_code, span.count * frames_per_code)
            stage = Stage(module, self.compute, window, name=name)
            x, next_caches[name] = stage(x, (caches or {}).get(name), stage_span)
        return x.astype(jnp.float32), next_caches


class CodecModel(nn.Module):
    """Encoder, quantizer and decoder; call `apply` with the name of a method below as `method=`."""

    config: CodecConfig
    compute: ComputeConfig = ComputeConfig()

    def setup(self) -> None:
        """Declares the parameters."""
        self.encoder = Side(self.config, self.compute, "encoder")
        self.quantizer = ResidualQuantizer(self.config.quantizer)
        self.decoder = Side(self.config, self.compute, "decoder")

    def __call__(
        self,
        wav: jax.Array,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, Quantized]:
        """Encodes, quantizes and decodes audio, for training.

        Args:
          wav: [B, C, S], S a multiple of hop_length.
          mask: Bool [B, Q], the quantizers that each item uses; default: all.

        Returns:
          The reconstruction [B, C, S], and the quantizer's result.
        """
        _, quantized = self.quantize(wav, mask)
        return self.audio(quantized.latents), quantized

    def quantize(
        self,
        wav: jax.Array,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, Quantized]:
        """Encoder and quantizer of `__call__`: latents [B, T, D] before and after quantization."""
        latents = self.latents(wav)
        return latents, self.quantizer(latents, self.config.quantizer.num_quantizers, mask)

    def encode(self, wav: jax.Array, num_quantizers: int) -> Quantized:
        """Audio [B, C, S] -> codes and quantized latents of the first `num_quantizers`."""
        return self.quantizer(self.latents(wav), num_quantizers)

    def latents(self, wav: jax.Array) -> jax.Array:
        """Audio [B, C, S], S a multiple of hop_length -> latents before quantization [B, T, D]."""
        return self.encoder(interleave(wav))[0]

    def decode(self, codes: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Codes [B, q, T] -> audio [B, C, S]; `mask`, bool [B, q], selects quantizers per item."""
        return self.audio(self.quantizer.decode(codes, mask))

    def dequantize(self, codes: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Codes [B, q, T] -> quantized latents [B, T, D]; `mask` as in `decode`."""
        return self.quantizer.decode(codes, mask)

    def encode_step(
        self,
        wav: jax.Array,
        num_quantizers: int,
        caches: Caches,
        span: Span,
    ) -> tuple[jax.Array, Caches]:
        """The next chunk [B, C, T * hop_length] of streams -> codes [B, Q, T] and next caches."""
        latents, caches = self.encoder(interleave(wav), caches, span)
        return self.quantizer(latents, num_quantizers).codes, caches

    def decode_step(
        self,
        codes: jax.Array,
        caches: Caches,
        span: Span,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, Caches]:
        """The next chunk [B, q, T] of streams -> [B, C, T * hop_length] and next caches."""
        stream, caches = self.decoder(self.quantizer.decode(codes, mask), caches, span)
        return deinterleave(stream, self.config.num_channels), caches

    def audio(self, latents: jax.Array) -> jax.Array:
        """Quantized latents [B, T, D] -> audio [B, C, S]."""
        return deinterleave(self.decoder(latents)[0], self.config.num_channels)
