"""The second stage: a codec against discriminators, which learn along and are saved with it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moss_tok.codec.config import CodecConfig
from moss_tok.objectives import audio, losses
from moss_tok.objectives.codec import CodecObjective, arguments
from moss_tok.objectives.config import AdversarialSettings
from moss_tok.objectives.discriminators import Discriminators, judges
from moss_tok.training import checkpoints, microbatches, optimizer
from moss_tok.training.config import OptimizerConfig, TrainConfig
from moss_tok.training.objective import Batch, Learned, Term, combine

FOLDER = "discriminators"
_OPT_STATE = "discriminator_opt_state"
_QUIETEST_PEAK = 0.01  # what peaks below stays quiet for the discriminators


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdversarialObjective(CodecObjective):
    """The terms of `CodecObjective`, and those of least-squares discriminators.

    Attributes:
      adversarial: See `AdversarialSettings`.
    """

    adversarial: AdversarialSettings

    norm_names = ("discriminator_gradient_norm",)
    extra_folders = (FOLDER,)

    @property
    def term_names(self) -> tuple[str, ...]:
        """All terms of both losses."""
        own = ("adversarial_loss", "feature_matching_loss", "discriminator_loss")
        return super().term_names + own

    def init_extra(self, key: jax.Array) -> dict[str, Any]:
        """Parameters of the discriminators."""
        model = Discriminators(self.adversarial.discriminators, self.compute.dtype)
        wav = jnp.zeros((1, self.codec.num_channels, 4096))
        params = model.init(jax.random.fold_in(key, 2), wav)["params"]
        return super().init_extra(key) | {FOLDER: params}

    def init_extra_optimizers(
        self, config: OptimizerConfig, extra: dict[str, Any]
    ) -> dict[str, Any]:
        """The state of the discriminators' optimizer."""
        return {_OPT_STATE: self._optimizer(config, extra[FOLDER]).init(extra[FOLDER])}

    def _optimizer(self, config: OptimizerConfig, params: Any) -> optax.GradientTransformation:
        nothing = jax.tree.map(lambda _: False, params)  # decays
        rate = self.adversarial.discriminator_learning_rate
        clip = optax.clip_by_global_norm(self.adversarial.discriminator_gradient_clip)
        return optax.chain(clip, optimizer.adamw(config, rate, nothing))

    def train_extra(
        self,
        config: OptimizerConfig,
        extra: dict[str, Any],
        parts: Batch,
        outputs: dict[str, jax.Array],
    ) -> Learned:
        """A step of the discriminators, on recordings and reconstructions."""
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
        self, params: Any, parts: Batch, wav_hat: jax.Array
    ) -> tuple[Any, jax.Array]:
        """Mean gradient over all microbatches, and the loss of each item [M, B], their mean.

        One discriminator begins when the last one is done, so that only one's features are held.
        """
        num_parts = wav_hat.shape[0]

        def loss(judge, name, part, wav_hat):
            # At once: half as many convolutions, which take a TPU's compiler seconds each.
            real, fake = self.judge(name, judge, part, part["wav"], wav_hat)
            per_item = losses.discriminator_loss(real, fake) / len(params)
            return per_item.mean() / num_parts, per_item

        def accumulate(total, inputs):
            part, wav_hat = inputs
            gradient, per_item = {}, 0.0
            for name in params:
                found, judged = jax.grad(loss, has_aux=True)(params[name], name, part, wav_hat)
                gradient[name], wav_hat = jax.lax.optimization_barrier((found, wav_hat))
                per_item += judged
            return jax.tree.map(jnp.add, total, gradient), per_item

        zeros = jax.tree.map(jnp.zeros_like, params)
        return microbatches.scan(accumulate, zeros, (parts, jax.lax.stop_gradient(wav_hat)))

    def output_gradient(
        self, extra: dict[str, Any], part: Batch, outputs: dict[str, jax.Array], num_parts: int
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Adds what the discriminators say of the reconstructions."""
        gradient, values = super().output_gradient(extra, part, outputs, num_parts)
        judged, judged_values = self._judged(extra[FOLDER], part, outputs["wav_hat"], num_parts)
        gradient["wav_hat"] += judged
        loss = values.pop("loss")
        for name, weight in self._weights().items():
            loss += weight * judged_values[name]
        return gradient, values | judged_values | {"loss": loss}

    def _weights(self) -> dict[str, float]:
        return {
            "adversarial_loss": self.adversarial.adversarial_weight,
            "feature_matching_loss": self.adversarial.feature_matching_weight,
        }

    def _judged(
        self, params: Any, part: Batch, wav_hat: jax.Array, num_parts: int
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Gradient in a reconstruction of the discriminators' terms, and these per item.

        One after the other, as in `discriminator_gradient`.
        """
        weights = self._weights()

        def loss(wav_hat, name):
            # One by one: no gradient of what the recording gives.
            (real,) = self.judge(name, params[name], part, part["wav"])
            (fake,) = self.judge(name, params[name], part, wav_hat)
            values = {
                "adversarial_loss": losses.adversarial_loss(fake) / len(params),
                "feature_matching_loss": losses.feature_matching_loss(real, fake) / len(params),
            }
            terms = {key: Term(value, weights[key]) for key, value in values.items()}
            total, values = combine(terms, part)
            return total.mean() / num_parts, values

        total = None
        for name in params:
            found = jax.grad(loss, has_aux=True)(wav_hat, name)
            total = found if total is None else jax.tree.map(jnp.add, total, found)
            total, wav_hat = jax.lax.optimization_barrier((total, wav_hat))
        return total

    def judge(self, name: str, params: Any, part: Batch, *wavs: jax.Array) -> list[losses.Features]:
        """What one discriminator makes of each of `wavs` [B, C, S], padding zeroed: its features.

        A recording and its reconstruction are brought to the level at which the recording peaks
        at 1.
        """
        wav = jnp.stack(wavs, axis=1)  # [B, W, C, S]
        valid = jnp.arange(wav.shape[-1]) < part["length"][:, None, None]
        peak = jnp.abs(jnp.where(valid, part["wav"], 0)).max((1, 2))
        wav = jnp.where(valid[:, None], wav, 0)
        wav = wav / jnp.maximum(peak, _QUIETEST_PEAK)[:, None, None, None]
        judge = judges(self.adversarial.discriminators, self.compute.dtype)[name]
        features = judge.apply({"params": params}, wav.reshape(-1, *wav.shape[2:]))
        features = [x.reshape(*wav.shape[:2], *x.shape[1:]) for x in features]
        return [[x[:, i] for x in features] for i in range(len(wavs))]

    def start_extra(self, init_from: str, extra: Any) -> dict[str, Any]:
        """The discriminators of `init_from`, where it has some."""
        params = checkpoints.load_folder(init_from, FOLDER, extra[FOLDER]) if init_from else None
        return {} if params is None else {FOLDER: params}


def build(config: TrainConfig, codec: CodecConfig | None = None) -> AdversarialObjective:
    """The objective of a run; ValueError where a model does not exist or does not fit.

    `codec` is what is trained; default: what the settings and the workdir say.
    """
    settings = config.objective
    codec = codec or audio.codec_of_run(config)
    return AdversarialObjective(
        **arguments(config, settings.codec, codec), settings=settings.codec, adversarial=settings
    )
