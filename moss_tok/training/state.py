"""The train state: everything a step changes, as one pytree."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from moss_tok.codec.model import CodecModel
from moss_tok.config import CodecConfig, TrainConfig


@flax.struct.dataclass
class TrainState:
    """Parameters and all that goes with them.

    Attributes:
      step: int32 scalar; also the data position: batches consumed.
      params: Of the codec, float32.
      opt_state: Of the optimizer.
      code_counts: [Q, K] float32, how often each code was used lately.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    code_counts: jax.Array


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up, then constant or a cosine down to 0 at `decay_steps`."""
    peak, warmup, decay = config.learning_rate, config.warmup_steps, config.decay_steps
    rise = optax.linear_schedule(peak / max(1, warmup), peak, max(1, warmup) - 1)
    if not decay:
        return rise
    fall = optax.cosine_decay_schedule(peak, max(1, decay - warmup))
    return optax.join_schedules([rise, fall], [warmup])


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW with clipping by global norm; the codebooks may have a learning rate of their own."""

    def adamw(factor: float) -> optax.GradientTransformation:
        schedule = learning_rate(config)
        return optax.adamw(
            lambda step: factor * schedule(step),
            config.beta1,
            config.beta2,
            weight_decay=config.weight_decay,
            mask=_is_matrix,
        )

    groups = {"codebooks": adamw(config.codebook_learning_rate), "network": adamw(1.0)}
    return optax.chain(
        optax.clip_by_global_norm(config.gradient_clip), optax.partition(groups, _group)
    )


def _is_matrix(params: Any) -> Any:
    names = ("kernel", "qkv", "out", "up", "down")
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in names, params)


def _group(params: Any) -> Any:
    def name(path, _):
        return "codebooks" if path[-1].key == "codebooks" else "network"

    return jax.tree_util.tree_map_with_path(name, params)


def init_state(config: TrainConfig, codec: CodecConfig) -> TrainState:
    """A fresh state; a pure function of the configs."""
    model = CodecModel(codec, config.compute)
    wav = jnp.zeros((1, codec.num_channels, codec.hop_length))
    key = jax.random.key(config.seed)
    params = nn.meta.unbox(model.init(key, wav)["params"])
    params = params | {"quantizer": _paired(params["quantizer"], jax.random.fold_in(key, 1))}
    quantizer = codec.quantizer
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer(config).init(params),
        code_counts=jnp.zeros((quantizer.num_quantizers, quantizer.codebook_size)),
    )


def _paired(quantizer: dict[str, Any], key: jax.Array) -> dict[str, Any]:
    """Makes every projection orthonormal and the one that undoes it its transpose.

    With unrelated projections a code's value does not resemble the residual it stands for, and the
    losses grow instead of falling. Codebooks start small for the same reason.
    """
    quantizer = quantizer | {"codebooks": 0.1 * quantizer["codebooks"]}
    for down, up in (("input_projection", "output_projection"),
                     ("in_projections", "out_projections")):  # fmt: skip
        if down not in quantizer:
            continue
        shape = quantizer[down]["direction"].shape
        *lead, rows, columns = shape
        random = jax.random.normal(key, (*lead, max(rows, columns), min(rows, columns)))
        direction = jnp.linalg.qr(random)[0]
        direction = direction if rows >= columns else direction.swapaxes(-1, -2)
        pairs = [(down, direction)]
        if up in quantizer and quantizer[up]["direction"].shape == (*lead, columns, rows):
            pairs.append((up, direction.swapaxes(-1, -2)))
        for name, direction in pairs:
            gain = jnp.linalg.norm(direction, axis=-2)
            quantizer[name] = quantizer[name] | {"direction": direction, "gain": gain}
    return quantizer
