"""Speech recognition from stored codes, without an encoder; the builder of both recognitions."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from moss_tok import storage
from moss_tok.audio import manifest
from moss_tok.codec.config import CodecConfig
from moss_tok.codec.inference import Codec
from moss_tok.codec.model import CodecModel
from moss_tok.data.code_batches import CodeShape
from moss_tok.data.config import CodeDataConfig
from moss_tok.language.generate import Language
from moss_tok.objectives import audio, code_data, code_use, text
from moss_tok.objectives.base import COUNTS
from moss_tok.objectives.recognition import RecognitionObjective
from moss_tok.training.config import TrainConfig
from moss_tok.training.objective import (
    Arrays,
    Batch,
    Evaluation,
    Extra,
    Params,
    Progress,
    Say,
    TrainingData,
    Trees,
    Update,
)


@dataclasses.dataclass(frozen=True)
class CodeRecognitionObjective(RecognitionObjective):
    """Recognition from codes: no encoder runs, and batch items are recordings, not segments."""

    def item_shapes(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Codes [Q, T], of which the first "num_quantizers" and "length" are valid, and texts."""
        num_frames = self.codec.num_frames(self.num_samples)
        return {
            "codes": ((self.codec.quantizer.num_quantizers, num_frames), jnp.int32),
            "length": ((), jnp.int32),
            "num_quantizers": ((), jnp.int32),
        } | text.item_shapes(self.settings.text)

    def prepare(self, key: jax.Array, step: jax.Array, batch: Batch) -> Batch:
        """Draws the quantizers in use, and the frames hidden from the language model."""
        del step
        num_frames = batch["codes"].shape[-1]
        drawn = self.draw(key, batch["position"], num_frames, batch["length"])
        levels = jnp.arange(drawn["in_use"].shape[1])
        drawn["in_use"] &= levels < batch["num_quantizers"][:, None]
        return batch | drawn

    def outputs(self, params: Params, part: Batch) -> tuple[Arrays, Any]:
        """The cross-entropy of the text; for `finish`, the codes."""
        model = CodecModel(self.codec, self.compute)
        apply = functools.partial(model.apply, {"params": params})
        frames = apply(part["codes"], part["in_use"], method="dequantize")
        loss = text.cross_entropy(
            self.language, self.compute, params[text.FOLDER], frames, part["length"], part
        )
        return {text.TERM: loss}, part["codes"]

    def finish(self, update: Update) -> tuple[Extra, Trees]:
        """Updates the counts of codes."""
        batch = update.batch
        num_frames = batch["codes"].shape[-1]
        valid = jnp.arange(num_frames) < batch["length"][:, None]
        used = batch["in_use"][..., None] & valid[:, None]
        counts = code_use.add_counts(update.extra[COUNTS], batch["codes"], used)
        return {COUNTS: counts}, update.trees

    def find_data(self, config: TrainConfig, mirror: storage.Mirror, say: Say) -> TrainingData:
        """Opens folders of codes; ValueError if they are of another codec."""
        del mirror
        return code_data.find_data(config, self.code_shape(), say)

    def code_shape(self) -> CodeShape:
        """Shape of the recordings in a batch."""
        return CodeShape(
            num_quantizers=self.codec.quantizer.num_quantizers,
            max_frames=self.codec.num_frames(self.num_samples),
            frame_rate=self.codec.frame_rate,
            tokenizer=self.tokenizer,
            max_text_tokens=self.settings.text.max_text_tokens,
        )

    def evaluate(
        self,
        params: Params,
        data: TrainingData,
        say: Say,
        progress: Progress,
    ) -> Evaluation | None:
        """Error rates of texts recognised from held-out codes."""
        del say, progress
        items = data.held_out()
        if not items:
            return None
        codec_params, head = audio.split_params(params)
        codec = Codec(codec_params, self.codec)
        language = Language(head, self.language, self.tokenizer)
        texts = []
        for item in items:
            reference, _ = manifest.read_text(item.metadata)
            texts.append(reference)
        codes = [item.codes for item in items]
        table, paragraph = audio.score_text(codec, language, codes, texts)
        return Evaluation(table, paragraph or "no recording has a text")


def build(config: TrainConfig, codec: CodecConfig | None = None) -> RecognitionObjective:
    """The objective of a run.

    Args:
      config: The run.
      codec: The codec to read, if no checkpoint is to be read; default: that of the workdir or of
        the settings.

    Raises:
      ValueError: A model does not exist or does not fit.
    """
    settings = config.objective
    run = config.run if codec is None else None
    codec = codec or audio.codec_of_run(config)
    language, tokenizer = text.find_model(run, settings.text, codec)
    from_codes = isinstance(config.data, CodeDataConfig)
    if from_codes and settings.text.language_input != "codes":
        raise ValueError("language_input=latents needs audio, but train_data holds codes")
    objective = CodeRecognitionObjective if from_codes else RecognitionObjective
    return objective(
        settings=settings,
        codec=codec,
        compute=config.devices.compute,
        num_samples=audio.segment_samples(config.data, codec),
        trainable=text.FOLDER,
        fresh=False,
        language=language,
        tokenizer=tokenizer,
    )
