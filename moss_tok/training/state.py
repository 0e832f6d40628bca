"""The train state: everything a step changes, as one pytree."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.fft
from flax import linen as nn

from moss_tok import sharding
from moss_tok.codec import pretrained
from moss_tok.codec.model import CodecModel
from moss_tok.config import DOMAINS, CodecConfig, ModuleConfig, TrainConfig, TransformerConfig
from moss_tok.language import pretrained as language_models
from moss_tok.language.config import LanguageConfig
from moss_tok.training.discriminators import Discriminators

# What the generator's loss is made of, in each stage; and what else is logged.
PRETRAIN_TERMS = ("reconstruction_loss", "commitment_loss", "codebook_loss")
SEMANTIC_TERM = "semantic_loss"
ADVERSARIAL_TERMS = ("adversarial_loss", "feature_matching_loss", "discriminator_loss")


@flax.struct.dataclass
class Totals:
    """Sums over the steps since the last logged one, so that a logged value is their mean.

    Attributes:
      steps: float32, steps summed up; skipped ones are not.
      metrics: Name -> sum of the values of a step.
      domain_items: [len(DOMAINS)], items of each domain.
      domain_terms: Name -> [len(DOMAINS)], sums over the items of each domain.
    """

    steps: jax.Array
    metrics: dict[str, jax.Array]
    domain_items: jax.Array
    domain_terms: dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """Parameters and all that goes with them.

    Attributes:
      step: int32 scalar; also the data position: batches consumed.
      params: Of the codec, float32, and of the semantic head as "language", where there is one.
      ema: Moving average of `params`; None if there is none.
      opt_state: Of the generator's optimizer.
      discriminators: Their parameters, float32; None in pretraining.
      discriminator_opt_state: Of their optimizer; None in pretraining.
      code_counts: [Q, K] float32, how often each code was used lately.
      totals: For the next line of the log.
      skipped: int32, updates that were not finite.
      skipped_in_row: int32, how many of them came last without one that was.
      failed_reads: int32, files that could not be read.
    """

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any
    discriminators: Any
    discriminator_opt_state: Any
    code_counts: jax.Array
    totals: Totals
    skipped: jax.Array
    skipped_in_row: jax.Array
    failed_reads: jax.Array

    @property
    def best_params(self) -> Any:
        """What is evaluated and exported: the moving average if there is one."""
        return self.params if self.ema is None else self.ema


def term_names(config: TrainConfig) -> tuple[str, ...]:
    """Names of the loss terms of the stage."""
    waveform = ("waveform_loss",) if config.waveform_weight else ()
    if config.loudness_weight:
        waveform = ("loudness_loss", *waveform)
    semantic = (SEMANTIC_TERM,) if config.language_model else ()
    if config.trainable == "language":
        return semantic
    return PRETRAIN_TERMS + waveform + semantic + (ADVERSARIAL_TERMS if config.adversarial else ())


def learning_rate(config: TrainConfig, peak: float) -> optax.Schedule:
    """Linear warm-up to `peak`, then exponential decay, or a cosine down to 0 at `decay_steps`."""
    warmup, decay = max(1, config.warmup_steps), config.decay_steps
    rise = optax.linear_schedule(peak / warmup, peak, warmup - 1)
    if decay:
        fall = optax.cosine_decay_schedule(peak, max(1, decay - warmup))
    else:
        fall = optax.exponential_decay(peak, 1, config.decay_per_step)
    return optax.join_schedules([rise, fall], [warmup])


def generator_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW with clipping by global norm; some may have a learning rate of their own."""
    peak = config.learning_rate
    groups = {
        "codebooks": _adamw(config, config.codebook_learning_rate * peak),
        "network": _adamw(config, peak),
    }
    if config.language_model:  # or runs from before there was one could not go on
        groups["language"] = _adamw(config, config.language_learning_rate * peak)
    clip = optax.clip_by_global_norm(config.gradient_clip)
    return optax.chain(clip, optax.partition(groups, _group))


def discriminator_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """The same for the discriminators."""
    clip = optax.clip_by_global_norm(config.discriminator_gradient_clip)
    return optax.chain(clip, _adamw(config, config.discriminator_learning_rate))


def _adamw(config: TrainConfig, peak: float) -> optax.GradientTransformation:
    return optax.adamw(
        learning_rate(config, peak),
        config.beta1,
        config.beta2,
        weight_decay=config.weight_decay,
        mask=_is_matrix,
    )


def _is_matrix(params: Any) -> Any:
    names = ("kernel", "qkv", "q", "k", "v", "out", "gate", "up", "down", "projection")
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in names, params)


def _group(params: Any) -> Any:
    def name(path, _):
        if path[0].key == "language":
            return "language"
        return "codebooks" if path[-1].key == "codebooks" else "network"

    return jax.tree_util.tree_map_with_path(name, params)


def trainable(config: TrainConfig, params: Any) -> Any:
    """The part of the parameters that this run trains."""
    return params if config.trainable == "all" else {config.trainable: params[config.trainable]}


def init_state(
    config: TrainConfig,
    codec: CodecConfig,
    params: Any = None,
    discriminators: Any = None,
    language: LanguageConfig | None = None,
) -> TrainState:
    """A fresh state, a pure function of the configs and of parameters to start from."""
    key, params = jax.random.key(config.seed), params or {}
    if "encoder" not in params:
        params = params | _init_params(config, codec, key)
    if language is not None and "language" not in params:
        head = language_models.init(language, jax.random.fold_in(key, 3))
        params = params | {"language": head}
    discriminator_opt_state = None
    if not config.adversarial:
        discriminators = None
    elif discriminators is None:
        discriminators = init_discriminators(config, codec)
    if config.adversarial:
        discriminator_opt_state = discriminator_optimizer(config).init(discriminators)
    quantizer = codec.quantizer
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params) if config.ema_decay else None,
        opt_state=generator_optimizer(config).init(trainable(config, params)),
        discriminators=discriminators,
        discriminator_opt_state=discriminator_opt_state,
        code_counts=jnp.zeros((quantizer.num_quantizers, quantizer.codebook_size)),
        totals=zero_totals(config),
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_row=jnp.zeros((), jnp.int32),
        failed_reads=jnp.zeros((), jnp.int32),
    )


def zero_totals(config: TrainConfig) -> Totals:
    """Totals of no steps."""
    names = term_names(config)
    norms = ("gradient_norm", "discriminator_gradient_norm")[: 1 + config.adversarial]
    # Each its own array: they are donated.
    counts = ("text_steps",) if SEMANTIC_TERM in names else ()
    metrics = {name: jnp.zeros(()) for name in ("loss", *names, *norms, *counts)}
    domain_terms = {name: jnp.zeros(len(DOMAINS)) for name in ("loss", *names)}
    domain_terms.pop(SEMANTIC_TERM, None)  # a mean over the items with text, of any domain
    return Totals(jnp.zeros(()), metrics, jnp.zeros(len(DOMAINS)), domain_terms)


def state_shapes(
    config: TrainConfig,
    codec: CodecConfig,
    mesh: jax.sharding.Mesh,
    language: LanguageConfig | None = None,
) -> TrainState:
    """ShapeDtypeStructs of the state of a run, with their shardings on `mesh`.

    What belongs to a parameter (moments, averages) is split like it, the rest is replicated.

    Raises:
      ValueError: A large parameter would be replicated, see `sharding.param_shardings`.
    """
    boxed = pretrained.boxed_shapes(codec)
    if language is not None:
        boxed = boxed | {"language": language_models.boxed_shapes(language)}
    if config.adversarial:
        boxed = boxed | jax.eval_shape(lambda: _boxed_discriminators(config, codec))
    shardings = sharding.param_shardings(boxed, mesh)
    known = {
        tuple(key.key for key in path): value
        for path, value in jax.tree_util.tree_leaves_with_path(shardings)
    }

    def add_sharding(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = tuple(getattr(key, "key", None) for key in path)
        tails = (names[start:] for start in range(len(names)))
        found = next((known[tail] for tail in tails if tail in known), sharding.replicated(mesh))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=found)

    shapes = jax.eval_shape(lambda: init_state(config, codec, language=language))
    return jax.tree_util.tree_map_with_path(add_sharding, shapes)


def init_discriminators(config: TrainConfig, codec: CodecConfig) -> Any:
    """Fresh parameters of the discriminators."""
    return nn.meta.unbox(_boxed_discriminators(config, codec))


def _boxed_discriminators(config: TrainConfig, codec: CodecConfig) -> Any:
    model = Discriminators(config.discriminators, config.dtype)
    key = jax.random.fold_in(jax.random.key(config.seed), 2)
    return model.init(key, jnp.zeros((1, codec.num_channels, 4096)))["params"]


def _init_params(config: TrainConfig, codec: CodecConfig, key: jax.Array) -> Any:
    wav = jnp.zeros((1, codec.num_channels, codec.hop_length))
    params = nn.meta.unbox(CodecModel(codec, config.compute).init(key, wav)["params"])
    for side in ("encoder", "decoder"):
        params[side] = _low_pass(getattr(codec, side), params[side], side)
    return params | {"quantizer": _paired(params["quantizer"])}


# Brings speech (RMS about 0.05) to the size of what the first blocks add to it.
_INPUT_GAIN = 2.0


def _low_pass(modules: tuple[ModuleConfig, ...], stages: Any, side: str) -> Any:
    """Makes the projections of a side those of a linear codec that keeps low frequencies.

    The first projection is the DCT of a patch, the others keep what comes first, and the decoder's
    are their transposes: what the blocks then learn is added to a waveform that is right already.
    From random projections a small model does not find even the principal components within
    hours; its audio is noise of the right colour, without pitch (experiments/README.md).
    """
    stages = dict(stages)
    for i, module in enumerate(modules):
        if not isinstance(module, TransformerConfig):
            continue
        sizes = {
            "input_projection": (module.input_dim, module.model_dim),
            "output_projection": (module.model_dim, module.output_dim),
        }
        kernels = {name: np.eye(*size) for name, size in sizes.items()}
        if side == "encoder" and i == 1:
            kernels["input_projection"] = _INPUT_GAIN * _dct(*sizes["input_projection"])
        if side == "decoder" and i == len(modules) - 2:
            kernels["output_projection"] = _dct(*sizes["output_projection"][::-1]).T / _INPUT_GAIN
        for name, kernel in kernels.items():
            if name in stages[f"stage_{i}"]:
                kernel = {"kernel": jnp.asarray(kernel, jnp.float32)}
                stages[f"stage_{i}"] = stages[f"stage_{i}"] | {name: kernel}
    return stages


def _dct(num_samples: int, num_coefficients: int) -> np.ndarray:
    """Orthonormal DCT-II [samples, coefficients], cut or padded with zeros."""
    kernel = np.zeros((num_samples, num_coefficients))
    kept = min(kernel.shape)
    kernel[:, :kept] = scipy.fft.dct(np.eye(num_samples), norm="ortho")[:, :kept]
    return kernel


def _paired(quantizer: dict[str, Any]) -> dict[str, Any]:
    """Makes every projection orthonormal and the one that undoes it its transpose.

    With unrelated projections a code's value does not resemble the residual it stands for, and the
    losses grow instead of falling; so they do with large codebooks. The outer projections keep the
    first of the latents' dimensions, see `_low_pass`; for the quantizers' see `_seen_first`.

    The last of a quantizer's dimensions starts as the constant 1 in residuals and codes. Codes are
    chosen by angle, which says nothing of a residual's size: quiet frames would get codes of any
    size. Among vectors that end in the same 1, the nearest in angle is the nearest in distance.
    """
    quantizer = quantizer | {"codebooks": 0.1 * quantizer["codebooks"]}
    if "input_projection" in quantizer:
        kernel = jnp.eye(*quantizer["input_projection"]["direction"].shape)
        quantizer = _set_pair(quantizer, ("input_projection", "output_projection"), kernel)
    if "in_projections" in quantizer:
        kernel = _seen_first(*quantizer["in_projections"]["direction"].shape)
        quantizer = _set_pair(quantizer, ("in_projections", "out_projections"), kernel)
        bias = quantizer["in_projections"]["bias"].at[..., -1].set(1)
        quantizer["in_projections"] = quantizer["in_projections"] | {"bias": bias}
        quantizer["codebooks"] = quantizer["codebooks"].at[..., -1].set(1)
    return quantizer


def _seen_first(num_quantizers: int, rvq_dim: int, codebook_dim: int) -> jax.Array:
    """Kernels [Q, rvq_dim, codebook_dim] that pick dimensions; the last column is left zero.

    A quarter of the quantizers at a time share a block of dimensions, dealt out like cards: first
    one block, then the next, and the same two again for what is left of them. With directions
    drawn at random, each quantizer sees a random tenth of the residual's energy, and the last ones
    hardly anything that the ones before had not seen.
    """
    seen = min(codebook_dim - 1, rvq_dim)
    group = max(1, num_quantizers // 4)
    stride = min(group, rvq_dim // max(1, seen))  # where they are few, blocks overlap
    columns = np.arange(seen)
    kernel = np.zeros((num_quantizers, rvq_dim, codebook_dim), np.float32)
    for n in range(num_quantizers):
        start = n // group % 2 * group * seen + n % group
        kernel[n, (start + columns * stride) % rvq_dim, columns] = 1
    return jnp.asarray(kernel)


def _set_pair(quantizer: dict[str, Any], names: tuple[str, str], kernel: jax.Array) -> Any:
    """Sets a projection to `kernel` and, where the shapes allow, the second to its transpose."""
    quantizer = dict(quantizer)
    for name, value in zip(names, (kernel, kernel.swapaxes(-1, -2)), strict=True):
        if name in quantizer and quantizer[name]["direction"].shape == value.shape:
            quantizer[name] = quantizer[name] | _weight_norm(value, quantizer[name]["direction"])
    return quantizer


def _weight_norm(kernel: jax.Array, random: jax.Array) -> dict[str, jax.Array]:
    """Directions and gains of a kernel; a column of zeros keeps its random direction."""
    gain = jnp.linalg.norm(kernel, axis=-2)
    return {"direction": jnp.where(gain[..., None, :] > 0, kernel, random), "gain": gain}
