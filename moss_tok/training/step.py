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
from moss_tok.training.objective import Batch, Update
from moss_tok.training.state import Recipe, Totals, TrainState


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def train_step(
    recipe: Recipe, state: TrainState, batch: Batch
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Updates `state` on a batch; updates that are not finite are skipped and counted.

    Args:
      recipe: The run.
      state: Donated.
      batch: The arrays of the objective's `item_shapes`, and "domain" [B], indices into DOMAINS;
        "position" [B], positions in the global batch; "failed_reads" [B], failed reads before each
        item; "stop" [B] bool, see below.

    Returns:
      The next state, and scalars: the loss, its terms, gradient norms, skipped_in_row, and "stop":
      whether it was set for any item of the batch, so that all processes see it at the same step.
    """
    objective = recipe.objective
    key = jax.random.fold_in(jax.random.key(recipe.seed), state.step)
    batch = objective.prepare(key, state.step, batch)
    masks = objective.masks(batch)
    batch = batch | {"term_shares": {name: _shares(mask) for name, mask in masks.items()}}
    parts = microbatches.split(batch, recipe.num_microbatches)

    def generate(trained):
        params = state.params | trained
        return microbatches.apply_to_each(functools.partial(objective.outputs, params), parts)

    trained = objective.trained(state.params)
    outputs, pullback, seen = jax.vjp(generate, trained, has_aux=True)
    learned = objective.train_extra(recipe.optimizer, state.extra, parts, outputs)
    extra = state.extra | learned.extra
    output_gradient, terms = _output_gradient(recipe, extra, parts, outputs)
    (gradient,) = pullback(output_gradient)
    transformation = optimizer.of_objective(recipe.optimizer, objective)
    trained, opt_state = optimizer.update(transformation, gradient, state.opt_state, trained)
    trees = _averaged(recipe, state, state.params | trained)
    update = Update(key, state.step, batch, seen, extra, trees)
    finished, trees = objective.finish(update)

    terms |= learned.terms
    metrics = {name: x.mean() for name, x in terms.items()} | learned.norms
    metrics["gradient_norm"] = optax.tree.norm(gradient)
    for name, mask in masks.items():
        metrics[f"{name}_steps"] = mask.any().astype(jnp.float32)
    totals = _add_totals(state.totals, metrics, terms, parts["domain"])
    changed = trees | {"opt_state": opt_state, "extra": extra | finished, "totals": totals}
    return _guarded(state, changed, metrics, batch)


def sharded_train_step(recipe: Recipe, shapes: TrainState, batch_size: int) -> Any:
    """`train_step` on the mesh of `shapes` (`state_shapes`): jitted, the state donated.

    Returns:
      Function (state, batch) -> (state, metrics).
    """
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    mesh = shapes.step.sharding.mesh
    recipe = fit_microbatches(recipe, mesh, batch_size)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
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
    """`recipe` with the smallest number of microbatches, at least as many as set, that divides.

    The number must divide the items of each device. A device with fewer items than microbatches
    computes its items one by one.
    """
    device_items = batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])
    fewest = min(recipe.num_microbatches, device_items)
    number = next(n for n in range(fewest, device_items + 1) if device_items % n == 0)
    return dataclasses.replace(recipe, num_microbatches=number)


def batch_shapes(recipe: Recipe, batch_size: int, mesh: jax.sharding.Mesh) -> Batch:
    """ShapeDtypeStructs of a batch with their shardings on `mesh`."""
    kinds = {"stop": ((), jnp.bool_)}
    kinds |= dict.fromkeys(("domain", "position", "failed_reads"), ((), jnp.int32))
    kinds |= recipe.objective.item_shapes()
    rows = sharding.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=rows)
        for name, (shape, dtype) in kinds.items()
    }


def _shares(mask: jax.Array) -> jax.Array:
    """Weight of each item of a batch [B] that makes a mean over all items one over the mask.

    It needs the number of masked items, so it is computed for the whole batch, not per microbatch.
    """
    return mask * len(mask) / jnp.maximum(mask.sum(), 1)


def _output_gradient(
    recipe: Recipe, extra: dict[str, Any], parts: Batch, outputs: Batch
) -> tuple[Batch, dict[str, jax.Array]]:
    """Gradient of the loss with respect to outputs, and each term per item [M, B]."""

    def gradient_of_part(_, inputs):
        outputs, part = inputs
        objective, num_parts = recipe.objective, recipe.num_microbatches
        return None, objective.output_gradient(extra, part, outputs, num_parts)

    return microbatches.scan(gradient_of_part, None, (outputs, parts))[1]


def _averaged(recipe: Recipe, state: TrainState, params: Any) -> dict[str, Any]:
    """The new parameters, and their moving average if there is one."""
    if state.ema is None:
        return {"params": params}
    # A shorter average at first, so that it forgets the random initialization.
    decay = jnp.minimum(recipe.optimizer.ema_decay, (1.0 + state.step) / (10.0 + state.step))
    ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, params)
    return {"params": params, "ema": ema}


def _add_totals(
    totals: Totals, metrics: dict[str, jax.Array], terms: dict[str, jax.Array], domain: jax.Array
) -> Totals:
    member = jax.nn.one_hot(domain, len(DOMAINS))  # [M, B, domains]
    sums = {name: jnp.einsum("mb,mbd->d", terms[name], member) for name in totals.domain_terms}
    return totals.replace(
        steps=totals.steps + 1,
        metrics=jax.tree.map(jnp.add, totals.metrics, metrics),
        domain_items=totals.domain_items + member.sum((0, 1)),
        domain_terms=jax.tree.map(jnp.add, totals.domain_terms, sums),
    )


def _guarded(
    state: TrainState, changed: dict[str, Any], metrics: dict[str, jax.Array], batch: Batch
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Applies the changes if all metrics are finite; otherwise only counts the skipped update."""
    finite = jnp.isfinite(jnp.stack(list(metrics.values()))).all()
    for name, new in changed.items():
        choose = functools.partial(jnp.where, finite)
        changed[name] = jax.tree.map(choose, new, getattr(state, name))
    skipped_in_row = jnp.where(finite, 0, state.totals.skipped_in_row + 1)
    totals = changed.pop("totals").replace(
        skipped=state.totals.skipped + ~finite,
        skipped_in_row=skipped_in_row,
        failed_reads=state.totals.failed_reads + batch["failed_reads"].sum(),
    )
    state = state.replace(**changed, totals=totals, step=state.step + 1)
    return state, metrics | {"skipped_in_row": skipped_in_row, "stop": batch["stop"].any()}
