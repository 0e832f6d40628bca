"""Training of a codec without discriminators, with or without a language model."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from moss_tok.codec.config import CodecConfig
from moss_tok.codec.inference import Codec
from moss_tok.codec.model import CodecModel
from moss_tok.evaluation import sweep
from moss_tok.language.generate import Language
from moss_tok.objectives import audio, code_use, losses, text
from moss_tok.objectives.base import COUNTS, CodecBasedObjective
from moss_tok.objectives.config import CodecSettings
from moss_tok.training.config import TrainConfig
from moss_tok.training.objective import (
    Arrays,
    Batch,
    Evaluation,
    Extra,
    Params,
    Progress,
    Say,
    Term,
    TrainingData,
    Trees,
    Update,
)


@dataclasses.dataclass(frozen=True)
class CodecObjective(CodecBasedObjective):
    """Mel, waveform, commitment and codebook losses, and the cross-entropy of the text."""

    settings: CodecSettings

    @property
    def term_names(self) -> tuple[str, ...]:
        """All terms of the loss."""
        names = ["reconstruction_loss", "commitment_loss", "codebook_loss"]
        if self.settings.loudness_weight:
            names.append("loudness_loss")
        if self.settings.spectrum_weight:
            names.append("spectrum_loss")
        if self.settings.waveform_weight:
            names.append("waveform_loss")
        return (*names, *self.masked_terms)

    @property
    def group_rates(self) -> dict[str, float]:
        """Learning-rate factors; codebooks and the language model have their own."""
        return super().group_rates | {"codebooks": self.settings.codebook_learning_rate}

    def good_signs(self) -> str:
        """The values of the quickstart after some hundred steps; see docs/train.md."""
        signs = ["reconstruction falls"]
        if self.trainable == "all":
            if self.settings.waveform_weight:
                signs.append("waveform falls below 0.8 (1 is silence)")
            num_codes = self.codec.quantizer.codebook_size
            signs.append(f"perplexity rises above {0.6 * num_codes:.0f} of {num_codes} codes")
        return ", ".join(signs)

    def prepare(self, key: jax.Array, step: jax.Array, batch: Batch) -> Batch:
        """Adds "turn", which selects the mel windows of this step."""
        turn = jnp.full(len(batch["length"]), step % self.settings.mel_turns)
        return super().prepare(key, step, batch | {"turn": turn})

    def outputs(self, params: Params, part: Batch) -> tuple[Arrays, Any]:
        """Reconstructions "wav_hat", losses of codes and text; for `finish`: codes, projections."""
        model = CodecModel(self.codec, self.compute)
        apply = functools.partial(model.apply, {"params": params})
        latents, quantized = apply(part["wav"], part["in_use"], method="quantize")
        outputs = {"wav_hat": apply(quantized.latents, method="audio")}
        outputs |= losses.quantizer_losses(
            quantized, part["in_use"], part["length"], self.codec.hop_length
        )
        if self.language is not None:
            outputs[text.TERM] = self.text_loss(params, latents, quantized, part)
        return outputs, (quantized.codes, quantized.projected)

    def terms(self, part: Batch, outputs: Arrays) -> dict[str, Term]:
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
        if s.spectrum_weight:
            terms["spectrum_loss"] = Term(mel_losses["spectrum_loss"], s.spectrum_weight)
        if s.waveform_weight:
            loss = losses.waveform_loss(part["wav"], outputs["wav_hat"], part["length"])
            terms["waveform_loss"] = Term(loss, s.waveform_weight)
        return terms

    def mel_losses(self, part: Batch, wav_hat: jax.Array) -> Arrays:
        """Losses of spectra with the windows of this turn, scaled to all windows."""
        s = self.settings

        def of_turn(turn, wav_hat):
            windows = s.mel_windows[turn :: s.mel_turns]
            of_windows = losses.reconstruction_losses(
                part["wav"], wav_hat, part["length"], self.codec.sample_rate, windows,
                s.mel_floor_db,
            )  # fmt: skip
            if s.spectrum_weight:
                loss = losses.spectrum_loss(part["wav"], wav_hat, part["length"], windows)
                of_windows["spectrum_loss"] = loss
            scale = len(s.mel_windows) / len(windows)
            return {name: scale * loss for name, loss in of_windows.items()}

        if s.mel_turns == 1:
            return of_turn(0, wav_hat)
        turns = [functools.partial(of_turn, turn) for turn in range(s.mel_turns)]
        return jax.lax.switch(part["turn"][0], turns, wav_hat)

    def finish(self, update: Update) -> tuple[Extra, Trees]:
        """Updates the counts of codes, and every `reseed_every` steps replaces dead codes."""
        batch = update.batch
        trees = update.trees
        codes, projected = code_use.join_parts(*update.seen)
        counts = self.counts(codes, batch, update.extra)
        every = self.settings.codes.reseed_every
        if not every or self.trainable != "all":
            return {COUNTS: counts}, trees
        # Trained codebooks are not changed before the counts are reliable.
        first = 0 if self.fresh else code_use.COUNTED_STEPS
        is_due = (update.step % every == 0) & (update.step >= first)
        _, reseed_key = jax.random.split(update.key)
        books = {name: tree["quantizer"]["codebooks"] for name, tree in trees.items()}
        used = code_use.use_mask(self.codec, codes, batch["in_use"], batch["length"])

        def leave_unchanged(books, counts, *_):
            return books, counts

        books, counts = jax.lax.cond(
            is_due,
            code_use.reseed,
            leave_unchanged,
            books,
            counts,
            code_use.by_quantizer(projected),
            code_use.by_quantizer(used),
            reseed_key,
        )
        changed = {}
        for name, tree in trees.items():
            quantizer = tree["quantizer"] | {"codebooks": books[name]}
            changed[name] = tree | {"quantizer": quantizer}
        return {COUNTS: counts}, changed

    def evaluate(
        self,
        params: Params,
        data: TrainingData,
        say: Say,
        progress: Progress,
    ) -> Evaluation | None:
        """Distances at several bitrates, samples, and error rates of the language model."""
        if not data.items:
            return None
        codec_params, head = audio.split_params(params)
        codec = Codec(codec_params, self.codec)
        clips = sweep.read_clips(data.items, codec, say)
        table = {}
        paragraphs = []
        if head is not None:
            language = Language(head, self.language, self.tokenizer)
            table, paragraph = audio.score_clips_text(codec, language, clips)
            if paragraph:
                paragraphs.append(paragraph)
        samples = sweep.samples(codec, clips)
        audio_table, paragraph = audio.score_audio(codec, clips, progress)
        paragraphs.append(paragraph)
        return Evaluation(
            table=table | audio_table,
            text="\n\n".join(paragraphs),
            samples=samples,
            sample_rate=self.codec.sample_rate,
        )


def build(config: TrainConfig, codec: CodecConfig | None = None) -> CodecObjective:
    """The objective of a run.

    Args:
      config: The run.
      codec: The codec to train, if no checkpoint is to be read; default: that of the workdir or of
        the settings.

    Raises:
      ValueError: A model does not exist or does not fit.
    """
    return CodecObjective(**arguments(config, config.objective, codec), settings=config.objective)


def arguments(
    config: TrainConfig, settings: CodecSettings, codec: CodecConfig | None
) -> dict[str, Any]:
    """Arguments of `CodecObjective`, other than its settings; see `build`."""
    run = config.run if codec is None else None
    codec = codec or audio.codec_of_run(config)
    language, tokenizer = text.find_model(run, settings.text, codec)
    return {
        "codec": codec,
        "compute": config.devices.compute,
        "num_samples": audio.segment_samples(config.data, codec, max(settings.mel_windows)),
        "trainable": config.selection.trainable,
        "fresh": not config.run.init_from,
        "language": language,
        "tokenizer": tokenizer,
    }
