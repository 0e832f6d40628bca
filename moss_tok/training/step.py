"""One training step as one jitted, donated function."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moss_tok.codec.model import CodecModel
from moss_tok.codec.quantizer import Quantized
from moss_tok.config import CodecConfig, TrainConfig
from moss_tok.training import losses
from moss_tok.training.state import TrainState, learning_rate, optimizer

_COUNT_DECAY = 0.98  # code_counts remember about 50 steps
_DEAD_SHARE = 0.1  # of the use a code would have if all were used alike


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def train_step(
    config: TrainConfig, codec: CodecConfig, state: TrainState, batch: dict[str, jax.Array]
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Updates `state` on a batch.

    Args:
      config: The run.
      codec: The model.
      state: Donated.
      batch: "wav" [B, C, S], S whole frames, and "length" [B] valid samples.

    Returns:
      The next state, and scalars: each loss, gradient_norm, learning_rate, codebook_perplexity.
    """
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    key, dropout_key, reseed_key = jax.random.split(key, 3)
    keep = _quantizer_dropout(config, codec, dropout_key, batch["length"].shape[0])
    parts = jax.tree.map(
        lambda x: x.reshape(config.num_microbatches, -1, *x.shape[1:]), (batch, keep)
    )
    grad = jax.value_and_grad(functools.partial(_loss, config, codec), has_aux=True)

    def accumulate(total, part):
        (_, (terms, quantized)), gradient = grad(state.params, *part)
        return jax.tree.map(jnp.add, total, (gradient, terms)), quantized

    zeros = jax.tree.map(jnp.zeros_like, state.params), dict.fromkeys(_TERMS, jnp.zeros(()))
    totals, (codes, projected) = jax.lax.scan(accumulate, zeros, parts)
    gradient, terms = jax.tree.map(lambda x: x / config.num_microbatches, totals)
    updates, opt_state = optimizer(config).update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    counts = _COUNT_DECAY * state.code_counts + _histogram(codes, codec.quantizer.codebook_size)
    metrics = terms | {
        "gradient_norm": optax.tree.norm(gradient),
        "learning_rate": learning_rate(config)(state.step),
        "codebook_perplexity": _perplexity(counts).mean(),
    }
    if config.reseed_every:
        due = state.step % config.reseed_every == 0
        codebooks, counts = jax.lax.cond(
            due, _reseed, lambda *x: x[:2], params["quantizer"]["codebooks"], counts, projected,
            reseed_key,
        )  # fmt: skip
        params = params | {"quantizer": params["quantizer"] | {"codebooks": codebooks}}
    return TrainState(state.step + 1, params, opt_state, counts), metrics


_TERMS = ("loss", "reconstruction_loss", "commitment_loss", "codebook_loss")


def _loss(config: TrainConfig, codec: CodecConfig, params: Any, batch, keep) -> tuple[Any, Any]:
    """The generator's loss; also its terms, and (codes [B, Q, T], projected [Q, B, T, c])."""
    wav, lengths = batch["wav"], batch["length"]
    model = CodecModel(codec, config.compute)
    wav_hat, quantized = model.apply({"params": params}, wav, keep)
    reconstruction = losses.reconstruction_loss(wav, wav_hat, lengths, codec.sample_rate)
    terms = {"reconstruction_loss": reconstruction}
    terms |= losses.quantizer_losses(quantized, keep, lengths, codec.hop_length)
    terms = {name: x.mean() for name, x in terms.items()}
    terms["loss"] = (
        config.reconstruction_weight * terms["reconstruction_loss"]
        + config.commitment_weight * terms["commitment_loss"]
        + config.codebook_weight * terms["codebook_loss"]
    )
    return terms["loss"], (terms, _detached(quantized))


def _detached(quantized: Quantized) -> tuple[jax.Array, jax.Array]:
    return quantized.codes, jax.lax.stop_gradient(quantized.projected)


def _quantizer_dropout(
    config: TrainConfig, codec: CodecConfig, key: jax.Array, batch_size: int
) -> jax.Array:
    """Which quantizers each item uses: all, or with quantizer_dropout the first 1..Q; [B, Q]."""
    most = codec.quantizer.num_quantizers
    number_key, share_key = jax.random.split(key)
    number = jax.random.randint(number_key, (batch_size,), 1, most + 1)
    drop = jax.random.uniform(share_key, (batch_size,)) < config.quantizer_dropout
    return jnp.arange(most) < jnp.where(drop, number, most)[:, None]


def _histogram(codes: jax.Array, codebook_size: int) -> jax.Array:
    """Codes [M, B, Q, T] of M microbatches to counts [Q, K]."""
    codes = jnp.moveaxis(codes, 2, 0).reshape(codes.shape[2], -1)
    count = functools.partial(jnp.bincount, length=codebook_size)
    return jax.vmap(count)(codes).astype(jnp.float32)


def _perplexity(counts: jax.Array) -> jax.Array:
    share = counts / counts.sum(-1, keepdims=True)
    return jnp.exp(-jnp.sum(share * jnp.log(share + 1e-20), -1))


def _reseed(
    codebooks: jax.Array, counts: jax.Array, projected: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Moves codes that are hardly used onto vectors of this batch.

    Args:
      codebooks: [Q, K, c].
      counts: [Q, K].
      projected: What was quantized, [M, Q, B, T, c].
      key: For the choice.
    """
    projected = jnp.moveaxis(projected, 0, 1)
    projected = projected.reshape(codebooks.shape[0], -1, codebooks.shape[-1])
    chosen = jax.random.randint(key, codebooks.shape[:2], 0, projected.shape[1])
    fresh = jnp.take_along_axis(projected, chosen[..., None], axis=1)
    expected = counts.sum(-1, keepdims=True) / codebooks.shape[1]
    dead = counts < _DEAD_SHARE * expected
    return jnp.where(dead[..., None], fresh, codebooks), jnp.where(dead, expected, counts)
