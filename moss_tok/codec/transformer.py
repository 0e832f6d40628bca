"""A causal Transformer stage of a codec: pre-norm blocks under one scan, between projections."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from moss_tok import sharding
from moss_tok.codec.config import TransformerConfig
from moss_tok.nn import attention, rope
from moss_tok.nn.cache import Cache, Span, frame_positions
from moss_tok.nn.compute import ComputeConfig
from moss_tok.nn.layers import Projection, gelu, parameter, scan_layers
from moss_tok.nn.products import einsum


class SelfAttention(nn.Module):
    """Multi-head attention over a causal window, with rotary position embedding."""

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
        """Attends over the frames of `x` and, with a cache, over the frames before them.

        Args:
          x: [B, T, D].
          table: Rotary phases of the frames, see `rope.rope_table`.
          past: For a chunk of streams, one layer of the cache.
          span: For a chunk of streams, its frames.
          scale: [D], multiplied into the output weights.

        Returns:
          [B, T, D]; and for a chunk of streams its keys and values for the cache, else None.
        """
        c = self.config
        dtype = self.compute.dtype
        precision = self.compute.precision
        d = c.model_dim
        n = c.num_heads
        h = c.head_dim
        axes = ("embed", "qkv", "heads", "head_dim")
        qkv = parameter(self, "qkv", (d, 3, n, h), axes, 1, dtype)
        out = parameter(self, "out", (n, h, d), ("heads", "head_dim", "embed"), 2, dtype, scale)
        # Three products, because TPUs would copy the parts of a single one.
        q = einsum("btd,dnh->bnth", x, qkv[:, 0], precision)
        k = einsum("btd,dnh->bnth", x, qkv[:, 1], precision)
        v = einsum("btd,dnh->bnth", x, qkv[:, 2], precision)
        q = rope.apply_rope(q, table)
        k = rope.apply_rope(k, table)
        if past is None:
            x = attention.attend(q, k, v, self.window, self.compute.attention, precision)
            fresh = None
        else:
            x = attention.attend_cached(q, k, v, past, span.start, precision)
            fresh = past.fresh(span, k, v)
        return einsum("bnth,nhd->btd", x, out, precision), fresh


class FeedForward(nn.Module):
    """Feed-forward layer: linear, exact GELU, linear."""

    config: TransformerConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x: jax.Array, scale: jax.Array | None) -> jax.Array:
        """[B, T, D] -> [B, T, D]; `scale` [D] is multiplied into the output weights."""
        c = self.config
        dtype = self.compute.dtype
        precision = self.compute.precision
        up = parameter(self, "up", (c.model_dim, c.mlp_dim), ("embed", "mlp"), 1, dtype)
        down = parameter(self, "down", (c.mlp_dim, c.model_dim), ("mlp", "embed"), 1, dtype, scale)
        x = einsum("btd,df->btf", x, up, precision)  # [B, T, F]
        x = gelu(x)
        return einsum("btf,fd->btd", x, down, precision)


class Block(nn.Module):
    """Pre-norm block; a LayerScale vector scales each of the two branches."""

    config: TransformerConfig
    compute: ComputeConfig
    window: int

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        past: Cache | None,
        table: jax.Array,
        span: Span | None,
    ) -> tuple[jax.Array, Cache | None]:
        """[B, T, D] -> [B, T, D], and the keys and values of a chunk as in `SelfAttention`."""
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
        weight_scale, output_scale = self._layer_scale("attention_scale")
        attend = SelfAttention(self.config, self.compute, self.window, name="attention")
        y, fresh = attend(y, table, past, span, weight_scale)
        x = x + y * output_scale
        y = norm(name="mlp_norm")(x).astype(self.compute.dtype)
        weight_scale, output_scale = self._layer_scale("mlp_scale")
        y = FeedForward(self.config, self.compute, name="mlp")(y, weight_scale)
        return x + y * output_scale, fresh

    def _layer_scale(self, name: str) -> tuple[jax.Array | None, jax.Array | int]:
        """The scale of the branch's output weights, and the scale of its output.

        LayerScale is folded into the output weights if these are cast anyway. Its gradient is then
        computed from the gradient of the weights, which saves activation memory.
        """
        init = nn.initializers.constant(self.config.layer_scale)
        init = nn.with_logical_partitioning(init, ("norm",))
        scale = self.param(name, init, (self.config.model_dim,), jnp.float32)
        return (None, scale) if self.compute.dtype == "float32" else (scale, 1)


class LongChunkBlock(Block):
    """A block that updates its layer of the cache in place; the scan carries the cache.

    This avoids a second copy of the cache. Short chunks, which change little of the cache, are
    faster with `Block`.
    """

    def __call__(
        self,
        carry: tuple[jax.Array, Cache],
        index: jax.Array,
        table: jax.Array,
        span: Span,
    ) -> tuple[tuple[jax.Array, Cache], None]:
        """Updates the carry: [B, T, D], and the cache of all layers; this is layer `index`."""
        x, cache = carry
        x, fresh = super().__call__(x, cache.layer(index), table, span)
        return (x, cache.replace_layer(index, fresh)), None


class Stage(nn.Module):
    """Optional input projection, `num_layers` blocks, optional output projection."""

    config: TransformerConfig
    compute: ComputeConfig
    window: int

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cache: Cache | None = None,
        span: Span | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """[B, T, input_dim] -> [B, T, output_dim], and the next cache (None without a cache).

        The result is float32 if the stage has an output projection. With a cache, `x` is a chunk of
        streams with the frames of `span`.
        """
        c = self.config
        x = x.astype(self.compute.dtype)
        if c.input_projection:
            axes = ("width", "embed")
            x = Projection(c.model_dim, axes, self.compute, name="input_projection")(x)
        positions = frame_positions(x.shape[1], span)
        table = rope.rope_table(positions, c.head_dim, c.max_period)
        block_args = (c, self.compute, self.window)
        if cache is not None and x.shape[1] > cache.num_frames:
            layers = scan_layers(LongChunkBlock, c.num_layers)(*block_args, name="layers")
            (x, cache), _ = layers((x, cache), jnp.arange(c.num_layers), table, span)
        else:
            # The cache is read layer by layer and written once, so no copy of it is needed.
            layers = scan_layers(
                Block, c.num_layers, self.compute.remat, self.compute.unroll_layers
            )
            x, fresh = layers(*block_args, name="layers")(x, cache, table, span)
            if cache is not None:
                cache = cache.write(span, fresh)
        if c.output_projection:
            axes = ("embed", "width")
            # In float32, because bfloat16 has 8 bits of precision and audio needs more.
            args = (c.output_dim, axes, self.compute, jnp.float32)
            x = Projection(*args, name="output_projection")(x)
        return x, cache
