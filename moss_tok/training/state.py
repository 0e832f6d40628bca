"""The train state: everything a step changes, as one pytree."""

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
from moss_tok.training.objective import Objective


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a step computes; hashable, static under `jax.jit`.

    Attributes:
      objective: The loss and what it trains.
      optimizer: How.
      seed: Of parameters and of what a step draws.
      num_microbatches: Parts that a batch is split into.
    """

    objective: Objective
    optimizer: OptimizerConfig
    seed: int = 0
    num_microbatches: int = 1


@flax.struct.dataclass
class Totals:
    """Sums over the steps since the last logged one, and counts over the whole run.

    Attributes:
      steps: float32, steps summed up; skipped ones are not.
      metrics: Name -> sum of the values of a step.
      domain_items: [len(DOMAINS)], items of each domain.
      domain_terms: Name -> [len(DOMAINS)], sums over the items of each domain.
      skipped: int32, updates that were not finite; of the whole run.
      skipped_in_row: int32, how many of them came last without one that was.
      failed_reads: int32, files that could not be read; of the whole run.
    """

    steps: jax.Array
    metrics: dict[str, jax.Array]
    domain_items: jax.Array
    domain_terms: dict[str, jax.Array]
    skipped: jax.Array
    skipped_in_row: jax.Array
    failed_reads: jax.Array

    def restarted(self, zeros: "Totals") -> "Totals":
        """With the sums of `zeros`; what counts over the whole run stays."""
        return zeros.replace(
            skipped=self.skipped,
            skipped_in_row=self.skipped_in_row,
            failed_reads=self.failed_reads,
        )


@flax.struct.dataclass
class TrainState:
    """Parameters and all that goes with them.

    Attributes:
      step: int32 scalar; also the data position: batches consumed.
      params: float32.
      ema: Moving average of `params`; None if there is none.
      opt_state: Of the optimizer of the trained parameters.
      extra: What else the objective carries, by name.
      totals: For the log.
    """

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any
    extra: dict[str, Any]
    totals: Totals

    def __repr__(self) -> str:
        step = summary.describe_values(self.step)
        parameters = summary.count_parameters(self.params)
        return f"TrainState(step: {step}, {parameters}, {summary.megabytes(self)})"

    @property
    def best_params(self) -> Any:
        """What is evaluated and exported: the moving average if there is one."""
        return self.params if self.ema is None else self.ema


def init_state(recipe: Recipe, params: Any = None, extra: Any = None) -> TrainState:
    """A fresh state: a pure function of the recipe and of what is given to start from.

    Args:
      recipe: The run.
      params: Entries of the parameters that are not fresh.
      extra: The same of the extra state.
    """
    objective = recipe.objective
    key = jax.random.key(recipe.seed)
    params = nn.meta.unbox(objective.init(key)) | (params or {})
    extra = nn.meta.unbox(objective.init_extra(key)) | (extra or {})
    extra |= objective.init_extra_optimizers(recipe.optimizer, extra)
    transformation = optimizer.of_objective(recipe.optimizer, objective)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params) if recipe.optimizer.ema_decay else None,
        opt_state=transformation.init(objective.trained(params)),
        extra=extra,
        totals=zero_totals(objective),
    )


def zero_totals(objective: Objective) -> Totals:
    """Totals of no steps; each array its own, because they are donated."""
    terms = objective.term_names
    names = ("loss", *terms, "gradient_norm", *objective.norm_names)
    metrics = {name: jnp.zeros(()) for name in names}
    for name in objective.masked_terms:
        metrics[f"{name}_steps"] = jnp.zeros(())
    domain_terms = {}
    for name in ("loss", *terms):
        if name not in objective.masked_terms:  # a mean over some items, of any domain
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

    What belongs to a parameter (moments, averages) is split like it, the rest is replicated.

    Raises:
      ValueError: A large parameter would be replicated, see `sharding.param_shardings`.
    """
    key = jax.random.key(recipe.seed)
    boxed = jax.eval_shape(recipe.objective.init, key)
    extra = jax.eval_shape(recipe.objective.init_extra, key)
    for tree in extra.values():
        if isinstance(tree, dict):  # partitioned, in boxes
            boxed = boxed | tree
    shardings = sharding.param_shardings(boxed, mesh)
    sharding_of = {}
    for path, value in jax.tree_util.tree_leaves_with_path(shardings):
        sharding_of[tuple(entry.key for entry in path)] = value

    def add_sharding(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = tuple(getattr(entry, "key", None) for entry in path)
        placed = sharding.replicated(mesh)
        for start in range(len(names)):
            if names[start:] in sharding_of:
                placed = sharding_of[names[start:]]
                break
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)

    shapes = jax.eval_shape(lambda: init_state(recipe))
    return jax.tree_util.tree_map_with_path(add_sharding, shapes)
