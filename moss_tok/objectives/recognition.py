"""Speech recognition: a language model learns to read the codes of a frozen codec."""

import dataclasses
import functools
from typing import Any

from moss_tok.codec.inference import Codec
from moss_tok.codec.model import CodecModel
from moss_tok.evaluation import sweep
from moss_tok.language.generate import Language
from moss_tok.objectives import audio, text
from moss_tok.objectives.base import CodecBasedObjective
from moss_tok.objectives.config import RecognitionSettings
from moss_tok.training.objective import (
    Arrays,
    Batch,
    Evaluation,
    Params,
    Progress,
    Say,
    Term,
    TrainingData,
)


@dataclasses.dataclass(frozen=True)
class RecognitionObjective(CodecBasedObjective):
    """Only the cross-entropy of the text; no audio is decoded."""

    settings: RecognitionSettings

    @property
    def term_names(self) -> tuple[str, ...]:
        """The cross-entropy of the text."""
        return (text.TERM,)

    def outputs(self, params: Params, part: Batch) -> tuple[Arrays, Any]:
        """The cross-entropy of the text; for `finish`, codes and projected vectors."""
        model = CodecModel(self.codec, self.compute)
        apply = functools.partial(model.apply, {"params": params})
        latents, quantized = apply(part["wav"], part["in_use"], method="quantize")
        loss = self.text_loss(params, latents, quantized, part)
        return {text.TERM: loss}, (quantized.codes, quantized.projected)

    def terms(self, part: Batch, outputs: Arrays) -> dict[str, Term]:
        """The cross-entropy of the text."""
        del part
        return {text.TERM: text.term(self.settings.text, outputs[text.TERM])}

    def evaluate(
        self,
        params: Params,
        data: TrainingData,
        say: Say,
        progress: Progress,
    ) -> Evaluation | None:
        """Error rates of recognised texts."""
        del progress
        if not data.items:
            return None
        codec_params, head = audio.split_params(params)
        codec = Codec(codec_params, self.codec)
        clips = sweep.read_clips(data.items, codec, say)
        language = Language(head, self.language, self.tokenizer)
        table, paragraph = audio.score_clips_text(codec, language, clips)
        return Evaluation(table, paragraph or "no recording has a text")
