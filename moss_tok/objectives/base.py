"""The base of the objectives on a codec: its parameters, its batches, and counts of its codes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moss_tok import sharding, storage
from moss_tok.codec import init as codec_init
from moss_tok.codec import pretrained
from moss_tok.codec.config import CodecConfig
from moss_tok.codec.quantizer import Quantized
from moss_tok.language import pretrained as language_models
from moss_tok.language.config import LanguageConfig
from moss_tok.language.text import Tokenizer
from moss_tok.nn.compute import ComputeConfig
from moss_tok.objectives import audio, code_use, text
from moss_tok.training.config import TrainConfig
from moss_tok.training.objective import (
    Arrays,
    Batch,
    Extra,
    Objective,
    Params,
    Say,
    TrainingData,
    Trees,
    Update,
)

COUNTS = "code_counts"  # entry of the extra state


@dataclasses.dataclass(frozen=True)
class CodecBasedObjective(Objective):
    """Parameters, batches, extra state and files of a codec, with or without a language model.

    Attributes:
      settings: Settings with the fields `codes` and `text`, see `CodesSettings`, `TextSettings`.
      codec: The codec.
      compute: Compute settings of the models.
      num_samples: S, samples of a segment, whole frames.
      trainable: The part that is trained: "all", "decoder" or "language".
      fresh: Whether codebooks start from initial values, not from `init_from`.
      language: The language model that reads the codes; None without one.
      tokenizer: Tokenizer of its texts.
    """

    settings: Any
    codec: CodecConfig
    compute: ComputeConfig
    num_samples: int
    trainable: str = "all"
    fresh: bool = True
    language: LanguageConfig | None = None
    tokenizer: Tokenizer | None = dataclasses.field(default=None, compare=False)

    param_folders = (text.FOLDER,)

    @property
    def masked_terms(self) -> tuple[str, ...]:
        """The text term, because only some recordings have a text."""
        return (text.TERM,) if self.language else ()

    # ------------------------------------------------------------------- parameters and state

    def init(self, key: jax.Array) -> Params:
        """Parameters of the codec, and of the language model as "language"."""
        params = codec_init.init_boxed(self.codec, key)
        if self.language is not None:
            language_key = jax.random.fold_in(key, 3)
            params |= {text.FOLDER: language_models.init_boxed(self.language, language_key)}
        return params

    def init_extra(self, key: jax.Array) -> Extra:
        """Counts of codes [Q, K]."""
        del key
        return {COUNTS: code_use.zero_counts(self.codec.quantizer)}

    def trained(self, params: Params) -> Params:
        """All parameters, or the parameters of one part."""
        if self.trainable == "all":
            return params
        return {self.trainable: params[self.trainable]}

    @property
    def group_rates(self) -> dict[str, float]:
        """Learning-rate factors; codebooks and the language model have their own.

        Groups without trained parameters have an entry in the optimizer's state, too.
        """
        rates = {"codebooks": 1.0, "network": 1.0}
        if self.language:
            rates["language"] = self.settings.text.language_learning_rate
        return rates

    def group(self, path: tuple[str, ...]) -> str:
        """See `group_rates`."""
        if path[0] == text.FOLDER:
            return "language"
        return "codebooks" if path[-1] == "codebooks" else "network"

    # ------------------------------------------------------------------- the step

    def item_shapes(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Audio [C, S], of which the first "length" samples are valid, and texts."""
        shapes = {
            "wav": ((self.codec.num_channels, self.num_samples), jnp.float32),
            "length": ((), jnp.int32),
        }
        if self.language is not None:
            shapes |= text.item_shapes(self.settings.text)
        return shapes

    def prepare(self, key: jax.Array, step: jax.Array, batch: Batch) -> Batch:
        """Draws the quantizers in use, "in_use" [B, Q], and the frames to hide from the text."""
        del step
        num_frames = self.codec.num_frames(batch["wav"].shape[-1])
        lengths = self.codec.num_frames(batch["length"])
        return batch | self.draw(key, batch["position"], num_frames, lengths)

    def draw(
        self,
        key: jax.Array,
        positions: jax.Array,
        num_frames: int,
        lengths: jax.Array,
    ) -> Batch:
        """Random draws for items at `positions` [B] with `lengths` [B] valid frames of T."""
        num_quantizers = self.codec.quantizer.num_quantizers
        dropout = self.settings.codes.quantizer_dropout
        dropout_key, _ = jax.random.split(key)
        in_use = code_use.draw_dropout(num_quantizers, dropout, dropout_key, positions)
        drawn = {"in_use": in_use}
        share = self.settings.text.language_mask
        if self.language is not None and share:
            mask_key = jax.random.fold_in(key, 2)
            drawn["hidden"] = text.draw_hidden_frames(
                share, num_frames, mask_key, positions, lengths
            )
        return drawn

    def masks(self, batch: Batch) -> Arrays:
        """The text term counts for recordings that have a text."""
        return {text.TERM: batch["text_length"] > 0} if self.language else {}

    def text_loss(
        self,
        params: Params,
        latents: jax.Array,
        quantized: Quantized,
        part: Batch,
    ) -> jax.Array:
        """Cross-entropy of the text [B] by the language model, from latents [B, T, D]."""
        frames = quantized.latents if self.language.audio == "codes" else latents
        num_frames = self.codec.num_frames(part["length"])
        return text.cross_entropy(
            self.language, self.compute, params[text.FOLDER], frames, num_frames, part
        )

    def finish(self, update: Update) -> tuple[Extra, Trees]:
        """Updates the counts of codes; `seen` has the codes and projected vectors."""
        codes, _ = code_use.join_parts(*update.seen)
        counts = self.counts(codes, update.batch, update.extra)
        return {COUNTS: counts}, update.trees

    def counts(self, codes: jax.Array, batch: Batch, extra: Extra) -> jax.Array:
        """Counts of codes [Q, K], with those of this batch, codes [B, Q, T]."""
        used = code_use.use_mask(self.codec, codes, batch["in_use"], batch["length"])
        return code_use.add_counts(extra[COUNTS], codes, used)

    # ------------------------------------------------------------------- on the host

    def files(self) -> dict[str, str]:
        """The configs of the codec and of the language model."""
        files = {"config.json": self.codec.to_json()}
        if self.language is not None:
            files |= language_models.files(self.language, self.tokenizer)
        return files

    def start(
        self,
        init_from: str,
        params: Any,
        extra: Any,
        say: Say,
    ) -> tuple[Params, Extra]:
        """The codec of `init_from`; the language model of `init_from` or of published weights."""
        start_params: Params = {}
        parts = []
        if init_from:
            start_params = load_codec(init_from, params)
            parts.append("generator")
        start_extra = self.start_extra(init_from, extra)
        parts += sorted(start_extra)
        if self.language is not None:
            head, from_init = text.start_params(
                self.settings.text,
                self.language,
                self.tokenizer,
                init_from,
                params[text.FOLDER],
                say,
            )
            if head is not None:
                start_params[text.FOLDER] = head
            if from_init:
                parts.append("language model")
        if init_from:
            say(f"starting from the {' and '.join(parts)} of {init_from}")
        return start_params, start_extra

    def start_extra(self, init_from: str, extra: Any) -> Extra:
        """Entries of the extra state that `init_from` has."""
        del init_from, extra
        return {}

    def find_data(self, config: TrainConfig, mirror: storage.Mirror, say: Say) -> TrainingData:
        """Opens recordings, as segments."""
        texts = self.settings.text
        shape = audio.segment_shape(self.num_samples, self.codec, self.tokenizer, texts)
        return audio.find_data(config, shape, texts, mirror, say)

    def summary(self, extra: Extra) -> dict[str, Any]:
        """Usage of the codebooks."""
        return code_use.summary(extra[COUNTS])

    def progress(self, values: dict[str, Any]) -> str:
        """Mean perplexity of the codebooks."""
        perplexities = values["codebook_perplexity"]
        return f"perplexity {sum(perplexities) / len(perplexities):.0f}"


def load_codec(path: str, shapes: Params) -> Params:
    """The parameters of the codec at `path`, with the shardings of `shapes`."""
    params = {}
    for name, tree in pretrained.load(path).params.items():
        shardings = jax.tree.map(lambda x: x.sharding, shapes[name])
        params[name] = sharding.whole(tree, shardings)
    return params
