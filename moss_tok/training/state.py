"""The train state: everything a step changes, as one pytree."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from moss_tok import sharding
from moss_tok.audio.manifest import DOMAINS
from moss_tok.codec import init as codec_init
from moss_tok.codec import pretrained
from moss_tok.codec.config import CodecConfig
from moss_tok.language import pretrained as language_models
from moss_tok.language.config import LanguageConfig
from moss_tok.training.config import TrainConfig
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
        params = params | codec_init.init_params(codec, key)
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
