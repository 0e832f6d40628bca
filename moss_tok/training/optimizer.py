"""AdamW with a schedule, weight decay on matrices, and groups with their own learning rates."""

import functools
from typing import Any

import jax
import optax
from flax import linen as nn

from moss_tok.nn.layers import Matrix
from moss_tok.training.config import OptimizerConfig
from moss_tok.training.objective import Objective


def learning_rate(config: OptimizerConfig, peak: float) -> optax.Schedule:
    """Linear warm-up to `peak`, then exponential decay, or a cosine to 0 at `decay_steps`."""
    warmup = max(1, config.warmup_steps)
    rise = optax.linear_schedule(peak / warmup, peak, warmup - 1)
    if config.decay_steps:
        fall = optax.cosine_decay_schedule(peak, max(1, config.decay_steps - warmup))
    else:
        fall = optax.exponential_decay(peak, 1, config.decay_per_step)
    return optax.join_schedules([rise, fall], [warmup])


def adamw(config: OptimizerConfig, peak: float, decayed: Any) -> optax.GradientTransformation:
    """AdamW; weight decay applies where the tree of bools `decayed` is true."""
    return optax.adamw(
        learning_rate(config, peak),
        config.beta1,
        config.beta2,
        weight_decay=config.weight_decay,
        mask=decayed,
    )


def decayed_leaves(boxed: Any) -> Any:
    """Tree of bools: which parameters of a boxed tree have weight decay (`Matrix` boxes)."""

    def is_box(x: Any) -> bool:
        return isinstance(x, nn.meta.AxisMetadata)

    return jax.tree.map(lambda x: isinstance(x, Matrix), boxed, is_leaf=is_box)


@functools.lru_cache(maxsize=16)
def param_shapes(objective: Objective) -> Any:
    """Boxed ShapeDtypeStructs of the parameters; traced only once, which takes a second."""
    return jax.eval_shape(objective.init, jax.random.key(0))


def of_objective(config: OptimizerConfig, objective: Objective) -> optax.GradientTransformation:
    """The optimizer of the trained parameters: clipping by global norm, then AdamW per group."""
    decayed = objective.trained(decayed_leaves(param_shapes(objective)))
    groups = {}
    for name, factor in objective.group_rates.items():
        groups[name] = adamw(config, factor * config.learning_rate, decayed)

    def group_of(path: Any, _: Any) -> str:
        keys = tuple(entry.key for entry in path)
        return objective.group(keys)

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(group_of, params)

    clip = optax.clip_by_global_norm(config.gradient_clip)
    return optax.chain(clip, optax.partition(groups, labels))


def update(
    optimizer: optax.GradientTransformation,
    gradient: Any,
    opt_state: Any,
    params: Any,
) -> tuple[Any, Any]:
    """Updated parameters and optimizer state."""
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state
