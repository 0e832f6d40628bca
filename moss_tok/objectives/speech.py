"""Speech synthesis: a speech model learns to predict the codes of a frozen codec from texts."""

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moss_tok import sharding, storage
from moss_tok.codec.config import CodecConfig
from moss_tok.codec.inference import decode_one
from moss_tok.data import code_batches, speech_batches
from moss_tok.data.codes import Item
from moss_tok.data.speech_batches import Sample, SpeechShape
from moss_tok.language.text import Tokenizer
from moss_tok.nn.compute import ComputeConfig
from moss_tok.objectives import code_use, speech_data
from moss_tok.objectives.config import SpeechSettings
from moss_tok.speech import generate, pretrained
from moss_tok.speech.config import SpeechConfig
from moss_tok.speech.layout import Request
from moss_tok.speech.model import SpeechModel
from moss_tok.speech.steps import Speech
from moss_tok.training.config import TrainConfig
from moss_tok.training.objective import (
    Batch,
    Evaluation,
    Objective,
    Progress,
    Say,
    Term,
    TrainingData,
)

TEXT = "text_loss"
FIRST = "first_code_loss"
OTHERS = "other_codes_loss"
_EVALUATION_BATCH = 8
_NUM_SAMPLES = 3  # texts that are spoken in an evaluation


@dataclasses.dataclass(frozen=True)
class SpeechObjective(Objective):
    """Cross-entropies of the text channel and of the codes.

    Attributes:
      settings: See `SpeechSettings`.
      config: The speech model.
      compute: Compute settings of the model.
      max_frames: Longest recording, in frames.
      tokenizer: Tokenizer of the texts.
    """

    settings: SpeechSettings
    config: SpeechConfig
    compute: ComputeConfig
    max_frames: int
    tokenizer: Tokenizer = dataclasses.field(compare=False)

    @property
    def term_names(self) -> tuple[str, ...]:
        """The text channel, the first quantizer, and the others if there are any."""
        return (TEXT, FIRST, OTHERS)[: 1 + min(2, self.config.num_quantizers)]

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Parameters of the speech model."""
        return pretrained.init_boxed(self.config, key)

    @property
    def num_positions(self) -> int:
        """Positions of the longest sequence."""
        return speech_data.longest(self.config, self.tokenizer, self.settings, self.max_frames)

    # ------------------------------------------------------------------- the step

    def item_shapes(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """See `speech_batches.batches`; those of the longest sequences."""
        size, num_targets = speech_batches.array_sizes(self.num_positions, self.max_frames)
        scalar = ((), jnp.int32)
        return {
            "text": ((size,), jnp.int32),
            "codes": ((self.config.num_quantizers, size), jnp.int32),
            "first": scalar,
            "length": scalar,
            "num_quantizers": scalar,
            "targets": ((num_targets,), jnp.int8),
        }

    def prepare(self, key: jax.Array, step: jax.Array, batch: Batch) -> Batch:
        """Adds "in_use", bool [B, Q], the quantizers that Progressive Sequence Dropout leaves.

        Also adds "scale" [B, 3], with which the mean over the items of a batch becomes the mean
        over its tokens. Source of the dropout: arXiv 2602.10934.
        """
        del step
        num_quantizers = self.config.num_quantizers
        probability = self.settings.sequence_dropout
        largest = max(1, num_quantizers - 1)
        in_use = code_use.draw_dropout(num_quantizers, probability, key, batch["position"], largest)
        in_use &= jnp.arange(in_use.shape[1]) < batch["num_quantizers"][:, None]
        counts = self.count_tokens(batch | {"in_use": in_use})
        scale = len(in_use) / jnp.maximum(counts.sum(0), 1)
        return batch | {"in_use": in_use, "scale": jnp.broadcast_to(scale, counts.shape)}

    def count_tokens(self, batch: Batch) -> jax.Array:
        """Predicted tokens of each term, float32 [B, 3]."""
        num_targets = batch["length"] - batch["first"]
        num_frames = jnp.maximum(num_targets - 1, 0)
        num_others = batch["in_use"].sum(-1) - 1
        counts = jnp.stack([num_targets, num_frames, num_frames * num_others], axis=-1)
        return counts.astype(jnp.float32)

    def outputs(self, params: dict[str, Any], part: Batch) -> tuple[dict[str, jax.Array], Any]:
        """The terms, scaled so that their mean over items is the mean over tokens."""
        sums = self.cross_entropies(params, part)
        scaled = sums * part["scale"]
        return {name: scaled[:, i] for i, name in enumerate(self.term_names)}, None

    def cross_entropies(self, params: dict[str, Any], part: Batch) -> jax.Array:
        """Cross-entropies in nats, summed over the tokens of each item and term, [B, 3]."""
        model = SpeechModel(self.config, self.compute)
        apply = functools.partial(model.apply, {"params": params})
        x = apply(part["text"], part["codes"], part["in_use"], method="embed")
        states, _ = apply(x, method="temporal_states")
        # Only the positions before targets go through the depth Transformer.
        positions = part["first"][:, None] - 1 + jnp.arange(part["targets"].shape[1])  # [B, F]
        last = part["length"][:, None] - 1
        is_valid = positions < last
        positions = jnp.minimum(positions, last)
        next_positions = jnp.minimum(positions + 1, last)
        states = jnp.take_along_axis(states, positions[..., None], axis=1)
        text = jnp.take_along_axis(part["text"], next_positions, axis=1)
        codes = jnp.take_along_axis(part["codes"], next_positions[:, None], axis=2)

        channels = apply(states, text, codes, method="channel_states")  # [B, F, C, D]

        def compute_losses(channels, text, codes):
            text_logits, code_logits = apply(channels, method="logits")
            cross_entropy = optax.softmax_cross_entropy_with_integer_labels
            return cross_entropy(text_logits, text), cross_entropy(code_logits, codes)

        if self.compute.remat != "none":  # logits of the whole vocabulary are large
            compute_losses = jax.checkpoint(compute_losses)
        text_losses, code_losses = compute_losses(channels, text, codes)  # [B, F], [B, Q, F]
        is_frame = is_valid & (next_positions < last)  # the last position is the end of speech
        is_predicted = is_frame[:, None] & part["in_use"][..., None]
        code_losses = jnp.where(is_predicted, code_losses, 0).sum(-1)
        text_loss = jnp.where(is_valid, text_losses, 0).sum(-1)
        return jnp.stack([text_loss, code_losses[:, 0], code_losses[:, 1:].sum(-1)], axis=-1)

    def terms(self, part: Batch, outputs: dict[str, jax.Array]) -> dict[str, Term]:
        """The terms; the weight of a term is that of its channels together, and all sum to 1."""
        del part
        settings = self.settings
        others_weight = settings.other_codes_weight * (self.config.num_quantizers - 1)
        weights = (settings.text_weight, settings.first_code_weight, others_weight)
        total = sum(weights)
        return {
            name: Term(outputs[name], weight / total)
            for name, weight in zip(self.term_names, weights, strict=False)
        }

    # ------------------------------------------------------------------- on the host

    def files(self) -> dict[str, str]:
        """The config and the tokenizer of the speech model."""
        return pretrained.files(self.config, self.tokenizer)

    def start(
        self, init_from: str, params: Any, extra: Any, say: Say
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The parameters of `init_from`."""
        del extra
        if not init_from:
            return {}, {}
        loaded = pretrained.load(init_from).params
        say(f"starting from the speech model of {init_from}")
        return sharding.whole(loaded, jax.tree.map(lambda x: x.sharding, params)), {}

    def find_data(self, config: TrainConfig, mirror: storage.Mirror, say: Say) -> TrainingData:
        """Opens codes; ValueError if they are of another codec."""
        del mirror
        return speech_data.find_data(config, self.shape(), say)

    def shape(self) -> SpeechShape:
        """The sizes of sequences, and the limits of recordings."""
        return SpeechShape(
            self.config,
            self.tokenizer,
            self.max_frames,
            self.settings.max_text_tokens,
            self.settings.reference_share,
        )

    def evaluate(
        self, params: dict[str, Any], data: TrainingData, say: Say, progress: Progress
    ) -> Evaluation | None:
        """Scores held-out recordings, and speaks a few of their texts."""
        del say
        items = data.held_out()
        if not items:
            return None
        with progress(len(items), "recording") as done:
            means = self._score(params, items, done)
        scores = {name: float(mean) for name, mean in zip(self.term_names, means, strict=False)}
        listing = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
        samples, rate, lengths = self._speak(params, items)
        text = f"{len(items)} recordings, mean cross-entropies: {listing}\n{lengths}"
        return Evaluation({"speech": {"all quantizers": scores}}, text, samples, rate)

    def _score(self, params: dict[str, Any], items: Sequence[Item], done: Any) -> np.ndarray:
        """Mean cross-entropies per token, [3]."""
        shape = self.shape()
        sums = np.zeros(3)
        counts = np.zeros(3)
        for start in range(0, len(items), _EVALUATION_BATCH):
            some_items = items[start : start + _EVALUATION_BATCH]
            samples = [speech_batches.sample(shape, item) for item in some_items]
            batch = self._evaluation_batch(samples)
            batch_sums, batch_counts = _sums(self, params, batch)
            sums += np.asarray(batch_sums).sum(0)
            counts += np.asarray(batch_counts).sum(0)
            for _ in samples:
                done()
        return sums / np.maximum(counts, 1)

    def _evaluation_batch(self, samples: Sequence[Sample]) -> Batch:
        """A batch of at most _EVALUATION_BATCH sequences, with all their quantizers in use."""
        longest = max(len(sample.positions.text) for sample in samples)
        size = code_batches.bucket_size(longest, 2**31)
        padding = [None] * (_EVALUATION_BATCH - len(samples))
        rows = []
        for sample in [*samples, *padding]:
            rows.append(speech_batches.arrays(self.config, sample, (size, size)))
        batch = jax.tree.map(lambda *arrays: np.stack(arrays), *rows)
        num_quantizers = batch["num_quantizers"][:, None]
        batch["in_use"] = np.arange(self.config.num_quantizers) < num_quantizers
        return batch

    def _speak(
        self, params: dict[str, Any], items: Sequence[Item]
    ) -> tuple[dict[str, dict[str, np.ndarray]], int, str]:
        """Speaks a few held-out texts.

        Returns:
          Audio of the recordings, decoded from their codes, and of the model by name; its sample
          rate; and a line about the durations.
        """
        if not self.settings.codec:
            return {}, 0, ""
        codec = speech_data.load_decoder(self.settings.codec)
        speech = Speech(params, self.config, self.tokenizer)
        chosen = choose_samples(speech, items)
        requests = [request for _, request in chosen]
        spoken = generate.generate(speech, requests)
        samples = {}
        lengths = []
        for number, ((item, request), result) in enumerate(zip(chosen, spoken, strict=True), 1):
            recorded = decode_one(codec, item.codes.astype(np.int32))
            samples[f"speech_{number}"] = {
                "recorded": recorded,
                "spoken": decode_one(codec, result.codes),
            }
            seconds = result.codes.shape[1] / self.config.frame_rate
            ending = "" if result.ended else ", cut"
            recorded_seconds = item.codes.shape[1] / self.config.frame_rate
            lengths.append(f"{request.text!r} {seconds:.2f} s{ending} ({recorded_seconds:.2f} s)")
        return samples, codec.config.sample_rate, "spoken (recorded): " + "; ".join(lengths)


def choose_samples(speech: Speech, items: Sequence[Item]) -> list[tuple[Item, Request]]:
    """A few recordings, evenly spread, and their requests; without texts that cannot be said."""
    speakable = []
    for item in items:
        request = speech_batches.request_of(item)
        with contextlib.suppress(ValueError):  # it must not end a run
            generate.check_request(speech, request)
            speakable.append((item, request))
    step = max(1, len(speakable) // _NUM_SAMPLES)
    return speakable[::step][:_NUM_SAMPLES]


@functools.partial(jax.jit, static_argnums=0)
def _sums(
    objective: SpeechObjective, params: dict[str, Any], part: Batch
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropies and numbers of tokens, [B, 3] each."""
    return objective.cross_entropies(params, part), objective.count_tokens(part)


def build(config: TrainConfig, codec: CodecConfig | None = None) -> SpeechObjective:
    """The objective of a run.

    Args:
      config: The run.
      codec: The codec of the codes, if its weights need not be read; default: that of the flag.

    Raises:
      ValueError: A model or codec does not exist, or they do not fit.
    """
    model, tokenizer = speech_data.find_model(config, codec)
    settings = config.objective
    if model.num_quantizers == 1 and not settings.text_weight + settings.first_code_weight:
        raise ValueError("text_weight and first_code_weight are both 0, and there are no others")
    return SpeechObjective(
        settings,
        model,
        config.devices.compute,
        speech_data.max_frames(config, model.frame_rate),
        tokenizer,
    )
