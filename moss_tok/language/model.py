"""A causal Transformer with the architecture of Qwen2.5, and a head through which it reads audio.

Each pre-norm block has an RMS norm, grouped-query attention with biases on q, k and v and rotary
positions on the halves of each head, another RMS norm, and SwiGLU. The output projection is tied to
the token embedding.

Source: arXiv 2412.15115, and Qwen2ForCausalLM of Hugging Face Transformers for the details.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from moss_tok.audio.manifest import TASKS
from moss_tok.language.config import LanguageConfig
from moss_tok.nn import blocks, rope
from moss_tok.nn.cache import Cache, Span, frame_positions
from moss_tok.nn.compute import ComputeConfig
from moss_tok.nn.layers import parameter, rms_norm


class LanguageModel(nn.Module):
    """Embedding, blocks under one scan, norm, and a tied output projection."""

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
        """Tokens [B, U] -> embeddings [B, U, D]."""
        return self.embedding[tokens].astype(self.compute.dtype)

    def __call__(
        self,
        x: jax.Array,
        cache: Cache | None = None,
        span: Span | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Maps embeddings [B, T, D] to hidden states [B, T, D], the input of `logits`.

        Args:
          x: Embeddings.
          cache: Keys and values of the earlier positions; None: the sequences start with `x`.
          span: With a cache, the positions of `x`.

        Returns:
          Hidden states, and the next cache (None without a cache).
        """
        positions = frame_positions(x.shape[1], span)
        table = rope.rope_table(positions, self.config.head_dim, self.config.rope_theta)
        x, fresh = self.layers(x, cache, table, span)
        if cache is not None:
            cache = cache.write(span, fresh)
        return self.norm(x).astype(x.dtype), cache

    def logits(self, x: jax.Array) -> jax.Array:
        """Hidden states [B, T, D] -> logits [B, T, V] float32."""
        embedding = self.embedding.astype(self.compute.dtype)
        return jnp.einsum(
            "btd,vd->btv",
            x,
            embedding,
            precision=self.compute.precision,
            preferred_element_type=jnp.float32,
        )


def empty_cache(config: LanguageConfig, compute: ComputeConfig, batch: int, size: int) -> Cache:
    """A cache of `size` positions at the start of `batch` sequences."""
    return blocks.empty_cache(config.block, config.num_layers, compute, batch, size)


class SemanticHead(nn.Module):
    """A language model with audio input: [task][audio][end][text] predicts [text][end]."""

    config: LanguageConfig
    compute: ComputeConfig = ComputeConfig()

    def setup(self) -> None:
        """Declares the parameters."""
        c = self.config
        self.model = LanguageModel(c, self.compute)
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("width", "embed"))
        self.tasks = self.param("tasks", init, (len(TASKS), c.model_dim), jnp.float32)
        shape = (c.latents_dim, c.model_dim)
        axes = ("width", "embed")
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
        """Mean cross-entropy, in nats per token, of each text and its end token given the audio.

        Args:
          latents: [B, T, latents_dim].
          num_frames: [B] valid frames.
          task: [B] indices into TASKS.
          text: [B, U] tokens.
          text_length: [B] valid tokens.

        Returns:
          [B] float32; entries past the lengths have no effect.
        """
        end = jnp.full((len(text), 1), self.config.end_id)
        tokens = jnp.concatenate([end, text], axis=1)  # [B, U + 1]
        prompt = self.prompt(latents, task)
        x = jnp.concatenate([prompt, self.model.embed(tokens)], axis=1)
        size = x.shape[1]
        position = jnp.arange(size)
        # Text directly follows the audio of its own item; the audio's padding moves to the end.
        padding = latents.shape[1] - num_frames[:, None]
        shifted = jnp.minimum(position + padding, size - 1)
        order = jnp.where(position <= num_frames[:, None], position, shifted)
        x = jnp.take_along_axis(x, order[..., None], axis=1)
        hidden, _ = self.model(x)
        number = jnp.arange(tokens.shape[1])
        token_position = 1 + num_frames[:, None] + number
        hidden = jnp.take_along_axis(hidden, token_position[..., None], axis=1)
        logits = self.model.logits(hidden)
        # The target after the last text token is the end token.
        targets = jnp.concatenate([text, end], axis=1)
        targets = jnp.where(number == text_length[:, None], self.config.end_id, targets)
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        is_valid = number <= text_length[:, None]
        return jnp.where(is_valid, entropy, 0).sum(-1) / (1 + text_length)

    def prompt(self, latents: jax.Array, task: jax.Array) -> jax.Array:
        """Embeds a task and audio: latents [B, T, latents_dim], task [B] -> [B, 1 + T, D]."""
        dtype = self.compute.dtype
        precision = self.compute.precision
        latents = latents.astype(dtype)
        audio = jnp.einsum("bti,id->btd", latents, self.projection, precision=precision)
        audio = audio + self.bias
        task_embedding = self.tasks[task][:, None].astype(dtype)
        return jnp.concatenate([task_embedding, audio], axis=1)

    def extend(self, x: jax.Array, cache: Cache, span: Span) -> tuple[jax.Array, Cache]:
        """Continues cached sequences: embeddings [B, T, D] -> hidden [B, T, D] and next cache."""
        return self.model(x, cache, span)

    def next_logits(self, tokens: jax.Array, cache: Cache, span: Span) -> tuple[jax.Array, Cache]:
        """Continues cached sequences: tokens [B] -> logits of the next [B, V] and next cache."""
        x = self.model.embed(tokens[:, None])
        x, cache = self.model(x, cache, span)
        return self.model.logits(x)[:, 0], cache
