"""The train state: everything that a step changes, as one pytree."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from moss_tok import sharding, summary
from moss_tok.audio.manifest import DOMAINS
from moss_tok.training import optimizer
from moss_tok.training.config import OptimizerConfig
from moss_tok.training.objective import Arrays, Extra, Objective


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The static definition of a step; hashable, static under `jax.jit`.

    Attributes:
      objective: The loss and the models it trains.
      optimizer: Settings of the optimizer.
      seed: Seed of initial parameters and of the random draws of a step.
      num_microbatches: Number of parts that a batch is split into.
    """

    objective: Objective
    optimizer: OptimizerConfig
    seed: int = 0
    num_microbatches: int = 1


@flax.struct.dataclass
class Totals:
    """Sums over the steps since the last logged one, and counts over the whole run.

    Attributes:
      steps: float32, number of steps in the sums, skipped ones excluded.
      metrics: Name -> sum over steps.
      domain_items: [len(DOMAINS)], number of items of each domain.
      domain_terms: Name -> [len(DOMAINS)], sums over the items of each domain.
      skipped: int32, updates of the whole run that were skipped because they were not finite.
      skipped_in_row: int32, number of consecutive skipped updates up to the last step.
      failed_reads: int32, failed reads of files in the whole run.
    """

    steps: jax.Array
    metrics: Arrays
    domain_items: jax.Array
    domain_terms: Arrays
    skipped: jax.Array
    skipped_in_row: jax.Array
    failed_reads: jax.Array

    def restarted(self, zeros: "Totals") -> "Totals":
        """Resets the sums to `zeros`; keeps the counts over the whole run."""
        return zeros.replace(
            skipped=self.skipped,
            skipped_in_row=self.skipped_in_row,
            failed_reads=self.failed_reads,
        )


@flax.struct.dataclass
class TrainState:
    """Everything that a training step changes.

    Attributes:
      step: int32 scalar, number of steps done; also the number of batches consumed.
      params: Parameters, float32.
      ema: Moving average of `params`; None without averaging.
      opt_state: Optimizer state of the trained parameters.
      extra: Extra state of the objective, by name.
      totals: Sums and counts for the log.
    """

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any
    extra: Extra
    totals: Totals

    def __repr__(self) -> str:
        step = summary.describe_values(self.step)
        parameters = summary.count_parameters(self.params)
        return f"TrainState(step: {step}, {parameters}, {summary.megabytes(self)})"

    @property
    def best_params(self) -> Any:
        """The parameters to evaluate and export: the moving average if there is one."""
        return self.params if self.ema is None else self.ema


def init_state(recipe: Recipe, params: Any = None, extra: Any = None) -> TrainState:
    """A new state; a pure function of its arguments.

    Args:
      recipe: The run.
      params: Entries that replace initialized parameters.
      extra: Entries that replace initialized extra state.
    """
    objective = recipe.objective
    key = jax.random.key(recipe.seed)
    params = nn.meta.unbox(objective.init(key)) | (params or {})
    extra = nn.meta.unbox(objective.init_extra(key)) | (extra or {})
    extra |= objective.init_extra_optimizers(recipe.optimizer, extra)
    transformation = optimizer.of_objective(recipe.optimizer, objective)
    ema = None
    if recipe.optimizer.ema_decay:
        ema = jax.tree.map(jnp.copy, params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=ema,
        opt_state=transformation.init(objective.trained(params)),
        extra=extra,
        totals=zero_totals(objective),
    )


def zero_totals(objective: Objective) -> Totals:
    """Totals before the first step. Each entry is an array of its own, because it is donated."""
    terms = objective.term_names
    names = ["loss", *terms, "gradient_norm", *objective.norm_names]
    for name in objective.masked_terms:
        names.append(f"{name}_steps")
    metrics = {name: jnp.zeros(()) for name in names}
    domain_terms = {}
    for name in ("loss", *terms):
        if name not in objective.masked_terms:  # masked terms are means over some items only
            domain_terms[name] = jnp.zeros(len(DOMAINS))
    return Totals(
        steps=jnp.zeros(()),
        metrics=metrics,
        domain_items=jnp.zeros(len(DOMAINS)),
        domain_terms=domain_terms,
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_row=jnp.zeros((), jnp.int32),
        failed_reads=jnp.zeros((), jnp.int32),
    )


def state_shapes(recipe: Recipe, mesh: jax.sharding.Mesh) -> TrainState:
    """ShapeDtypeStructs of the state of a run, with their shardings on `mesh`.

    Moments and averages of a parameter are split like the parameter; all else is replicated.

    Raises:
      ValueError: A large parameter would be replicated, see `sharding.param_shardings`.
    """
    key = jax.random.key(recipe.seed)
    boxed = optimizer.param_shapes(recipe.objective)
    extra = jax.eval_shape(recipe.objective.init_extra, key)
    for tree in extra.values():
        if isinstance(tree, dict):  # partitioned parameters, in boxes
            boxed = boxed | tree
    shardings = sharding.param_shardings(boxed, mesh)
    sharding_of = {}
    for path, value in jax.tree_util.tree_leaves_with_path(shardings):
        sharding_of[_keys(path)] = value

    def add_sharding(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        keys = _keys(path)
        placed = sharding.replicated(mesh)
        for start in range(len(keys)):
            if keys[start:] in sharding_of:  # the end of the path is that of a parameter
                placed = sharding_of[keys[start:]]
                break
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)

    # With the arguments of `start.first_state`, so that a run traces this only once.
    shapes = jax.jit(init_state, static_argnums=0).eval_shape(recipe, {}, {})
    return jax.tree_util.tree_map_with_path(add_sharding, shapes)


def _keys(path: Any) -> tuple[Any, ...]:
    """The keys of a path in a tree; None for entries of tuples and of dataclasses."""
    return tuple(getattr(entry, "key", None) for entry in path)
