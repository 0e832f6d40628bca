"""Training data of the objective speech, and the speech model of a run."""

import dataclasses
from collections.abc import Iterator, Sequence

from moss_tok import checkpoint, storage
from moss_tok.codec import pretrained as codecs
from moss_tok.codec.config import CodecConfig
from moss_tok.codec.inference import Codec
from moss_tok.data import speech_batches
from moss_tok.data.code_batches import Source
from moss_tok.data.speech_batches import SpeechSet, SpeechShape
from moss_tok.language import text
from moss_tok.language.text import Tokenizer
from moss_tok.objectives import code_data
from moss_tok.objectives.code_data import CodeData
from moss_tok.objectives.config import SpeechSettings
from moss_tok.speech import config as configs
from moss_tok.speech import layout, pretrained
from moss_tok.speech.config import SpeechConfig
from moss_tok.training.config import TrainConfig
from moss_tok.training.objective import Batch, Say


@dataclasses.dataclass(frozen=True)
class SpeechData(CodeData):
    """Sequences of recordings with texts, and evaluation recordings."""

    def batches(self, start: int, rows: Sequence[int]) -> Iterator[Batch]:
        """See `speech_batches.batches`."""
        return speech_batches.batches(
            self.sets, self.weights, self.config.batch_size, self.shape, self.seed, start, rows
        )


def find_data(config: TrainConfig, shape: SpeechShape, say: Say) -> SpeechData:
    """Opens folders and files of codes, see `code_data.find_sets`.

    Raises:
      ValueError: Codes of another codec, or nothing to learn from.
    """

    def check_sources(sources: Sequence[Source]) -> None:
        for source in dict.fromkeys(sources):
            _check_codec(source, shape.config.codec, say)

    parts = code_data.find_sets(
        config,
        check_sources,
        lambda source, split: speech_batches.read_set(source, split, shape),
        lambda sets: _check_sets(sets, shape, say),
    )
    return SpeechData(config.data, *parts, config.run.num_eval_clips, shape, config.run.seed)


def _check_codec(source: Source, fingerprint: str, say: Say) -> None:
    """Raises ValueError if the codes are of another codec; JSON lines do not say of which one."""
    source_codec = source.settings.get("codec")
    if source_codec is None:
        say(f"note: {source.folder} does not say which codec its codes are of")
    elif source_codec != fingerprint:
        raise ValueError(
            f"{source.folder} holds codes of codec {source_codec}, the flag codec is codec "
            f"{fingerprint}"
        )


def _check_sets(sets: Sequence[SpeechSet], shape: SpeechShape, say: Say) -> None:
    limits = (
        f"at most segment_seconds {shape.max_frames / shape.frame_rate:.3g} and a text of at most "
        f"max_text_tokens {shape.max_text_tokens}"
    )
    for part in sets:
        if not len(part):
            raise ValueError(
                f"{part.source.folder}: no recording of the split 'train' has {limits}"
            )
    used = sum(map(len, sets))
    total = sum(part.num_texts for part in sets)
    say(f"{used} of {total} recordings with texts are used: those of {limits}")
    if shape.reference_share and not any(part.speakers for part in sets):
        raise ValueError("reference_share needs recordings that have a speaker in their metadata")


def find_model(
    config: TrainConfig, codec: CodecConfig | None = None
) -> tuple[SpeechConfig, Tokenizer]:
    """The model of the newest checkpoint in the workdir; else that of `init_from` or of the flags.

    Args:
      config: The run.
      codec: The codec of the codes, if its weights need not be read; default: that of the flag.

    Raises:
      ValueError: A model or codec does not exist, or they do not fit.
    """
    model = checkpoint.read_newest(storage.to_path(config.run.workdir), pretrained.load_config)
    if model is not None:
        return model
    settings = config.objective
    if codec is None and not settings.codec:
        raise ValueError("objective=speech needs codec, the codec of the codes in train_data")
    fingerprint = ""
    if codec is None:
        encoder = codecs.load(settings.codec, "encoder")  # the component of the fingerprint
        codec = encoder.config
        fingerprint = codecs.fingerprint(encoder)
    _check_quantizers(settings, codec)
    if config.run.init_from:
        return _start_model(config, codec, fingerprint)
    return _new_model(config, codec, fingerprint)


def _check_quantizers(settings: SpeechSettings, codec: CodecConfig) -> None:
    limit = codec.quantizer.num_quantizers
    if settings.speech_quantizers > limit:
        raise ValueError(
            f"speech_quantizers must be 0..{limit}, the quantizers of the codec, got "
            f"{settings.speech_quantizers}"
        )


def _start_model(
    config: TrainConfig, codec: CodecConfig, fingerprint: str
) -> tuple[SpeechConfig, Tokenizer]:
    """The model of `init_from`, for this codec."""
    settings = config.objective
    source = config.run.init_from
    if settings.speech_model:
        raise ValueError("speech_model has no effect with init_from; leave one of them out")
    if settings.tokenizer:
        raise ValueError("tokenizer has no effect with init_from; leave one of them out")
    model, tokenizer = pretrained.load_config(checkpoint.find_checkpoint(source))
    num_quantizers = model.num_quantizers
    if settings.speech_quantizers not in (0, num_quantizers):
        raise ValueError(
            f"init_from {source} predicts {num_quantizers} quantizers, not "
            f"{settings.speech_quantizers}"
        )
    quantizer = codec.quantizer
    if quantizer.codebook_size != model.codebook_size or quantizer.num_quantizers < num_quantizers:
        raise ValueError(
            f"init_from {source} needs a codec of {num_quantizers} or more quantizers of "
            f"{model.codebook_size} codes, {settings.codec} has {quantizer.num_quantizers} of "
            f"{quantizer.codebook_size}"
        )
    if model.codec and fingerprint and model.codec != fingerprint:
        raise ValueError(
            f"init_from {source} speaks codes of codec {model.codec}, the flag codec is codec "
            f"{fingerprint}"
        )
    model = dataclasses.replace(model, codec=fingerprint, frame_rate=codec.frame_rate)
    size = context(model, tokenizer, settings, max_frames(config, codec.frame_rate))
    return dataclasses.replace(model, max_positions=max(model.max_positions, size)), tokenizer


def _new_model(
    config: TrainConfig, codec: CodecConfig, fingerprint: str
) -> tuple[SpeechConfig, Tokenizer]:
    settings = config.objective
    tokenizer = text.load(settings.tokenizer)
    tokens = layout.token_fields(tokenizer)
    model = configs.preset(
        settings.speech_model or "tiny",
        codebook_size=codec.quantizer.codebook_size,
        num_quantizers=settings.speech_quantizers or codec.quantizer.num_quantizers,
        frame_rate=codec.frame_rate,
        codec=fingerprint,
        **tokens,
    )
    size = context(model, tokenizer, settings, max_frames(config, codec.frame_rate))
    return dataclasses.replace(model, max_positions=size), tokenizer


def max_frames(config: TrainConfig, frame_rate: float) -> int:
    """Frames of the longest recording; ValueError if there is no whole one."""
    frames = int(config.data.segment_seconds * frame_rate + 1e-6)
    if not frames:
        raise ValueError(
            f"segment_seconds must be at least {1 / frame_rate:g}, a frame of the codec, got "
            f"{config.data.segment_seconds}"
        )
    return frames


def longest(
    model: SpeechConfig, tokenizer: Tokenizer, settings: SpeechSettings, num_frames: int
) -> int:
    """Positions of the longest sequence of recordings without references of their own."""
    size = len(layout.prompt(model, tokenizer, layout.Request("")).text)
    size += settings.max_text_tokens + num_frames + 1  # the end of speech
    if settings.reference_share:
        size += _longest_reference(model, tokenizer, settings, num_frames)
    return size


def context(
    model: SpeechConfig, tokenizer: Tokenizer, settings: SpeechSettings, num_frames: int
) -> int:
    """Positions of the longest sequence with a reference, which JSON lines may have."""
    size = longest(model, tokenizer, settings, num_frames)
    if not settings.reference_share:
        size += _longest_reference(model, tokenizer, settings, num_frames)
    return size


def _longest_reference(
    model: SpeechConfig, tokenizer: Tokenizer, settings: SpeechSettings, num_frames: int
) -> int:
    """Positions that the longest reference adds."""
    size = layout.reference_size(model, tokenizer, "", num_frames)
    if model.layout == "plain":  # the chat layout has no text of the reference
        size += settings.max_text_tokens
    return size


def load_decoder(path: str) -> Codec:
    """Loads the decoder of a codec."""
    return codecs.load(path, "decoder")
