"""A causal Transformer of the Qwen2.5 shape, and the head that makes it read audio.

Blocks are pre-norm: RMS norm, attention with grouped queries, biases on q, k and v, and rotary
positions on the halves of each head; RMS norm, SwiGLU. The embedding of tokens is also the output.

Source: arXiv 2412.15115, and Qwen2ForCausalLM of Hugging Face Transformers for the details.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from moss_tok import sharding
from moss_tok.audio.manifest import TASKS
from moss_tok.language.config import LanguageConfig
from moss_tok.nn import attention, rope
from moss_tok.nn.cache import Cache, Span
from moss_tok.nn.compute import ComputeConfig
from moss_tok.nn.layers import parameter, scan_layers


class Norm(nn.Module):
    """RMS norm in float32."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D] in x's dtype."""
        init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale = self.param("scale", init, x.shape[-1:], jnp.float32)
        y = x.astype(jnp.float32)
        y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        return (y * scale).astype(x.dtype)


class GroupedAttention(nn.Module):
    """Causal attention whose query heads share keys and values in groups."""

    config: LanguageConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, table: jax.Array, past: Cache | None, span: Span | None
    ) -> tuple[jax.Array, Cache | None]:
        """[B, T, D], rope table -> [B, T, D]; with a past also the chunk's keys and values."""
        c, dtype, precision = self.config, self.compute.dtype, self.compute.precision
        heads = {"q": c.num_heads, "k": c.num_kv_heads, "v": c.num_kv_heads}
        projected = {}
        for name, n in heads.items():
            axes = ("embed", "heads", "head_dim")
            kernel = parameter(self, name, (c.model_dim, n, c.head_dim), axes, 1, dtype)
            bias = parameter(self, f"{name}_bias", (n, c.head_dim), axes[1:], 0, dtype)
            y = jnp.einsum("btd,dnh->bnth", x, kernel, precision=precision)
            projected[name] = y + bias[:, None]
        q, k = (rope.apply_rope(projected[name], table) for name in "qk")
        v, group = projected["v"], c.num_heads // c.num_kv_heads

        def shared(x):
            return jnp.repeat(x, group, axis=1)  # [B, N, T, H]

        if past is None:
            y = attention.attend(
                q, shared(k), shared(v), x.shape[1], self.compute.attention, precision
            )
        else:
            before = jax.tree.map(shared, past)
            y = attention.attend_cached(q, shared(k), shared(v), before, span.start, precision)
        fresh = None if past is None else past.fresh(span, k, v)
        shape = (c.num_heads, c.head_dim, c.model_dim)
        out = parameter(self, "out", shape, ("heads", "head_dim", "embed"), 2, dtype)
        return jnp.einsum("bnth,nhd->btd", y, out, precision=precision), fresh


class SwiGLU(nn.Module):
    """Feed-forward layer: down(silu(gate) * up)."""

    config: LanguageConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        c, dtype, precision = self.config, self.compute.dtype, self.compute.precision
        shape, axes = (c.model_dim, c.mlp_dim), ("embed", "mlp")
        gate, up = (parameter(self, name, shape, axes, 1, dtype) for name in ("gate", "up"))
        down = parameter(self, "down", shape[::-1], axes[::-1], 1, dtype)
        gate, up = (jnp.einsum("btd,df->btf", x, w, precision=precision) for w in (gate, up))
        return jnp.einsum("btf,fd->btd", nn.silu(gate) * up, down, precision=precision)


class Block(nn.Module):
    """Pre-norm block."""

    config: LanguageConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, past: Cache | None, table: jax.Array, span: Span | None
    ) -> tuple[jax.Array, Cache | None]:
        """[B, T, D] -> [B, T, D]; with a past also the chunk's keys and values."""
        c, compute = self.config, self.compute
        x = sharding.split_items(x)
        y = Norm(c.norm_epsilon, name="attention_norm")(x)
        y, fresh = GroupedAttention(c, compute, name="attention")(y, table, past, span)
        x = x + y
        y = Norm(c.norm_epsilon, name="mlp_norm")(x)
        return x + SwiGLU(c, compute, name="mlp")(y), fresh


class LanguageModel(nn.Module):
    """Embedding, blocks under one scan, norm; the embedding once more as output."""

    config: LanguageConfig
    compute: ComputeConfig = ComputeConfig()

    def setup(self) -> None:
        """Declares the parameters."""
        c = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        self.embedding = self.param("embedding", init, (c.vocab_size, c.model_dim), jnp.float32)
        self.layers = scan_layers(Block, c.num_layers, self.compute.remat)(c, self.compute)
        self.norm = Norm(c.norm_epsilon)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Tokens [B, U] -> [B, U, D]."""
        return self.embedding[tokens].astype(self.compute.dtype)

    def __call__(
        self, x: jax.Array, cache: Cache | None = None, span: Span | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """Embeddings [B, T, D] -> [B, T, D] before `logits`; with a cache, what follows on it."""
        positions = jnp.arange(x.shape[1])
        if span is not None:
            positions = span.start[:, None, None] + positions  # [B, 1, T]
        table = rope.rope_table(positions, self.config.head_dim, self.config.rope_theta)
        x, fresh = self.layers(x, cache, table, span)
        if cache is not None:
            cache = cache.write(span, fresh)
        return self.norm(x), cache

    def logits(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> float32 [B, T, V]."""
        embedding = self.embedding.astype(self.compute.dtype)
        return jnp.einsum(
            "btd,vd->btv", x, embedding, precision=self.compute.precision,
            preferred_element_type=jnp.float32,
        )  # fmt: skip


def empty_cache(config: LanguageConfig, compute: ComputeConfig, batch: int, size: int) -> Cache:
    """A cache of `size` positions for `batch` texts that have not begun."""
    shape = (config.num_layers, batch, config.num_kv_heads, size, config.head_dim)
    return Cache(*(jnp.zeros(shape, compute.dtype) for _ in range(2)))


class SemanticHead(nn.Module):
    """The language model reads [task][audio frames][end][text] and predicts [text][end]."""

    config: LanguageConfig
    compute: ComputeConfig = ComputeConfig()

    def setup(self) -> None:
        """Declares the parameters."""
        c = self.config
        self.model = LanguageModel(c, self.compute)
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("width", "embed"))
        self.tasks = self.param("tasks", init, (len(TASKS), c.model_dim), jnp.float32)
        shape, axes = (c.latents_dim, c.model_dim), ("width", "embed")
        self.projection = parameter(self, "projection", shape, axes, 1, self.compute.dtype)
        self.bias = parameter(self, "bias", shape[1:], axes[1:], 0, self.compute.dtype)

    def __call__(
        self,
        latents: jax.Array,
        num_frames: jax.Array,
        task: jax.Array,
        text: jax.Array,
        text_length: jax.Array,
    ) -> jax.Array:
        """Mean cross-entropy, in nats, of the text and its end given the audio before it.

        Args:
          latents: [B, T, D of the codec].
          num_frames: [B], how many of them are audio.
          task: [B] indices into TASKS.
          text: [B, U] tokens.
          text_length: [B], how many of them are text.

        Returns:
          [B] float32; it does not depend on what lies past the lengths.
        """
        end = jnp.full((len(text), 1), self.config.end_id)
        tokens = jnp.concatenate([end, text], axis=1)  # [B, U + 1]
        x = jnp.concatenate([self.prompt(latents, task), self.model.embed(tokens)], axis=1)
        size, place = x.shape[1], jnp.arange(x.shape[1])
        # Text follows its own audio, not the batch's longest: padding goes to the end.
        padding = latents.shape[1] - num_frames[:, None]
        shifted = jnp.minimum(place + padding, size - 1)
        order = jnp.where(place <= num_frames[:, None], place, shifted)
        hidden, _ = self.model(jnp.take_along_axis(x, order[..., None], axis=1))
        number = jnp.arange(tokens.shape[1])
        last = 1 + num_frames[:, None] + number  # where each token stands
        logits = self.model.logits(jnp.take_along_axis(hidden, last[..., None], axis=1))
        # The end has the place after the last token.
        targets = jnp.concatenate([text, end], axis=1)
        targets = jnp.where(number == text_length[:, None], self.config.end_id, targets)
        entropy = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(
            logits, targets[..., None], axis=-1
        ).squeeze(-1)
        counted = number <= text_length[:, None]
        return jnp.where(counted, entropy, 0).sum(-1) / (1 + text_length)

    def prompt(self, latents: jax.Array, task: jax.Array) -> jax.Array:
        """[B, T, D of the codec], [B] -> [B, 1 + T, D]: the task and the audio."""
        dtype, precision = self.compute.dtype, self.compute.precision
        audio = jnp.einsum("bti,id->btd", latents.astype(dtype), self.projection,
                           precision=precision) + self.bias  # fmt: skip
        return jnp.concatenate([self.tasks[task][:, None].astype(dtype), audio], axis=1)

    def extend(self, x: jax.Array, cache: Cache, span: Span) -> tuple[jax.Array, Cache]:
        """Embeddings [B, T, D] after what the cache holds -> hidden [B, T, D], the next cache."""
        return self.model(x, cache, span)

    def next_logits(self, tokens: jax.Array, cache: Cache, span: Span) -> tuple[jax.Array, Cache]:
        """Tokens [B] after what the cache holds -> logits [B, V] of the next, the next cache."""
        x, cache = self.model(self.model.embed(tokens[:, None]), cache, span)
        return self.model.logits(x)[:, 0], cache
