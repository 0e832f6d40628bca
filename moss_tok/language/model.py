"""A causal Transformer of the Qwen2.5 shape, and the head that makes it read audio.

Blocks are pre-norm: RMS norm, attention with grouped queries, biases on q, k and v, and rotary
positions on the halves of each head; RMS norm, SwiGLU. The embedding of tokens is also the output.

Source: arXiv 2412.15115, and Qwen2ForCausalLM of Hugging Face Transformers for the details.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from moss_tok.audio.manifest import TASKS
from moss_tok.language.config import LanguageConfig
from moss_tok.nn import blocks, rope
from moss_tok.nn.cache import Cache, Span
from moss_tok.nn.compute import ComputeConfig
from moss_tok.nn.layers import parameter, rms_norm


class LanguageModel(nn.Module):
    """Embedding, blocks under one scan, norm; the embedding once more as output."""

    config: LanguageConfig
    compute: ComputeConfig = ComputeConfig()

    def setup(self) -> None:
        """Declares the parameters."""
        c = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        self.embedding = self.param("embedding", init, (c.vocab_size, c.model_dim), jnp.float32)
        self.layers = blocks.stack_blocks(c.block, c.num_layers, self.compute)
        self.norm = rms_norm(c.norm_epsilon)

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
        return self.norm(x).astype(x.dtype), cache

    def logits(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> float32 [B, T, V]."""
        embedding = self.embedding.astype(self.compute.dtype)
        return jnp.einsum(
            "btd,vd->btv", x, embedding, precision=self.compute.precision,
            preferred_element_type=jnp.float32,
        )  # fmt: skip


def empty_cache(config: LanguageConfig, compute: ComputeConfig, batch: int, size: int) -> Cache:
    """A cache of `size` positions for `batch` texts that have not begun."""
    return blocks.empty_cache(config.block, config.num_layers, compute, batch, size)


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
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
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
