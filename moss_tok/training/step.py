"""One training step as one jitted, donated function.

It first updates the models in the extra state (discriminators), then the parameters.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moss_tok import sharding
from moss_tok.audio.manifest import DOMAINS
from moss_tok.training import microbatches, optimizer
from moss_tok.training.objective import Arrays, Batch, Extra, Trees, Update
from moss_tok.training.state import Recipe, Totals, TrainState


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def train_step(
    recipe: Recipe,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, Arrays]:
    """Updates `state` on a batch; updates that are not finite are skipped and counted.

    Args:
      recipe: The run.
      state: The state before the step. It is donated.
      batch: The arrays of the objective's `item_shapes`, and "domain" [B], indices into DOMAINS;
        "position" [B], positions in the global batch; "failed_reads" [B], failed reads before each
        item; "stop" [B] bool, see below.

    Returns:
      The next state, and scalars: the loss, its terms, gradient norms, skipped_in_row, and "stop".
      The last one is true if it was set for any item of the batch, so that all processes see it at
      the same step.
    """
    objective = recipe.objective
    key = jax.random.fold_in(jax.random.key(recipe.seed), state.step)
    batch = objective.prepare(key, state.step, batch)
    masks = objective.masks(batch)
    shares = {name: _shares(mask) for name, mask in masks.items()}
    batch = batch | {"term_shares": shares}
    parts = microbatches.split(batch, recipe.num_microbatches)

    def compute_outputs(trained):
        params = state.params | trained
        return microbatches.apply_to_each(functools.partial(objective.outputs, params), parts)

    trained = objective.trained(state.params)
    outputs, pullback, seen = jax.vjp(compute_outputs, trained, has_aux=True)
    learned = objective.train_extra(recipe.optimizer, state.extra, parts, outputs)
    extra = state.extra | learned.extra
    output_gradient, terms = _output_gradient(recipe, extra, parts, outputs)
    (gradient,) = pullback(output_gradient)
    transformation = optimizer.of_objective(recipe.optimizer, objective)
    trained, opt_state = optimizer.update(transformation, gradient, state.opt_state, trained)
    trees = _averaged(recipe, state, state.params | trained)
    update = Update(key, state.step, batch, seen, extra, trees)
    finished_extra, trees = objective.finish(update)

    terms |= learned.terms
    metrics = {name: values.mean() for name, values in terms.items()}
    metrics |= learned.norms
    metrics["gradient_norm"] = optax.tree.norm(gradient)
    for name, mask in masks.items():
        metrics[f"{name}_steps"] = mask.any().astype(jnp.float32)
    changed = trees | {
        "opt_state": opt_state,
        "extra": extra | finished_extra,
        "totals": _add_totals(state.totals, metrics, terms, parts["domain"]),
    }
    return _apply_if_finite(state, changed, metrics, batch)


def sharded_train_step(recipe: Recipe, shapes: TrainState, batch_size: int) -> Any:
    """`train_step` on the mesh of `shapes` (`state_shapes`): jitted, the state donated.

    Returns:
      Function (state, batch) -> (state, metrics).
    """
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    mesh = shapes.step.sharding.mesh
    recipe = fit_microbatches(recipe, mesh, batch_size)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Arrays]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # attention reads it
            return train_step(recipe, state, batch)

    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
        compiler_options=sharding.compiler_options(mesh),
    )


def fit_microbatches(recipe: Recipe, mesh: jax.sharding.Mesh, batch_size: int) -> Recipe:
    """`recipe` with a number of microbatches that divides the items of each device.

    It is the smallest such number that is at least the one in `recipe`. A device with fewer items
    than microbatches computes its items one by one.
    """
    device_items = batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])
    num_microbatches = min(recipe.num_microbatches, device_items)
    while device_items % num_microbatches:
        num_microbatches += 1
    return dataclasses.replace(recipe, num_microbatches=num_microbatches)


def batch_shapes(recipe: Recipe, batch_size: int, mesh: jax.sharding.Mesh) -> Batch:
    """ShapeDtypeStructs of a batch with their shardings on `mesh`."""
    item_shapes = {
        "stop": ((), jnp.bool_),
        "domain": ((), jnp.int32),
        "position": ((), jnp.int32),
        "failed_reads": ((), jnp.int32),
    }
    item_shapes |= recipe.objective.item_shapes()
    rows = sharding.batch_sharding(mesh)
    shapes = {}
    for name, (shape, dtype) in item_shapes.items():
        shapes[name] = jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=rows)
    return shapes


def _shares(mask: jax.Array) -> jax.Array:
    """Weights [B] with which the mean over all items is the mean over the items in the mask.

    They depend on the number of items in the mask, so they are computed for the whole batch, not
    per microbatch.
    """
    return mask * len(mask) / jnp.maximum(mask.sum(), 1)


def _output_gradient(
    recipe: Recipe,
    extra: Extra,
    parts: Batch,
    outputs: Batch,
) -> tuple[Batch, Arrays]:
    """Gradient of the loss with respect to outputs, and each term per item [M, B]."""

    def gradient_of_part(_, inputs):
        outputs, part = inputs
        num_parts = recipe.num_microbatches
        return None, recipe.objective.output_gradient(extra, part, outputs, num_parts)

    _, results = microbatches.scan(gradient_of_part, None, (outputs, parts))
    return results


def _averaged(recipe: Recipe, state: TrainState, params: Any) -> Trees:
    """The new parameters, and their moving average if there is one."""
    if state.ema is None:
        return {"params": params}
    # A shorter average at first, so that it forgets the random initialization.
    decay = jnp.minimum(recipe.optimizer.ema_decay, (1.0 + state.step) / (10.0 + state.step))

    def average(mean, param):
        return mean + (1 - decay) * (param - mean)

    return {"params": params, "ema": jax.tree.map(average, state.ema, params)}


def _add_totals(
    totals: Totals,
    metrics: Arrays,
    terms: Arrays,
    domain: jax.Array,
) -> Totals:
    in_domain = jax.nn.one_hot(domain, len(DOMAINS))  # [M, B, domains]
    sums = {}
    for name in totals.domain_terms:
        sums[name] = jnp.einsum("mb,mbd->d", terms[name], in_domain, precision="highest")
    return totals.replace(
        steps=totals.steps + 1,
        metrics=jax.tree.map(jnp.add, totals.metrics, metrics),
        domain_items=totals.domain_items + in_domain.sum((0, 1)),
        domain_terms=jax.tree.map(jnp.add, totals.domain_terms, sums),
    )


def _apply_if_finite(
    state: TrainState,
    changed: dict[str, Any],
    metrics: Arrays,
    batch: Batch,
) -> tuple[TrainState, Arrays]:
    """Applies the changes if all metrics are finite; otherwise only counts the skipped update."""
    values = jnp.stack(list(metrics.values()))
    is_finite = jnp.isfinite(values).all()
    choose = functools.partial(jnp.where, is_finite)
    for name, new in changed.items():
        changed[name] = jax.tree.map(choose, new, getattr(state, name))
    skipped_in_row = jnp.where(is_finite, 0, state.totals.skipped_in_row + 1)
    totals = changed.pop("totals").replace(
        skipped=state.totals.skipped + ~is_finite,
        skipped_in_row=skipped_in_row,
        failed_reads=state.totals.failed_reads + batch["failed_reads"].sum(),
    )
    state = state.replace(**changed, totals=totals, step=state.step + 1)
    return state, metrics | {"skipped_in_row": skipped_in_row, "stop": batch["stop"].any()}
