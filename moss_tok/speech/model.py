"""A temporal Transformer over text and frames, and a depth Transformer over the codes of a frame.

A position has 1 + Q channels: a token of text, and a code per quantizer. The code K means that
there is no code. The input of a position is the sum of the embeddings of its channels. The depth
Transformer predicts the next position channel by channel, each from the temporal state and the
channels before it. It is causal over the channels and has no positional encoding.

Source: MossTTSDelayModel in moss_tts_local/ of OpenMOSS/MOSS-TTS.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from moss_tok.nn import blocks, rope
from moss_tok.nn.cache import Cache, Span, frame_positions
from moss_tok.nn.compute import ComputeConfig
from moss_tok.nn.layers import parameter, rms_norm
from moss_tok.speech.config import SpeechConfig

_HEAD_EPSILON = 1e-6  # of the norms before the heads; the official class has it fixed
_LANES = 128  # columns of a block that a TPU reads without waste


def _code_embeddings(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Initial embeddings of codes [Q, K + 1, D]; the row of the code K, no code, is 0."""
    return nn.initializers.normal(0.02)(key, shape, dtype).at[:, -1].set(0)


class ChannelAdapters(nn.Module):
    """A SwiGLU, a norm and a head per channel, which turn its depth states into logits."""

    config: SpeechConfig
    compute: ComputeConfig

    def setup(self) -> None:
        """Declares the parameters, those of all channels stacked."""
        c = self.config
        dtype = self.compute.dtype
        channels = c.num_channels
        wide = (channels, c.depth.model_dim, c.adapter_dim)
        axes = ("channels", "embed", "mlp")
        self.gate = parameter(self, "gate", wide, axes, 1, dtype, num_stacked=1)
        self.up = parameter(self, "up", wide, axes, 1, dtype, num_stacked=1)
        narrow = (channels, c.adapter_dim, c.temporal.model_dim)
        self.down = parameter(
            self, "down", narrow, ("channels", "mlp", "embed"), 1, dtype, num_stacked=1
        )
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("channels", "norm"))
        shape = (channels, c.temporal.model_dim)
        self.scale = self.param("scale", ones, shape, jnp.float32)
        shape = (c.temporal.model_dim, c.vocab_size)
        self.text_head = parameter(self, "text_head", shape, ("embed", "vocab"), 1, dtype)
        shape = (c.num_quantizers, c.temporal.model_dim, 1 + c.codebook_size)
        axes = ("quantizers", "embed", "codebook")
        self.code_heads = parameter(self, "code_heads", shape, axes, 1, dtype, num_stacked=1)

    def states(self, x: jax.Array, channel: slice | jax.Array) -> jax.Array:
        """Depth states [..., C, D] of the channels -> [..., C, D] before their heads."""
        precision = self.compute.precision
        gate = jnp.einsum("...cd,cdf->...cf", x, self.gate[channel], precision=precision)
        up = jnp.einsum("...cd,cdf->...cf", x, self.up[channel], precision=precision)
        product = nn.silu(gate) * up
        y = jnp.einsum("...cf,cfd->...cd", product, self.down[channel], precision=precision)
        y = y.astype(jnp.float32)
        y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + _HEAD_EPSILON)
        return (y * self.scale[channel]).astype(self.compute.dtype)

    def text_logits(self, x: jax.Array, tokens: Sequence[int] | None = None) -> jax.Array:
        """States [..., D] of the text channel -> float32 [..., V], or of some tokens only."""
        if tokens is None:
            return self._text_logits(x, self.text_head)
        # In blocks of columns, because to take single columns, the TPU compiler would transpose
        # the whole head for each frame.
        logits = []
        for token in tokens:
            start = token - token % _LANES
            block = self._text_logits(x, self.text_head[:, start : start + _LANES])
            logits.append(block[..., token - start])
        return jnp.stack(logits, axis=-1)

    def _text_logits(self, x: jax.Array, head: jax.Array) -> jax.Array:
        return jnp.einsum(
            "...d,dv->...v", x, head, precision=self.compute.precision,
            preferred_element_type=jnp.float32,
        )  # fmt: skip

    def code_logits(self, x: jax.Array, quantizers: slice | jax.Array) -> jax.Array:
        """States [..., Q, D] of quantizers -> float32 [..., Q, K + 1]."""
        return jnp.einsum(
            "...qd,qdk->...qk", x, self.code_heads[quantizers],
            precision=self.compute.precision, preferred_element_type=jnp.float32,
        )  # fmt: skip


class SpeechModel(nn.Module):
    """The temporal and the depth Transformer, the embeddings, the adapters and the heads."""

    config: SpeechConfig
    compute: ComputeConfig = ComputeConfig()

    def setup(self) -> None:
        """Declares the parameters."""
        c = self.config
        normal = nn.initializers.normal(0.02)
        shape = (c.vocab_size, c.temporal.model_dim)
        init = nn.with_logical_partitioning(normal, ("vocab", "embed"))
        self.text_embedding = self.param("text_embedding", init, shape, jnp.float32)
        shape = (c.num_quantizers, 1 + c.codebook_size, c.temporal.model_dim)
        axes = ("quantizers", "codebook", "embed")
        init = nn.with_logical_partitioning(_code_embeddings, axes)
        self.code_embeddings = self.param("code_embeddings", init, shape, jnp.float32)
        self.temporal = blocks.stack_blocks(c.temporal.block, c.temporal.num_layers, self.compute)
        self.temporal_norm = rms_norm(c.temporal.norm_epsilon)
        self.into_depth = blocks.SwiGLU(c.adapter_dim, c.depth.model_dim, self.compute)
        self.depth = blocks.stack_blocks(c.depth.block, c.depth.num_layers, self.compute)
        self.depth_norm = rms_norm(c.depth.norm_epsilon)
        self.out = ChannelAdapters(c, self.compute)

    def embed_codes(self, codes: jax.Array) -> jax.Array:
        """Codes [B, Q, T] of the first quantizers -> their embeddings [B, Q, T, D] float32.

        The embedding of the code K is not trained. It is the padding row of the official class.
        """
        levels = jnp.arange(codes.shape[1])[:, None]
        embedded = self.code_embeddings[levels, codes]
        is_none = (codes == self.config.codebook_size)[..., None]
        return jnp.where(is_none, jax.lax.stop_gradient(embedded), embedded)

    def embed(self, text: jax.Array, codes: jax.Array, in_use: jax.Array) -> jax.Array:
        """Inputs [B, T, D] of positions.

        Args:
          text: [B, T] tokens.
          codes: [B, Q, T].
          in_use: bool [B, Q]; the embeddings of other quantizers are not added.
        """
        embedded = self.embed_codes(codes)  # [B, Q, T, D]
        summed = jnp.where(in_use[..., None, None], embedded, 0).sum(1)  # not a rounded product
        return (self.text_embedding[text] + summed).astype(self.compute.dtype)

    def temporal_states(
        self, x: jax.Array, cache: Cache | None = None, span: Span | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """Inputs [B, T, D] -> states [B, T, D]; with a cache, they continue its sequences."""
        c = self.config
        positions = frame_positions(x.shape[1], span)
        table = rope.rope_table(positions, c.temporal.head_dim, c.rope_theta)
        x, fresh = self.temporal(x, cache, table, span)
        if cache is not None:
            cache = cache.write(span, fresh)
        return self.temporal_norm(x).astype(self.compute.dtype), cache

    def depth_states(
        self, x: jax.Array, cache: Cache | None = None, span: Span | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """Channel inputs [N, C, D] -> depth states [N, C, D of the depth blocks]; causal over C."""
        x = self.into_depth(x)
        x, fresh = self.depth(x, cache, None, span)
        if cache is not None:
            cache = cache.write(span, fresh)
        return self.depth_norm(x).astype(self.compute.dtype), cache

    def channel_states(
        self, states: jax.Array, next_text: jax.Array, next_codes: jax.Array
    ) -> jax.Array:
        """Depth states that predict the channels of the next positions, for teacher forcing.

        Args:
          states: [B, T, D] of `temporal_states`.
          next_text: [B, T] tokens of the positions after these.
          next_codes: [B, Q, T] codes of the positions after these.

        Returns:
          [B, T, C, D of the depth blocks].
        """
        batch, num_positions, width = states.shape
        embedded = self.embed_codes(next_codes[:, :-1])  # the last code predicts nothing
        channels = jnp.concatenate([
            states[:, :, None],
            self.text_embedding[next_text][:, :, None].astype(states.dtype),
            embedded.swapaxes(1, 2).astype(states.dtype),
        ], axis=2)  # [B, T, C, D]  # fmt: skip
        x = channels.reshape(batch * num_positions, -1, width)
        x, _ = self.depth_states(x)
        return x.reshape(batch, num_positions, *x.shape[1:])

    def head_states(self, x: jax.Array, channels: slice | jax.Array) -> jax.Array:
        """See `ChannelAdapters.states`."""
        return self.out.states(x, channels)

    def text_logits(self, x: jax.Array, tokens: Sequence[int] | None = None) -> jax.Array:
        """See `ChannelAdapters.text_logits`."""
        return self.out.text_logits(x, tokens)

    def code_logits(self, x: jax.Array, quantizers: slice | jax.Array) -> jax.Array:
        """See `ChannelAdapters.code_logits`."""
        return self.out.code_logits(x, quantizers)

    def logits(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits of the results of `channel_states`: float32 [B, T, V] and [B, Q, T, K + 1]."""
        x = self.head_states(x, slice(None))
        text = self.text_logits(x[:, :, 0])
        codes = self.code_logits(x[:, :, 1:], slice(None))
        return text, codes.swapaxes(1, 2)

    def __call__(
        self, text: jax.Array, codes: jax.Array, in_use: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Teacher-forced logits of positions 1 .. T - 1 from text [B, T] and codes [B, Q, T]."""
        x = self.embed(text[:, :-1], codes[:, :, :-1], in_use)
        states, _ = self.temporal_states(x)
        return self.logits(self.channel_states(states, text[:, 1:], codes[:, :, 1:]))
