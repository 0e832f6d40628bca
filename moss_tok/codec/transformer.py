"""A causal Transformer stage of a codec: projections around pre-norm blocks under one scan."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from moss_tok import sharding
from moss_tok.codec.config import TransformerConfig
from moss_tok.nn import attention, rope
from moss_tok.nn.cache import Cache, Span
from moss_tok.nn.compute import ComputeConfig
from moss_tok.nn.layers import Projection, gelu, parameter, scan_layers


class SelfAttention(nn.Module):
    """Multi-head attention over a causal window, with rotary positions."""

    config: TransformerConfig
    compute: ComputeConfig
    window: int

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        table: jax.Array,
        past: Cache | None,
        span: Span | None,
        scale: jax.Array | None,
    ) -> tuple[jax.Array, Cache | None]:
        """[B, T, D], rope table -> [B, T, D]; of streams also the keys and values of the chunk.

        `scale` [D] of `parameter`, for the last weights.
        """
        c, dtype, precision = self.config, self.compute.dtype, self.compute.precision
        d, n, h = c.model_dim, c.num_heads, c.head_dim
        axes = ("embed", "qkv", "heads", "head_dim")
        qkv = parameter(self, "qkv", (d, 3, n, h), axes, 1, dtype)
        out = parameter(self, "out", (n, h, d), ("heads", "head_dim", "embed"), 2, dtype, scale)
        # Three products, not one: TPUs would write its result again, part by part.
        q, k, v = (jnp.einsum("btd,dnh->bnth", x, qkv[:, i], precision=precision) for i in range(3))
        q, k = rope.apply_rope(q, table), rope.apply_rope(k, table)
        if past is None:
            x = attention.attend(q, k, v, self.window, self.compute.attention, precision)
        else:
            x = attention.attend_cached(q, k, v, past, span.start, precision)
        fresh = None if past is None else past.fresh(span, k, v)
        return jnp.einsum("bnth,nhd->btd", x, out, precision=precision), fresh


class FeedForward(nn.Module):
    """Linear, exact GELU, linear."""

    config: TransformerConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x: jax.Array, scale: jax.Array | None) -> jax.Array:
        """[B, T, D] -> [B, T, D]; `scale` [D] of `parameter`, for the last weights."""
        c, dtype, precision = self.config, self.compute.dtype, self.compute.precision
        up = parameter(self, "up", (c.model_dim, c.mlp_dim), ("embed", "mlp"), 1, dtype)
        down = parameter(self, "down", (c.mlp_dim, c.model_dim), ("mlp", "embed"), 1, dtype, scale)
        x = jnp.einsum("btd,df->btf", x, up, precision=precision)  # [B, T, F]
        x = gelu(x)
        return jnp.einsum("btf,fd->btd", x, down, precision=precision)


class Block(nn.Module):
    """Pre-norm block; both branches are scaled by a LayerScale vector."""

    config: TransformerConfig
    compute: ComputeConfig
    window: int

    @nn.compact
    def __call__(
        self, x: jax.Array, past: Cache | None, table: jax.Array, span: Span | None
    ) -> tuple[jax.Array, Cache | None]:
        """[B, T, D] -> [B, T, D]; of streams also the keys and values of the chunk."""
        args = (self.config, self.compute)
        norm = functools.partial(
            nn.LayerNorm,
            epsilon=1e-5,
            dtype=jnp.float32,
            use_fast_variance=False,
            scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
            bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
        )
        x = sharding.split_items(x)
        y = norm(name="attention_norm")(x).astype(self.compute.dtype)
        inner, outer = self._layer_scale("attention_scale")
        attend = SelfAttention(*args, self.window, name="attention")
        y, fresh = attend(y, table, past, span, inner)
        x = x + y * outer
        y = norm(name="mlp_norm")(x).astype(self.compute.dtype)
        inner, outer = self._layer_scale("mlp_scale")
        y = FeedForward(*args, name="mlp")(y, inner)
        return x + y * outer, fresh

    def _layer_scale(self, name: str) -> tuple[jax.Array | None, jax.Array | int]:
        """What the branch's last weights are multiplied with, and what it is multiplied with.

        Weights that are cast anyway take the scale along: then its gradient is one of weights, and
        nothing of the branch is kept for it, which is less memory traffic.
        """
        init = nn.initializers.constant(self.config.layer_scale)
        init = nn.with_logical_partitioning(init, ("norm",))
        scale = self.param(name, init, (self.config.model_dim,), jnp.float32)
        return (None, scale) if self.compute.dtype == "float32" else (scale, 1)


class LongChunkBlock(Block):
    """A block that puts its layer of the cache, which is carried along, in place.

    So there is one cache, not two. Short chunks, which change little of it, are faster without.
    """

    def __call__(
        self, carry: tuple[jax.Array, Cache], index: jax.Array, table: jax.Array, span: Span
    ) -> tuple[tuple[jax.Array, Cache], None]:
        """[B, T, D] and the cache of all layers, of which this is `index` -> the next ones."""
        x, cache = carry
        x, fresh = super().__call__(x, cache.layer(index), table, span)
        return (x, cache.replace_layer(index, fresh)), None


class Stage(nn.Module):
    """Input projection, `num_layers` blocks, output projection."""

    config: TransformerConfig
    compute: ComputeConfig
    window: int

    @nn.compact
    def __call__(
        self, x: jax.Array, cache: Cache | None = None, span: Span | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """[B, T, input_dim] -> [B, T, output_dim], in float32 if it has an output projection.

        With a cache, the frames of `span`, which go into it.
        """
        c = self.config
        x = x.astype(self.compute.dtype)
        if c.input_projection:
            axes = ("width", "embed")
            x = Projection(c.model_dim, axes, self.compute, name="input_projection")(x)
        positions = jnp.arange(x.shape[1])
        if span is not None:
            positions = span.start[:, None, None] + positions  # [B, 1, T]
        table = rope.rope_table(positions, c.head_dim, c.max_period)
        of_block = (c, self.compute, self.window)
        if cache is not None and x.shape[1] > cache.num_frames:
            layers = scan_layers(LongChunkBlock, c.num_layers)(*of_block, name="layers")
            (x, cache), _ = layers((x, cache), jnp.arange(c.num_layers), table, span)
        else:
            # The cache is read layer by layer and written once, so that it need not be copied.
            layers = scan_layers(Block, c.num_layers, self.compute.remat)
            x, fresh = layers(*of_block, name="layers")(x, cache, table, span)
            cache = None if cache is None else cache.write(span, fresh)
        if c.output_projection:
            axes = ("embed", "width")
            args = (c.output_dim, axes, self.compute, jnp.float32)  # audio has more than 8 bits
            x = Projection(*args, name="output_projection")(x)
        return x, cache
