"""One training step as one jitted, donated function: discriminators first, then the generator."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moss_tok import sharding
from moss_tok.codec.model import CodecModel
from moss_tok.config import DOMAINS, CodecConfig, TrainConfig
from moss_tok.language.config import LanguageConfig
from moss_tok.language.model import SemanticHead
from moss_tok.training import losses
from moss_tok.training.discriminators import judges
from moss_tok.training.state import (
    SEMANTIC_TERM,
    Totals,
    TrainState,
    discriminator_optimizer,
    generator_optimizer,
    trainable,
)

_COUNTED_STEPS = 50  # what code_counts remember
_COUNT_DECAY = 1 - 1 / _COUNTED_STEPS
_QUIETEST_PEAK = 0.01  # what peaks below stays quiet for the discriminators
DEAD_SHARE = 0.1  # of the use a code would have if all were used alike

Batch = dict[str, jax.Array]


@functools.partial(jax.jit, static_argnums=(0, 1, 4), donate_argnums=2)
def train_step(
    config: TrainConfig,
    codec: CodecConfig,
    state: TrainState,
    batch: Batch,
    language: LanguageConfig | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Updates `state` on a batch; an update that would not be finite is skipped and counted.

    Args:
      config: The run.
      codec: The model.
      state: Donated.
      batch: "wav" [B, C, S], S whole frames; "length" [B] valid samples; "domain" [B] indices into
        DOMAINS; "position" [B] places in the global batch; "failed_reads" [B] files that could not
        be read on the way to each item; "stop" [B] bool, see below. With a language model also
        "task" [B], indices into TASKS; "text" [B, U] tokens, of which "text_length" [B] count, 0
        for audio without text.
      language: The semantic head, if there is one.

    Returns:
      The next state, and scalars: the loss, its terms, gradient norms, skipped_in_row, and whether
      any item of the batch said "stop": so all processes learn of it at the same step.
    """
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    keep_key, reseed_key = jax.random.split(key)
    batch = batch | {"keep": _quantizer_dropout(config, codec, keep_key, batch["position"])}
    batch["turn"] = jnp.full(config.batch_size, state.step % config.mel_turns)
    if language is not None:
        batch |= _text_weights(config, codec, jax.random.fold_in(key, 2), batch)
    parts = _split(batch, config.num_microbatches)
    changed, terms, norms = {}, {}, {}

    def generate(params):
        params = state.params | params
        return _map_parts(functools.partial(_generate, config, codec, language, params), parts)

    params = trainable(config, state.params)
    generated, pullback, coded = jax.vjp(generate, params, has_aux=True)
    if config.adversarial:
        changed, terms["discriminator_loss"], norms["discriminator_gradient_norm"] = (
            _train_discriminators(config, state, parts, generated["wav_hat"])
        )
    gradient, generator_terms = _generator_gradient(
        config, codec, changed.get("discriminators"), parts, generated
    )
    terms |= generator_terms
    (gradient,) = pullback(gradient)
    norms["gradient_norm"] = optax.tree.norm(gradient)
    params, changed["opt_state"] = _update(
        generator_optimizer(config), gradient, state.opt_state, params
    )
    changed["params"] = state.params | params
    changed |= _averaged(config, state, changed["params"])
    changed |= _tracked_codes(config, codec, state, changed, batch, coded, reseed_key)
    metrics = {name: x.mean() for name, x in terms.items()} | norms
    if language is not None:
        metrics["text_steps"] = batch["text_weight"].any().astype(jnp.float32)
    changed["totals"] = _add_totals(state.totals, metrics, terms, parts["domain"])
    return _guarded(state, changed, metrics, batch)


def sharded_train_step(
    config: TrainConfig,
    codec: CodecConfig,
    shapes: TrainState,
    language: LanguageConfig | None = None,
) -> Any:
    """`train_step` on the mesh of `shapes` (`state_shapes`): jitted, the state donated.

    Returns:
      Function (state, batch) -> (state, metrics).
    """
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    mesh = shapes.step.sharding.mesh
    config = fit_microbatches(config, mesh)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # kernels ask for it
            return train_step(config, codec, state, batch, language)

    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
        compiler_options=sharding.compiler_options(mesh),
    )


def fit_microbatches(config: TrainConfig, mesh: jax.sharding.Mesh) -> TrainConfig:
    """With the fewest microbatches, as many as asked for, that the mesh can split evenly.

    A device with fewer items than that takes them one by one.
    """
    items = config.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])  # of a device
    most = min(config.num_microbatches, items)
    number = next(n for n in range(most, items + 1) if items % n == 0)
    return dataclasses.replace(config, num_microbatches=number)


def segment_samples(config: TrainConfig, codec: CodecConfig) -> int:
    """S of a batch: `segment_seconds` in whole frames; ValueError if no mel window fits in."""
    frames = int(config.segment_seconds * codec.frame_rate + 1e-6)
    longest = 1 if config.trainable == "language" else max(config.mel_window_lengths)
    if frames * codec.hop_length < longest:
        least = -(-longest // codec.hop_length) / codec.frame_rate
        raise ValueError(
            f"segment_seconds must be at least {least:g}, whole frames in which the longest mel "
            f"window fits, got {config.segment_seconds}"
        )
    return frames * codec.hop_length


def batch_shapes(
    config: TrainConfig,
    codec: CodecConfig,
    mesh: jax.sharding.Mesh,
    language: LanguageConfig | None = None,
) -> Batch:
    """ShapeDtypeStructs of a batch, with their sharding on `mesh`."""
    wav = (codec.num_channels, segment_samples(config, codec))
    integer = ((), jnp.int32)
    kinds = {"wav": (wav, jnp.float32), "stop": ((), jnp.bool_)}
    kinds |= dict.fromkeys(("length", "domain", "position", "failed_reads"), integer)
    if language is not None:
        kinds |= {"task": integer, "text_length": integer}
        kinds["text"] = ((config.max_text_tokens,), jnp.int32)
    rows = sharding.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((config.batch_size, *shape), dtype, sharding=rows)
        for name, (shape, dtype) in kinds.items()
    }


def _split(batch: Batch, num_parts: int) -> Batch:
    """[B, ...] to [num_parts, B / num_parts, ...], each part spread over the whole batch."""

    def split(x):
        return x.reshape(-1, num_parts, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def _join(parts: Any) -> Any:
    """The inverse of `_split`: the batch in its order, however it was split."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)


def _map_parts(function: Callable[[Batch], Any], parts: Batch) -> Any:
    """Applies `function` to each microbatch.

    Several are computed one after the other, and again in the backward pass, so that only one's
    activations are held.
    """
    if jax.tree.leaves(parts)[0].shape[0] == 1:
        result = function(jax.tree.map(lambda x: x[0], parts))
        return jax.tree.map(lambda x: x[None], result)
    return jax.lax.map(jax.checkpoint(function), parts)


def _generate(
    config: TrainConfig,
    codec: CodecConfig,
    language: LanguageConfig | None,
    params: Any,
    part: Batch,
) -> tuple[Any, Any]:
    """What the losses see (wav_hat, losses per item), and codes and projected vectors."""
    apply = functools.partial(CodecModel(codec, config.compute).apply, {"params": params})
    latents, quantized = apply(part["wav"], part["keep"], method="quantize")
    keep, length, outputs = part["keep"], part["length"], {}
    if config.trainable != "language":
        outputs["wav_hat"] = apply(quantized.latents, method="audio")
        outputs |= losses.quantizer_losses(quantized, keep, length, codec.hop_length)
    if language is not None:
        heard = quantized.latents if language.audio == "codes" else latents
        if "hidden" in part:
            heard = jnp.where(part["hidden"][..., None], 0, heard)
        text = (part[name] for name in ("task", "text", "text_length"))
        head = SemanticHead(language, config.compute)
        loss = head.apply({"params": params["language"]}, heard, codec.num_frames(length), *text)
        outputs[SEMANTIC_TERM] = loss * part["text_weight"]
    return outputs, (quantized.codes, quantized.projected)


def _judge(
    config: TrainConfig, name: str, params: Any, part: Batch, *wavs: jax.Array
) -> list[losses.Features]:
    """What one discriminator makes of each of `wavs` [B, C, S], padding zeroed: its features.

    A recording and its reconstruction are brought to the level at which the recording peaks at 1.
    """
    wav = jnp.stack(wavs, axis=1)  # [B, W, C, S]
    valid = jnp.arange(wav.shape[-1]) < part["length"][:, None, None]
    peak = jnp.abs(jnp.where(valid, part["wav"], 0)).max((1, 2))
    wav = jnp.where(valid[:, None], wav, 0)
    wav = wav / jnp.maximum(peak, _QUIETEST_PEAK)[:, None, None, None]
    judge = judges(config.discriminators, config.dtype)[name]
    features = judge.apply({"params": params}, wav.reshape(-1, *wav.shape[2:]))
    features = [x.reshape(*wav.shape[:2], *x.shape[1:]) for x in features]
    return [[x[:, i] for x in features] for i in range(len(wavs))]


def _train_discriminators(
    config: TrainConfig, state: TrainState, parts: Batch, wav_hat: jax.Array
) -> tuple[dict[str, Any], jax.Array, jax.Array]:
    """What they become, their loss for each item [M, B], and the norm of its gradient."""
    params, opt_state = state.discriminators, state.discriminator_opt_state
    gradient, loss = _discriminator_gradient(config, params, parts, wav_hat)
    optimizer = discriminator_optimizer(config)
    params, opt_state = _update(optimizer, gradient, opt_state, params)
    changed = {"discriminators": params, "discriminator_opt_state": opt_state}
    return changed, loss, optax.tree.norm(gradient)


def _discriminator_gradient(
    config: TrainConfig, params: Any, parts: Batch, wav_hat: jax.Array
) -> tuple[Any, jax.Array]:
    """Mean gradient over all microbatches, and the loss of each item [M, B], their mean.

    One discriminator begins when the last one is done, so that only one's features are held.
    """

    def loss(judge, name, part, wav_hat):
        # At once: half as many convolutions, which take a TPU's compiler seconds each.
        real, fake = _judge(config, name, judge, part, part["wav"], wav_hat)
        per_item = losses.discriminator_loss(real, fake) / len(params)
        return per_item.mean() / config.num_microbatches, per_item

    def accumulate(total, part):
        (part, wav_hat), gradient, per_item = part, {}, 0.0
        for name in params:
            found, judged = jax.grad(loss, has_aux=True)(params[name], name, part, wav_hat)
            gradient[name], wav_hat = jax.lax.optimization_barrier((found, wav_hat))
            per_item += judged
        return jax.tree.map(jnp.add, total, gradient), per_item

    zeros = jax.tree.map(jnp.zeros_like, params)
    return _scan(accumulate, zeros, (parts, jax.lax.stop_gradient(wav_hat)))


def _generator_gradient(
    config: TrainConfig, codec: CodecConfig, discriminators: Any, parts: Batch, generated: Batch
) -> tuple[Batch, dict[str, jax.Array]]:
    """Gradient of the generator's loss in what it generated, and each term per item [M, B]."""

    def loss(generated, part):
        terms = {name: x for name, x in generated.items() if name.endswith("_loss")}
        if "wav_hat" in generated:
            terms |= _audio_terms(config, codec, part, generated["wav_hat"])
        return _weighted(config, terms).mean() / config.num_microbatches, terms

    def gradient(_, inputs):
        generated, part = inputs
        found, terms = jax.grad(loss, has_aux=True)(generated, part)
        if config.adversarial and "wav_hat" in generated:
            wav_hat = generated["wav_hat"]
            judged, judged_terms = _judged(config, discriminators, part, wav_hat)
            found["wav_hat"] += judged
            terms |= judged_terms
        return None, (found, terms | {"loss": _weighted(config, terms)})

    return _scan(gradient, None, (generated, parts))[1]


def _weighted(config: TrainConfig, terms: dict[str, jax.Array]) -> jax.Array:
    """The loss of each item [B]."""
    return sum(getattr(config, n.replace("_loss", "_weight")) * x for n, x in terms.items())


def _audio_terms(
    config: TrainConfig, codec: CodecConfig, part: Batch, wav_hat: jax.Array
) -> dict[str, jax.Array]:
    """What a reconstruction costs the generator by itself, per item."""
    wav, length = part["wav"], part["length"]
    terms = _mel_terms(config, codec, part, wav_hat)
    if not config.loudness_weight:
        del terms["loudness_loss"]
    if config.waveform_weight:
        terms["waveform_loss"] = losses.waveform_loss(wav, wav_hat, length)
    return terms


def _mel_terms(
    config: TrainConfig, codec: CodecConfig, part: Batch, wav_hat: jax.Array
) -> dict[str, jax.Array]:
    """`losses.reconstruction_losses` of the windows whose turn it is, for all of them."""

    def of_turn(turn, wav_hat):
        windows = config.mel_window_lengths[turn :: config.mel_turns]
        mel = (codec.sample_rate, windows, config.mel_floor_db)
        terms = losses.reconstruction_losses(part["wav"], wav_hat, part["length"], *mel)
        share = len(config.mel_window_lengths) / len(windows)
        return {name: share * x for name, x in terms.items()}

    if config.mel_turns == 1:
        return of_turn(0, wav_hat)
    turns = [functools.partial(of_turn, turn) for turn in range(config.mel_turns)]
    return jax.lax.switch(part["turn"][0], turns, wav_hat)


def _judged(
    config: TrainConfig, params: Any, part: Batch, wav_hat: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What a reconstruction costs by the discriminators: gradient in it, and terms per item.

    One after the other, as in `_discriminator_gradient`.
    """

    def loss(wav_hat, name):
        # One by one: no gradient of what the recording gives.
        wavs = (part["wav"], wav_hat)
        (real,), (fake,) = (_judge(config, name, params[name], part, x) for x in wavs)
        terms = {
            "adversarial_loss": losses.adversarial_loss(fake) / len(params),
            "feature_matching_loss": losses.feature_matching_loss(real, fake) / len(params),
        }
        return _weighted(config, terms).mean() / config.num_microbatches, terms

    total = None
    for name in params:
        found = jax.grad(loss, has_aux=True)(wav_hat, name)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
        total, wav_hat = jax.lax.optimization_barrier((total, wav_hat))
    return total


def _scan(function: Callable[[Any, Any], Any], carry: Any, parts: Any) -> tuple[Any, Any]:
    """`jax.lax.scan` over microbatches; a single one without a loop.

    XLA on CPUs runs the convolutions of a loop's body on one core by its slowest path.
    """
    if jax.tree.leaves(parts)[0].shape[0] > 1:
        return jax.lax.scan(function, carry, parts)
    carry, result = function(carry, jax.tree.map(lambda x: x[0], parts))
    return carry, jax.tree.map(lambda x: x[None], result)


def _update(
    optimizer: optax.GradientTransformation, gradient: Any, opt_state: Any, params: Any
) -> tuple[Any, Any]:
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def _averaged(config: TrainConfig, state: TrainState, params: Any) -> dict[str, Any]:
    if state.ema is None:
        return {}
    # Shorter at first, or the average would hold on to the random start.
    decay = jnp.minimum(config.ema_decay, (1.0 + state.step) / (10.0 + state.step))
    return {"ema": jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, params)}


def _add_totals(
    totals: Totals, metrics: dict[str, jax.Array], terms: dict[str, jax.Array], domain: jax.Array
) -> Totals:
    member = jax.nn.one_hot(domain, len(DOMAINS))  # [M, B, domains]
    sums = {name: jnp.einsum("mb,mbd->d", terms[name], member) for name in totals.domain_terms}
    added = Totals(jnp.ones(()), metrics, member.sum((0, 1)), sums)
    return jax.tree.map(jnp.add, totals, added)


def _guarded(
    state: TrainState, changed: dict[str, Any], metrics: dict[str, jax.Array], batch: Batch
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes the changes over if everything is finite; else only counts."""
    finite = jnp.isfinite(jnp.stack(list(metrics.values()))).all()
    changed = {
        name: jax.tree.map(functools.partial(jnp.where, finite), new, getattr(state, name))
        for name, new in changed.items()
    }
    skipped_in_row = jnp.where(finite, 0, state.skipped_in_row + 1)
    state = state.replace(
        **changed,
        step=state.step + 1,
        skipped=state.skipped + ~finite,
        skipped_in_row=skipped_in_row,
        failed_reads=state.failed_reads + batch["failed_reads"].sum(),
    )
    return state, metrics | {"skipped_in_row": skipped_in_row, "stop": batch["stop"].any()}


def _quantizer_dropout(
    config: TrainConfig, codec: CodecConfig, key: jax.Array, positions: jax.Array
) -> jax.Array:
    """Which quantizers each item uses: all, or with quantizer_dropout the first 1..Q; [B, Q].

    An item's draw depends on its place in the global batch alone, not on how that is split.
    """
    most = codec.quantizer.num_quantizers

    def draw(position):
        number_key, share_key = jax.random.split(jax.random.fold_in(key, position))
        number = jax.random.randint(number_key, (), 1, most + 1)
        drop = jax.random.uniform(share_key) < config.quantizer_dropout
        return jnp.arange(most) < jnp.where(drop, number, most)

    return jax.vmap(draw)(positions)


def _text_weights(config: TrainConfig, codec: CodecConfig, key: jax.Array, batch: Batch) -> Batch:
    """What each item's text counts, so that the mean is over those with text; and what is hidden.

    Over the whole batch: a microbatch does not know how many there are.
    """
    paired = batch["text_length"] > 0
    found = {"text_weight": paired * len(paired) / jnp.maximum(paired.sum(), 1)}
    if config.language_mask:
        found["hidden"] = _hidden_frames(config, codec, key, batch)
    return found


def _hidden_frames(
    config: TrainConfig, codec: CodecConfig, key: jax.Array, batch: Batch
) -> jax.Array:
    """Frames [B, T] that the language model does not hear: two spans of each item.

    SpecAugment's masks in time (arXiv 1904.08779).
    """
    num_frames = codec.num_frames(batch["wav"].shape[-1])
    frames = jnp.arange(num_frames)

    def draw(position, size):
        width, start = jax.random.uniform(jax.random.fold_in(key, position), (2, 2))
        width = width * size * config.language_mask / 2
        start = start * (size - width)
        return ((frames[:, None] >= start) & (frames[:, None] < start + width)).any(-1)

    return jax.vmap(draw)(batch["position"], codec.num_frames(batch["length"]))


def _tracked_codes(
    config: TrainConfig,
    codec: CodecConfig,
    state: TrainState,
    changed: dict[str, Any],
    batch: Batch,
    coded: tuple[jax.Array, jax.Array],
    key: jax.Array,
) -> dict[str, Any]:
    """The counts of codes; every `reseed_every` steps also parameters whose dead codes moved."""
    codes, projected = _join((coded[0], jnp.swapaxes(coded[1], 1, 2)))  # [B, Q, T], [B, Q, T, c]
    valid = jnp.arange(codes.shape[-1]) < codec.num_frames(batch["length"])[:, None]  # [B, T]
    used = batch["keep"][..., None] & valid[:, None]  # [B, Q, T]
    added = _histogram(codes, used, codec.quantizer.codebook_size)
    counts = _COUNT_DECAY * state.code_counts + added
    if not config.reseed_every or config.trainable != "all":
        return {"code_counts": counts}
    trees = {name: changed[name] for name in ("params", "ema") if name in changed}
    books = {name: tree["quantizer"]["codebooks"] for name, tree in trees.items()}
    # Trained codebooks are left alone until the counts mean something.
    first = _COUNTED_STEPS if config.init_from else 0
    due = (state.step % config.reseed_every == 0) & (state.step >= first)
    vectors = _by_quantizer(projected), _by_quantizer(used)
    books, counts = jax.lax.cond(due, _reseed, lambda *x: x[:2], books, counts, *vectors, key)
    for name, tree in trees.items():
        trees[name] = tree | {"quantizer": tree["quantizer"] | {"codebooks": books[name]}}
    return trees | {"code_counts": counts}


def _histogram(codes: jax.Array, used: jax.Array, codebook_size: int) -> jax.Array:
    """Codes [B, Q, T], counted where `used`, to counts [Q, K]."""
    count = functools.partial(jnp.bincount, length=codebook_size)
    weights = _by_quantizer(used.astype(jnp.float32))
    return jax.vmap(lambda c, u: count(c, weights=u))(_by_quantizer(codes), weights)


def _by_quantizer(x: jax.Array) -> jax.Array:
    """[B, Q, T, ...] to [Q, N, ...], all vectors that a quantizer saw."""
    return x.swapaxes(0, 1).reshape(x.shape[1], x.shape[0] * x.shape[2], *x.shape[3:])


def _reseed(
    books: dict[str, jax.Array],
    counts: jax.Array,
    projected: jax.Array,
    used: jax.Array,
    key: jax.Array,
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Moves codes that are hardly used onto vectors of this batch.

    Args:
      books: Codebooks [Q, K, c], all to be changed alike.
      counts: [Q, K].
      projected: What was quantized, [Q, N, c].
      used: bool [Q, N], vectors that are no padding, of items that use the quantizer.
      key: For the choice.
    """
    rank = jnp.cumsum(used, axis=-1)
    number = rank[:, -1:]
    draw = (jax.random.uniform(key, counts.shape) * number).astype(jnp.int32)
    chosen = jax.vmap(functools.partial(jnp.searchsorted, side="right"))(rank, draw)
    fresh = jnp.take_along_axis(projected, chosen[..., None], axis=1, mode="clip")
    expected = counts.sum(-1, keepdims=True) / counts.shape[1]
    dead = (counts < DEAD_SHARE * expected) & (number > 0)
    books = jax.tree.map(lambda book: jnp.where(dead[..., None], fresh, book), books)
    return books, jnp.where(dead, expected, counts)
