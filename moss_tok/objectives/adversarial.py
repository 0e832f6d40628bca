"""The second stage: a codec trained against discriminators, which are saved with it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moss_tok.codec.config import CodecConfig
from moss_tok.objectives import losses
from moss_tok.objectives.codec import CodecObjective, arguments
from moss_tok.objectives.config import AdversarialSettings
from moss_tok.objectives.discriminators import Discriminators, make_discriminators
from moss_tok.training import checkpoints, microbatches, optimizer
from moss_tok.training.config import OptimizerConfig, TrainConfig
from moss_tok.training.objective import Arrays, Batch, Extra, Learned, Term, combine

FOLDER = "discriminators"
_OPT_STATE = "discriminator_opt_state"
_QUIETEST_PEAK = 0.01  # audio with a lower peak is not raised to a peak of 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdversarialObjective(CodecObjective):
    """The terms of `CodecObjective`, and those of least-squares adversarial training.

    Attributes:
      adversarial: See `AdversarialSettings`.
    """

    adversarial: AdversarialSettings

    norm_names = ("discriminator_gradient_norm",)
    extra_folders = (FOLDER,)

    @property
    def term_names(self) -> tuple[str, ...]:
        """All terms of the generator's and the discriminators' loss."""
        adversarial = ("adversarial_loss", "feature_matching_loss", "discriminator_loss")
        return super().term_names + adversarial

    def good_signs(self) -> str:
        """Those of the first stage, and of the discriminators."""
        return f"{super().good_signs()}, discriminator falls below 0.5 (guessing) but not to 0"

    def init_extra(self, key: jax.Array) -> Extra:
        """Initial parameters of the discriminators."""
        model = Discriminators(self.adversarial.discriminators, self.compute.dtype)
        wav = jnp.zeros((1, self.codec.num_channels, 4096))
        params = model.init(jax.random.fold_in(key, 2), wav)["params"]
        return super().init_extra(key) | {FOLDER: params}

    def init_extra_optimizers(
        self,
        config: OptimizerConfig,
        extra: Extra,
    ) -> Extra:
        """The state of the discriminators' optimizer."""
        return {_OPT_STATE: self._optimizer(config, extra[FOLDER]).init(extra[FOLDER])}

    def _optimizer(self, config: OptimizerConfig, params: Any) -> optax.GradientTransformation:
        no_decay = jax.tree.map(lambda _: False, params)
        rate = self.adversarial.discriminator_learning_rate
        clip = optax.clip_by_global_norm(self.adversarial.discriminator_gradient_clip)
        return optax.chain(clip, optimizer.adamw(config, rate, no_decay))

    def train_extra(
        self,
        config: OptimizerConfig,
        extra: Extra,
        parts: Batch,
        outputs: Arrays,
    ) -> Learned:
        """Updates the discriminators on recordings and reconstructions."""
        params = extra[FOLDER]
        gradient, loss = self.discriminator_gradient(params, parts, outputs["wav_hat"])
        transformation = self._optimizer(config, params)
        params, opt_state = optimizer.update(transformation, gradient, extra[_OPT_STATE], params)
        return Learned(
            extra={FOLDER: params, _OPT_STATE: opt_state},
            terms={"discriminator_loss": loss},
            norms={"discriminator_gradient_norm": optax.tree.norm(gradient)},
        )

    def discriminator_gradient(
        self,
        params: Any,
        parts: Batch,
        wav_hat: jax.Array,
    ) -> tuple[Any, jax.Array]:
        """Mean gradient over all microbatches, and the mean discriminator loss per item [M, B].

        The discriminators run one after another, so that memory holds the features of one only.
        """
        num_parts = wav_hat.shape[0]

        def loss(params_of_one, name, part, wav_hat):
            # Both signals are in one call. This halves the number of convolutions, and the compiler
            # for TPUs needs seconds for each of them.
            real, fake = self.features(name, params_of_one, part, part["wav"], wav_hat)
            per_item = losses.discriminator_loss(real, fake) / len(params)
            return per_item.mean() / num_parts, per_item

        def accumulate(total, inputs):
            part, wav_hat = inputs
            gradient = {}
            sum_per_item = 0.0
            for name in params:
                gradient_of_one, per_item = jax.grad(loss, has_aux=True)(
                    params[name], name, part, wav_hat
                )
                gradient[name], wav_hat = jax.lax.optimization_barrier((gradient_of_one, wav_hat))
                sum_per_item += per_item
            return jax.tree.map(jnp.add, total, gradient), sum_per_item

        zeros = jax.tree.map(jnp.zeros_like, params)
        return microbatches.scan(accumulate, zeros, (parts, jax.lax.stop_gradient(wav_hat)))

    def output_gradient(
        self,
        extra: Extra,
        part: Batch,
        outputs: Arrays,
        num_parts: int,
    ) -> tuple[Arrays, Arrays]:
        """Adds the adversarial and feature matching terms and their gradients."""
        gradient, values = super().output_gradient(extra, part, outputs, num_parts)
        wav_gradient, adversarial_values = self._adversarial_gradient(
            extra[FOLDER], part, outputs["wav_hat"], num_parts
        )
        gradient["wav_hat"] += wav_gradient
        loss = values.pop("loss")
        for name, weight in self._weights().items():
            loss += weight * adversarial_values[name]
        return gradient, values | adversarial_values | {"loss": loss}

    def _weights(self) -> dict[str, float]:
        return {
            "adversarial_loss": self.adversarial.adversarial_weight,
            "feature_matching_loss": self.adversarial.feature_matching_weight,
        }

    def _adversarial_gradient(
        self,
        params: Any,
        part: Batch,
        wav_hat: jax.Array,
        num_parts: int,
    ) -> tuple[jax.Array, Arrays]:
        """Gradient of the adversarial terms with respect to `wav_hat`, and the terms per item.

        The discriminators run one after another, as in `discriminator_gradient`.
        """
        weights = self._weights()

        def loss(wav_hat, name):
            # In two calls, because features of the recording need no gradient.
            (real,) = self.features(name, params[name], part, part["wav"])
            (fake,) = self.features(name, params[name], part, wav_hat)
            values = {
                "adversarial_loss": losses.adversarial_loss(fake) / len(params),
                "feature_matching_loss": losses.feature_matching_loss(real, fake) / len(params),
            }
            terms = {key: Term(value, weights[key]) for key, value in values.items()}
            total, values = combine(terms, part)
            return total.mean() / num_parts, values

        total = None  # (gradient, terms)
        for name in params:
            result = jax.grad(loss, has_aux=True)(wav_hat, name)
            total = result if total is None else jax.tree.map(jnp.add, total, result)
            total, wav_hat = jax.lax.optimization_barrier((total, wav_hat))
        return total

    def features(
        self,
        name: str,
        params: Any,
        part: Batch,
        *wavs: jax.Array,
    ) -> list[losses.Features]:
        """Features of one discriminator for each of `wavs` [B, C, S]; padding is set to 0.

        All are scaled by the factor that brings the peak of the recording in `part` to 1.
        """
        wav = jnp.stack(wavs, axis=1)  # [B, W, C, S]
        is_valid = jnp.arange(wav.shape[-1]) < part["length"][:, None, None]
        recording = jnp.where(is_valid, part["wav"], 0)
        peak = jnp.abs(recording).max((1, 2))
        wav = jnp.where(is_valid[:, None], wav, 0)
        wav = wav / jnp.maximum(peak, _QUIETEST_PEAK)[:, None, None, None]
        models = make_discriminators(self.adversarial.discriminators, self.compute.dtype)
        items = wav.reshape(-1, *wav.shape[2:])  # [B * W, C, S]
        layers = models[name].apply({"params": params}, items)
        features: list[losses.Features] = [[] for _ in wavs]
        for layer in layers:
            layer = layer.reshape(*wav.shape[:2], *layer.shape[1:])  # [B, W, ...]
            for number, of_wav in enumerate(features):
                of_wav.append(layer[:, number])
        return features

    def start_extra(self, init_from: str, extra: Any) -> Extra:
        """The discriminators of `init_from`, if it has any."""
        if not init_from:
            return {}
        params = checkpoints.load_folder(init_from, FOLDER, extra[FOLDER])
        return {} if params is None else {FOLDER: params}


def build(config: TrainConfig, codec: CodecConfig | None = None) -> AdversarialObjective:
    """The objective of a run.

    Args:
      config: The run.
      codec: The codec to train, if no checkpoint is to be read; default: that of the workdir or of
        the settings.

    Raises:
      ValueError: A model does not exist or does not fit.
    """
    settings = config.objective
    return AdversarialObjective(
        **arguments(config, settings.codec, codec), settings=settings.codec, adversarial=settings
    )
