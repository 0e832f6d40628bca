"""Training of a codec without discriminators, with or without a language model."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from moss_tok import sharding, storage
from moss_tok.codec import init as codec_init
from moss_tok.codec import pretrained
from moss_tok.codec.config import CodecConfig
from moss_tok.codec.inference import Codec
from moss_tok.codec.model import CodecModel
from moss_tok.evaluation import sweep
from moss_tok.language import pretrained as language_models
from moss_tok.language.config import LanguageConfig
from moss_tok.language.generate import Language
from moss_tok.language.text import Tokenizer
from moss_tok.nn.compute import ComputeConfig
from moss_tok.objectives import audio, code_use, losses, text
from moss_tok.objectives.config import CodecSettings
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

COUNTS = "code_counts"  # entry of the extra state


@dataclasses.dataclass(frozen=True)
class CodecObjective(Objective):
    """Mel, waveform, commitment and codebook losses, and the cross-entropy of the text.

    Attributes:
      settings: See `CodecSettings`.
      codec: The codec to train.
      compute: Compute settings of the models.
      num_samples: S, samples of a segment, whole frames.
      trainable: "all" or "decoder".
      fresh: Whether codebooks start from initial values, not from `init_from`.
      language: The language model that reads the codes; None without one.
      tokenizer: Tokenizer of its texts.
    """

    settings: CodecSettings
    codec: CodecConfig
    compute: ComputeConfig
    num_samples: int
    trainable: str = "all"
    fresh: bool = True
    language: LanguageConfig | None = None
    tokenizer: Tokenizer | None = dataclasses.field(default=None, compare=False)

    param_folders = (text.FOLDER,)

    @property
    def term_names(self) -> tuple[str, ...]:
        """All terms of the loss."""
        names = ["reconstruction_loss", "commitment_loss", "codebook_loss"]
        if self.settings.loudness_weight:
            names.append("loudness_loss")
        if self.settings.waveform_weight:
            names.append("waveform_loss")
        return (*names, *self.masked_terms)

    @property
    def masked_terms(self) -> tuple[str, ...]:
        """The text term, because only some recordings have a text."""
        return (text.TERM,) if self.language else ()

    # ------------------------------------------------------------------- parameters and state

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Parameters of the codec, and of the language model as "language"."""
        params = codec_init.init_boxed(self.codec, key)
        if self.language is not None:
            language_key = jax.random.fold_in(key, 3)
            params |= {text.FOLDER: language_models.init_boxed(self.language, language_key)}
        return params

    def init_extra(self, key: jax.Array) -> dict[str, Any]:
        """Counts of codes [Q, K]."""
        del key
        return {COUNTS: code_use.zero_counts(self.codec.quantizer)}

    def trained(self, params: dict[str, Any]) -> dict[str, Any]:
        """All parameters, or those of the decoder."""
        return params if self.trainable == "all" else {self.trainable: params[self.trainable]}

    @property
    def group_rates(self) -> dict[str, float]:
        """Learning-rate factors; codebooks and the language model have their own."""
        rates = {"codebooks": self.settings.codebook_learning_rate, "network": 1.0}
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
        """Draws "in_use" [B, Q], the quantizers in use, and frames to hide from the language model.

        "turn" selects the mel windows of this step.
        """
        batch = batch | {"turn": jnp.full(len(batch["length"]), step % self.settings.mel_turns)}
        num_frames = self.codec.num_frames(batch["wav"].shape[-1])
        lengths = self.codec.num_frames(batch["length"])
        return batch | self.draw(key, batch["position"], num_frames, lengths)

    def draw(
        self, key: jax.Array, positions: jax.Array, num_frames: int, lengths: jax.Array
    ) -> Batch:
        """Random draws for items at `positions` [B] with `lengths` [B] valid frames of T."""
        num_quantizers = self.codec.quantizer.num_quantizers
        share = self.settings.codes.quantizer_dropout
        dropout_key, _ = jax.random.split(key)
        drawn = {"in_use": code_use.draw_dropout(num_quantizers, share, dropout_key, positions)}
        mask = self.settings.text.language_mask
        if self.language is not None and mask:
            mask_key = jax.random.fold_in(key, 2)
            drawn["hidden"] = text.draw_hidden_frames(
                mask, num_frames, mask_key, positions, lengths
            )
        return drawn

    def masks(self, batch: Batch) -> dict[str, jax.Array]:
        """The text term counts for recordings that have a text."""
        return {text.TERM: batch["text_length"] > 0} if self.language else {}

    def outputs(self, params: dict[str, Any], part: Batch) -> tuple[dict[str, jax.Array], Any]:
        """Reconstructions "wav_hat", losses of codes and text; for `finish`: codes, projections."""
        model = CodecModel(self.codec, self.compute)
        apply = functools.partial(model.apply, {"params": params})
        latents, quantized = apply(part["wav"], part["in_use"], method="quantize")
        outputs = {"wav_hat": apply(quantized.latents, method="audio")}
        outputs |= losses.quantizer_losses(
            quantized, part["in_use"], part["length"], self.codec.hop_length
        )
        if self.language is not None:
            frames = quantized.latents if self.language.audio == "codes" else latents
            num_frames = self.codec.num_frames(part["length"])
            outputs[text.TERM] = text.cross_entropy(
                self.language, self.compute, params[text.FOLDER], frames, num_frames, part
            )
        return outputs, (quantized.codes, quantized.projected)

    def terms(self, part: Batch, outputs: dict[str, jax.Array]) -> dict[str, Term]:
        """Loss terms; spectra, waveforms and codes of padding are ignored."""
        s = self.settings
        mel_losses = self.mel_losses(part, outputs["wav_hat"])
        terms = {
            "commitment_loss": Term(outputs["commitment_loss"], s.commitment_weight),
            "codebook_loss": Term(outputs["codebook_loss"], s.codebook_weight),
        }
        if self.language is not None:
            terms[text.TERM] = text.term(s.text, outputs[text.TERM])
        terms["reconstruction_loss"] = Term(
            mel_losses["reconstruction_loss"], s.reconstruction_weight
        )
        if s.loudness_weight:
            terms["loudness_loss"] = Term(mel_losses["loudness_loss"], s.loudness_weight)
        if s.waveform_weight:
            loss = losses.waveform_loss(part["wav"], outputs["wav_hat"], part["length"])
            terms["waveform_loss"] = Term(loss, s.waveform_weight)
        return terms

    def mel_losses(self, part: Batch, wav_hat: jax.Array) -> dict[str, jax.Array]:
        """`losses.reconstruction_losses` of the windows of this turn, scaled to all windows."""
        s = self.settings

        def of_turn(turn, wav_hat):
            windows = s.mel_windows[turn :: s.mel_turns]
            of_windows = losses.reconstruction_losses(
                part["wav"], wav_hat, part["length"], self.codec.sample_rate, windows,
                s.mel_floor_db,
            )  # fmt: skip
            scale = len(s.mel_windows) / len(windows)
            return {name: scale * x for name, x in of_windows.items()}

        if s.mel_turns == 1:
            return of_turn(0, wav_hat)
        turns = [functools.partial(of_turn, turn) for turn in range(s.mel_turns)]
        return jax.lax.switch(part["turn"][0], turns, wav_hat)

    def finish(
        self,
        key: jax.Array,
        step: jax.Array,
        batch: Batch,
        seen: Any,
        extra: dict[str, Any],
        trees: dict[str, Any],
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Updates the counts of codes, and every `reseed_every` steps replaces dead codes."""
        codes, projected = code_use.join_parts(*seen)
        used = code_use.use_mask(self.codec, codes, batch["in_use"], batch["length"])
        counts = code_use.add_counts(extra[COUNTS], codes, used)
        every = self.settings.codes.reseed_every
        if not every or self.trainable != "all":
            return {COUNTS: counts}, trees
        # Trained codebooks are not changed before the counts are reliable.
        first = 0 if self.fresh else code_use.COUNTED_STEPS
        due = (step % every == 0) & (step >= first)
        _, reseed_key = jax.random.split(key)
        books = {name: tree["quantizer"]["codebooks"] for name, tree in trees.items()}
        vectors = code_use.by_quantizer(projected), code_use.by_quantizer(used)
        books, counts = jax.lax.cond(
            due, code_use.reseed, lambda *x: x[:2], books, counts, *vectors, reseed_key
        )
        changed = {}
        for name, tree in trees.items():
            quantizer = tree["quantizer"] | {"codebooks": books[name]}
            changed[name] = tree | {"quantizer": quantizer}
        return {COUNTS: counts}, changed

    # ------------------------------------------------------------------- on the host

    def files(self) -> dict[str, str]:
        """The configs of the codec and of the language model."""
        files = {"config.json": self.codec.to_json()}
        if self.language is not None:
            files |= language_models.files(self.language, self.tokenizer)
        return files

    def start(
        self, init_from: str, params: Any, extra: Any, say: Say
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The codec of `init_from`; the language model of `init_from` or of published weights."""
        start_params: dict[str, Any] = {}
        parts = []
        if init_from:
            start_params = load_codec(init_from, params)
            parts.append("generator")
        start_extra = self.start_extra(init_from, extra)
        parts += sorted(start_extra)
        if self.language is not None:
            head, from_init = text.start_params(
                self.settings.text, self.language, self.tokenizer, init_from, params[text.FOLDER]
            )
            if head is not None:
                start_params[text.FOLDER] = head
            if from_init:
                parts.append("language model")
        if init_from:
            say(f"starting from the {' and '.join(parts)} of {init_from}")
        return start_params, start_extra

    def start_extra(self, init_from: str, extra: Any) -> dict[str, Any]:
        """Entries of the extra state that `init_from` has."""
        del init_from, extra
        return {}

    def find_data(self, config: TrainConfig, mirror: storage.Mirror, say: Say) -> TrainingData:
        """Opens recordings, as segments."""
        texts = self.settings.text
        shape = audio.segment_shape(self.num_samples, self.codec, self.tokenizer, texts)
        return audio.find_data(config, shape, texts, mirror, say)

    def summary(self, extra: dict[str, Any]) -> dict[str, Any]:
        """Usage of the codebooks."""
        return code_use.summary(extra[COUNTS])

    def progress(self, values: dict[str, Any]) -> str:
        """Mean perplexity of the codebooks."""
        perplexities = values["codebook_perplexity"]
        return f"perplexity {sum(perplexities) / len(perplexities):.0f}"

    def evaluate(
        self, params: dict[str, Any], data: TrainingData, say: Say, progress: Progress
    ) -> Evaluation | None:
        """Distances at several bitrates, samples, and error rates of the language model."""
        if not data.items:
            return None
        codec_params, head = audio.split_params(params)
        codec = Codec(codec_params, self.codec)
        clips = sweep.read_clips(data.items, codec, say)
        table = {}
        texts = []
        if head is not None:
            language = Language(head, self.language, self.tokenizer)
            table, words = audio.score_text(
                codec, language, [clip.wav for clip in clips], [clip.text for clip in clips]
            )
            if words:
                texts.append(words)
        samples = sweep.samples(codec, clips)
        scores, distances = audio.score_audio(codec, clips, progress)
        return Evaluation(
            table | scores, "\n\n".join([*texts, distances]), samples, self.codec.sample_rate
        )


def load_codec(path: str, shapes: dict[str, Any]) -> dict[str, Any]:
    """The parameters of the codec at `path`, with the shardings of `shapes`."""
    params = {}
    for name, tree in pretrained.load(path).params.items():
        shardings = jax.tree.map(lambda x: x.sharding, shapes[name])
        params[name] = sharding.whole(tree, shardings)
    return params


def build(config: TrainConfig, codec: CodecConfig | None = None) -> CodecObjective:
    """The objective of a run; ValueError if a model does not exist or does not fit.

    `codec` is the codec to train; default: that of the workdir or of the settings.
    """
    codec = codec or audio.codec_of_run(config)
    return CodecObjective(**arguments(config, config.objective, codec), settings=config.objective)


def arguments(config: TrainConfig, settings: CodecSettings, codec: CodecConfig) -> dict[str, Any]:
    """Arguments of `CodecObjective`, other than its settings."""
    language, tokenizer = text.find_model(settings.text, codec)
    return {
        "codec": codec,
        "compute": config.devices.compute,
        "num_samples": audio.segment_samples(config.data, codec, max(settings.mel_windows)),
        "trainable": config.selection.trainable,
        "fresh": not config.run.init_from,
        "language": language,
        "tokenizer": tokenizer,
    }
