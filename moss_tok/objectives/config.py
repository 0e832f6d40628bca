"""The registry of objectives and their settings; imports no jax, so that a bad flag fails at once.

To add an objective, write its settings class and its entry of OBJECTIVES here, and its module in
this folder.
"""

import dataclasses
import importlib
from typing import Any

from moss_tok import settings
from moss_tok.data.config import AudioDataConfig, CodeDataConfig, data_settings
from moss_tok.errors import check_choice
from moss_tok.settings import INTEGERS, count, setting, weight
from moss_tok.training.config import DevicesConfig, OptimizerConfig, RunConfig, TrainConfig

STAGES = ("pretrain", "adversarial")
TRAINABLE = ("all", "decoder", "language")
_MODEL_HELP = (
    "codec architecture: a preset (tiny, nano, v1, v2) or a config.json; empty: the architecture "
    "of init_from, or tiny without init_from"
)
_TOKENIZER_HELP = (
    "tokenizer of the texts: a tokenizer.json or its folder, or bytes; empty: the tokenizer of the "
    "language_model directory or of init_from, or else bytes"
)
_MAX_TEXT_HELP = (
    "maximum length of a text in tokens; audio with a longer text is used without the text, and "
    "left out by the objective speech"
)


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """The language model that reads encoded audio and predicts its text."""

    language_model: str = setting(
        "",
        "language model that reads the codes and predicts the text: tiny, small, 0.5b or a "
        "directory with Qwen2.5 weights; empty: none",
    )
    tokenizer: str = setting("", _TOKENIZER_HELP)
    language_input: str = setting(
        "codes",
        "input of the language model: codes (quantized latents) or latents (before quantization)",
        choices=("codes", "latents"),
    )
    max_text_tokens: int = count(128, _MAX_TEXT_HELP, at_least=1)
    language_mask: float = setting(
        0.0,
        "maximum share of frames, in two random spans, that is hidden from the language model; "
        "0: off",
        at_least=0,
        at_most=1,
    )
    semantic_weight: float = weight(20.0, "loss weight of the cross-entropy of the text")
    language_learning_rate: float = weight(
        1.0, "learning rate of the language model, as a multiple of learning_rate"
    )

    def __post_init__(self):
        settings.check(self)


@dataclasses.dataclass(frozen=True)
class CodesSettings:
    """Quantizer dropout and the replacement of unused codes."""

    quantizer_dropout: float = setting(
        1.0,
        "share of items that use only a random number of the first quantizers; 0: every item uses "
        "all quantizers",
        at_least=0,
        at_most=1,
    )
    reseed_every: int = count(
        0,
        "number of steps between replacements of unused codes by vectors of the batch; 0: never",
    )

    def __post_init__(self):
        settings.check(self)


@dataclasses.dataclass(frozen=True)
class CodecSettings:
    """Training of a codec. The default loss weights are the paper's."""

    model: str = setting("", _MODEL_HELP)
    codebook_learning_rate: float = weight(
        1.0, "learning rate of the codebooks, as a multiple of learning_rate"
    )
    reconstruction_weight: float = weight(15.0, "loss weight of the multi-scale log-mel distance")
    mel_windows: tuple[int, ...] = setting(
        (32, 64, 128, 256, 512, 1024, 2048),
        "window lengths of the multi-scale mel loss in samples, with commas between; multiples "
        "of 32",
        kind=INTEGERS,
    )
    mel_floor_db: float = setting(
        -200.0,
        "floor of the mel loss: mel bands are clamped to their value for white noise at this RMS "
        "level (dB re full scale); -200: only the paper's clamp at 1e-5",
        at_most=0,
    )
    mel_turns: int = count(
        1,
        "each step computes only one of this many groups of mel_windows, in turn, to save work; "
        "1: all windows at each step",
        at_least=1,
    )
    loudness_weight: float = weight(
        0.0,
        "loss weight of the relative L1 distance of compressed mel spectrograms (loudness) of "
        "mel_windows; 0: off",
    )
    spectrum_weight: float = weight(
        0.0,
        "loss weight of the relative distance of complex spectra with compressed magnitudes, with "
        "windows of mel_windows; 0: off",
    )
    waveform_weight: float = weight(
        0.0, "loss weight of the relative L1 distance of the waveforms; 0: off"
    )
    commitment_weight: float = weight(0.25, "loss weight of the commitment loss")
    codebook_weight: float = weight(1.0, "loss weight of the codebook loss")
    codes: CodesSettings = CodesSettings()
    text: TextSettings = TextSettings()

    def __post_init__(self):
        settings.check(self)
        fits = all(32 <= w <= 32768 and w % 32 == 0 for w in self.mel_windows)
        if not self.mel_windows or not fits:
            text = INTEGERS.format(self.mel_windows)
            raise ValueError(
                f"mel_windows must be one or more multiples of 32 up to 32768, got {text!r}"
            )
        if self.mel_turns > len(self.mel_windows):
            raise ValueError(
                f"mel_turns must be at most the number of mel_windows, got {self.mel_turns}"
            )


@dataclasses.dataclass(frozen=True)
class DiscriminatorSettings:
    """Multi-period and complex multi-band STFT discriminators."""

    discriminator_channels: int = setting(
        32, "number of channels of the discriminators' first layers", at_least=1, at_most=512
    )
    discriminator_periods: tuple[int, ...] = setting(
        (2, 3, 5, 7, 11),
        "periods of the multi-period discriminators in samples, with commas between; empty: none",
        kind=INTEGERS,
    )
    discriminator_windows: tuple[int, ...] = setting(
        (2048, 1024, 512),
        "window lengths of the STFT discriminators in samples, with commas between; multiples of "
        "64; empty: none",
        kind=INTEGERS,
    )

    def __post_init__(self):
        settings.check(self)
        if not all(2 <= period <= 64 for period in self.discriminator_periods):
            raise ValueError(
                f"discriminator_periods must be 2..64, got {self.discriminator_periods}"
            )
        if not all(64 <= w <= 8192 and w % 64 == 0 for w in self.discriminator_windows):
            raise ValueError(
                "discriminator_windows must be multiples of 64 up to 8192, "
                f"got {self.discriminator_windows}"
            )
        if not self.discriminator_periods + self.discriminator_windows:
            raise ValueError(
                "discriminator_periods and discriminator_windows must not both be empty"
            )


@dataclasses.dataclass(frozen=True)
class AdversarialSettings:
    """The second stage: a codec trained against discriminators."""

    codec: CodecSettings = CodecSettings()
    discriminators: DiscriminatorSettings = DiscriminatorSettings()
    adversarial_weight: float = weight(1.0, "loss weight of the adversarial loss")
    feature_matching_weight: float = weight(2.0, "loss weight of the feature matching loss")
    discriminator_learning_rate: float = setting(
        1e-4, "peak learning rate of the discriminators' AdamW, after warm-up", above=0
    )
    discriminator_gradient_clip: float = setting(
        10.0,
        "discriminator gradients with a larger global norm are scaled down to this norm",
        above=0,
    )

    def __post_init__(self):
        settings.check(self)


@dataclasses.dataclass(frozen=True)
class RecognitionSettings:
    """A language model that learns to read a frozen codec."""

    model: str = setting("", _MODEL_HELP)
    codes: CodesSettings = CodesSettings()
    text: TextSettings = TextSettings()

    def __post_init__(self):
        settings.check(self)


@dataclasses.dataclass(frozen=True)
class SpeechSettings:
    """Speech synthesis: a model that predicts the codes of a frozen codec from text."""

    codec: str = setting(
        "", "codec of the codes: a checkpoint, a workdir, an official directory or a Hub id"
    )
    speech_model: str = setting(
        "",
        "speech model to train: tiny, small or 1.7b; empty: the model of init_from, or else tiny",
    )
    tokenizer: str = setting("", _TOKENIZER_HELP)
    max_text_tokens: int = count(128, _MAX_TEXT_HELP, at_least=1)
    speech_quantizers: int = count(
        0, "number of quantizers that the speech model predicts; 0: all quantizers of the codec"
    )
    sequence_dropout: float = setting(
        0.5,
        "share of sequences of which only the first K quantizers are read and predicted; K is "
        "uniform and less than all; 0: all quantizers of every sequence",
        at_least=0,
        at_most=1,
    )
    reference_share: float = setting(
        0.0,
        "share of sequences that begin with a reference, another recording of the same speaker "
        "(metadata: speaker); 0: none",
        at_least=0,
        at_most=1,
    )
    text_weight: float = weight(1.0, "loss weight of the text channel, which ends speech")
    first_code_weight: float = weight(1.0, "loss weight of the first quantizer's codes")
    other_codes_weight: float = weight(1.0, "loss weight of each other quantizer's codes")

    def __post_init__(self):
        settings.check(self)
        if not self.text_weight + self.first_code_weight + self.other_codes_weight:
            raise ValueError("text_weight, first_code_weight and other_codes_weight are all 0")


@dataclasses.dataclass(frozen=True)
class SelectionConfig:
    """The objective of a run, and the part of the model that it trains."""

    objective: str = setting(
        "",
        "training objective: codec, adversarial, recognition or speech; empty: chosen by stage and "
        "trainable",
    )
    stage: str = setting(
        "pretrain",
        "stage of codec training: pretrain (no discriminators) or adversarial",
        choices=STAGES,
    )
    trainable: str = setting(
        "all",
        "what is trained: all; decoder (encoder and quantizer are frozen, so codes stay the same); "
        "language (the whole codec is frozen)",
        choices=TRAINABLE,
    )

    def __post_init__(self):
        settings.check(self)
        check_choice("objective", self.objective, ("", *OBJECTIVES))

    @property
    def name(self) -> str:
        """Name of the objective, a key of OBJECTIVES."""
        if self.objective:
            return self.objective
        if self.trainable == "language":
            return "recognition"
        return "codec" if self.stage == "pretrain" else "adversarial"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A registered objective.

    Attributes:
      settings: Its settings class.
      data: Settings classes of the data that it can train on.
      location: "module:function" of its builder, (TrainConfig) -> Objective.
    """

    settings: type
    data: tuple[type, ...]
    location: str


OBJECTIVES = {
    "codec": Entry(CodecSettings, (AudioDataConfig,), "moss_tok.objectives.codec:build"),
    "adversarial": Entry(
        AdversarialSettings, (AudioDataConfig,), "moss_tok.objectives.adversarial:build"
    ),
    "recognition": Entry(
        RecognitionSettings,
        (AudioDataConfig, CodeDataConfig),
        "moss_tok.objectives.code_recognition:build",
    ),
    "speech": Entry(SpeechSettings, (CodeDataConfig,), "moss_tok.objectives.speech:build"),
}
_COMMON = (SelectionConfig, RunConfig, OptimizerConfig, DevicesConfig)


def all_fields() -> dict[str, dataclasses.Field]:
    """All settings of all objectives by name: the flags of train.py."""
    classes = [*_COMMON, AudioDataConfig, CodeDataConfig]
    classes += [entry.settings for entry in OBJECTIVES.values()]
    fields: dict[str, dataclasses.Field] = {}
    for cls in classes:
        for field in settings.leaf_fields(cls):
            fields.setdefault(field.name, field)
    return fields


def configure(**flags: Any) -> TrainConfig:
    """The settings of a run from flag values; flags that are not given take their default.

    Raises:
      ValueError: A value is not accepted, or the objective does not have a flag.
    """
    selection = settings.build(SelectionConfig, flags)
    entry = OBJECTIVES[selection.name]
    train_data = flags.get("train_data", "")
    data = data_settings(train_data) if train_data else entry.data[0]
    if data not in entry.data:
        mismatch = "audio, but train_data holds codes"
        if data is AudioDataConfig:
            mismatch = "codes (of moss-tok tokenize, or JSON lines), but train_data holds none"
        raise ValueError(f"the objective {selection.name} trains on {mismatch}")
    _check_names(flags, selection.name, data)
    config = TrainConfig(
        selection=selection,
        run=settings.build(RunConfig, flags),
        optimizer=settings.build(OptimizerConfig, flags),
        devices=settings.build(DevicesConfig, flags),
        data=settings.build(data, flags),
        objective=settings.build(entry.settings, flags),
    )
    _check_trainable(config)
    return config


def _check_names(flags: dict[str, Any], objective: str, data: type) -> None:
    known = set()
    for cls in (*_COMMON, data, OBJECTIVES[objective].settings):
        known |= {field.name for field in settings.leaf_fields(cls)}
    for name in flags:
        if name not in known:
            source = " on codes" if data is CodeDataConfig else ""
            raise ValueError(f"the objective {objective}{source} has no setting {name}")


def _check_trainable(config: TrainConfig) -> None:
    trainable = config.selection.trainable
    name = config.selection.name
    if name == "speech":
        if trainable != "all" or config.selection.stage != "pretrain":
            raise ValueError("objective=speech needs trainable=all and stage=pretrain")
        return
    if trainable != "all" and not config.run.init_from:
        raise ValueError(f"trainable={trainable} needs init_from, the codec to start from")
    if name == "codec" and config.selection.stage != "pretrain":
        raise ValueError("objective=codec needs stage=pretrain")
    excluded = "decoder" if name == "recognition" else "language"
    if trainable == excluded:
        raise ValueError(f"objective={name} cannot have trainable={trainable}")
    if name == "recognition":
        if not config.run.init_from:
            raise ValueError("objective=recognition needs init_from, the codec to start from")
        if config.selection.stage != "pretrain" or not config.objective.text.language_model:
            raise ValueError("trainable=language needs language_model and stage=pretrain")
    elif trainable == "decoder":
        codec = getattr(config.objective, "codec", config.objective)
        if codec.text.language_model:
            raise ValueError(
                "language_model has no effect with trainable=decoder; leave one of them out"
            )


def build_objective(config: TrainConfig, **models: Any) -> Any:
    """The objective of a run; reads the configs of the models that it starts from.

    Args:
      config: The run.
      models: Models that the builder need not read from disk, such as `codec`.

    Raises:
      ValueError: A model does not exist or does not fit.
    """
    location = OBJECTIVES[config.selection.name].location
    module_name, _, function_name = location.partition(":")
    build = getattr(importlib.import_module(module_name), function_name)
    return build(config, **models)
