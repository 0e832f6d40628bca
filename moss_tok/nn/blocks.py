"""Blocks of decoder-only language models: RMS norms, grouped queries, SwiGLU.

Source: Qwen2.5 (arXiv 2412.15115) has biases on q, k and v; Qwen3 (arXiv 2505.09388) normalizes the
heads of q and k instead. Details follow Qwen2ForCausalLM and Qwen3ForCausalLM of Hugging Face
Transformers.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from moss_tok import sharding
from moss_tok.errors import check_positive
from moss_tok.nn import attention, rope
from moss_tok.nn.cache import Cache, Span
from moss_tok.nn.compute import ComputeConfig
from moss_tok.nn.layers import parameter, rms_norm, scan_layers
from moss_tok.nn.products import einsum


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """The architecture of a block; ValueError if its values do not fit together.

    Attributes:
      model_dim: Width, D.
      num_heads: Query heads, N.
      num_kv_heads: Key and value heads; each is shared by a group of query heads.
      head_dim: Width of a head, H.
      mlp_dim: Width of the feed-forward layer, F.
      norm_epsilon: Epsilon of the RMS norms.
      qkv_bias: Whether q, k and v have biases, as in Qwen2.5.
      head_norm: Whether each head of q and k has an RMS norm, as in Qwen3.
    """

    model_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    norm_epsilon: float = 1e-6
    qkv_bias: bool = True
    head_norm: bool = False

    def __post_init__(self):
        check_positive(
            self, "model_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "norm_epsilon"
        )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")


class GroupedAttention(nn.Module):
    """Causal attention in which groups of query heads share keys and values."""

    config: BlockConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        table: jax.Array | None,
        past: Cache | None,
        span: Span | None,
    ) -> tuple[jax.Array, Cache | None]:
        """Attends over the frames of `x` and, with a cache, over the positions before them.

        Args:
          x: [B, T, D].
          table: Rotary phases, see `rope.rope_table`; None: no position embedding.
          past: For a chunk of sequences, one layer of the cache.
          span: For a chunk of sequences, its positions.

        Returns:
          [B, T, D]; and for a chunk its keys and values for the cache, else None.
        """
        c = self.config
        precision = self.compute.precision
        q = self._project("q", x, c.num_heads)
        k = self._project("k", x, c.num_kv_heads)
        v = self._project("v", x, c.num_kv_heads)
        if c.head_norm:
            q = rms_norm(c.norm_epsilon, "q_norm")(q).astype(x.dtype)
            k = rms_norm(c.norm_epsilon, "k_norm")(k).astype(x.dtype)
        if table is not None:
            q = rope.apply_rope(q, table)
            k = rope.apply_rope(k, table)
        group = c.num_heads // c.num_kv_heads

        def repeat_heads(x):
            return jnp.repeat(x, group, axis=1)  # [B, N, T, H]

        keys = repeat_heads(k)
        values = repeat_heads(v)
        if past is None:
            window = x.shape[1]
            implementation = self.compute.attention
            y = attention.attend(q, keys, values, window, implementation, precision)
            fresh = None
        else:
            cache = jax.tree.map(repeat_heads, past)
            y = attention.attend_cached(q, keys, values, cache, span.start, precision)
            fresh = past.fresh(span, k, v)
        shape = (c.num_heads, c.head_dim, c.model_dim)
        axes = ("heads", "head_dim", "embed")
        out = parameter(self, "out", shape, axes, 2, self.compute.dtype)
        return einsum("bnth,nhd->btd", y, out, precision), fresh

    def _project(self, name: str, x: jax.Array, num_heads: int) -> jax.Array:
        """[B, T, D] -> [B, num_heads, T, H]."""
        c = self.config
        dtype = self.compute.dtype
        axes = ("embed", "heads", "head_dim")
        shape = (c.model_dim, num_heads, c.head_dim)
        kernel = parameter(self, name, shape, axes, 1, dtype)
        y = einsum("btd,dnh->bnth", x, kernel, self.compute.precision)
        if not c.qkv_bias:
            return y
        bias = parameter(self, f"{name}_bias", shape[1:], axes[1:], 0, dtype)
        return y + bias[:, None]


class SwiGLU(nn.Module):
    """Feed-forward layer: down(silu(gate) * up)."""

    mlp_dim: int
    output_dim: int
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, output_dim]."""
        dtype = self.compute.dtype
        precision = self.compute.precision
        axes = ("embed", "mlp")
        shape = (x.shape[-1], self.mlp_dim)
        gate = parameter(self, "gate", shape, axes, 1, dtype)
        up = parameter(self, "up", shape, axes, 1, dtype)
        down = parameter(self, "down", (self.mlp_dim, self.output_dim), axes[::-1], 1, dtype)
        gated = einsum("btd,df->btf", x, gate, precision)
        widened = einsum("btd,df->btf", x, up, precision)
        return einsum("btf,fd->btd", nn.silu(gated) * widened, down, precision)


class Block(nn.Module):
    """Pre-norm block: attention, then the feed-forward layer."""

    config: BlockConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        past: Cache | None,
        table: jax.Array | None,
        span: Span | None,
    ) -> tuple[jax.Array, Cache | None]:
        """[B, T, D] -> [B, T, D], and the keys and values of a chunk, see `GroupedAttention`."""
        c = self.config
        x = sharding.split_items(x)
        y = rms_norm(c.norm_epsilon, "attention_norm")(x).astype(x.dtype)
        y, fresh = GroupedAttention(c, self.compute, name="attention")(y, table, past, span)
        x = x + y
        y = rms_norm(c.norm_epsilon, "mlp_norm")(x).astype(x.dtype)
        y = SwiGLU(c.mlp_dim, c.model_dim, self.compute, name="mlp")(y)
        return x + y, fresh


def stack_blocks(config: BlockConfig, num_layers: int, compute: ComputeConfig) -> nn.Module:
    """Blocks under one scan: (x, cache, RoPE table, span) -> (x, keys and values of the chunk)."""
    return scan_layers(Block, num_layers, compute.remat, compute.unroll_layers)(config, compute)


def empty_cache(
    config: BlockConfig,
    num_layers: int,
    compute: ComputeConfig,
    batch: int,
    size: int,
) -> Cache:
    """A cache of `size` positions at the start of `batch` sequences."""
    shape = (num_layers, batch, config.num_kv_heads, size, config.head_dim)
    keys = jnp.zeros(shape, compute.dtype)
    values = jnp.zeros(shape, compute.dtype)
    return Cache(keys, values)
