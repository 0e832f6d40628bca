"""The registry of objectives and their settings; needs no jax, so that a bad flag fails at once.

To add an objective, write its settings class and a line of OBJECTIVES here, and its file beside.
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


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """The language model that reads audio, and its texts."""

    language_model: str = setting(
        "", "tiny, small, 0.5b or a directory with Qwen2.5 weights: reads codes and predicts text"
    )
    tokenizer: str = setting("", "tokenizer.json, or its folder; empty: language_model's, or bytes")
    language_input: str = setting("codes", "what it hears", choices=("codes", "latents"))
    max_text_tokens: int = count(
        128, "longest text; audio with a longer one counts as without", at_least=1
    )
    language_mask: float = setting(
        0.0,
        "up to this share of the frames, in two spans, is hidden from the language model",
        at_least=0,
        at_most=1,
    )
    semantic_weight: float = weight(20.0, "weight of the cross-entropy of the text")
    language_learning_rate: float = weight(1.0, "factor on that of the language model")

    def __post_init__(self):
        settings.check(self)


@dataclasses.dataclass(frozen=True)
class CodesSettings:
    """How quantizers are used and kept alive in training."""

    quantizer_dropout: float = setting(
        1.0, "share of items that use a random number of quantizers", at_least=0, at_most=1
    )
    reseed_every: int = count(0, "steps between re-seedings of dead codes; 0: never")

    def __post_init__(self):
        settings.check(self)


@dataclasses.dataclass(frozen=True)
class CodecSettings:
    """Training of a codec. Loss weights are the paper's."""

    model: str = setting("", "preset, or a config.json of a codec; default: init_from's, or tiny")
    codebook_learning_rate: float = weight(1.0, "factor on the learning rate of the codebooks")
    reconstruction_weight: float = weight(15.0, "weight of the multi-scale mel loss")
    mel_windows: tuple[int, ...] = setting(
        (32, 64, 128, 256, 512, 1024, 2048),
        "window lengths (samples) of the multi-scale mel loss",
        kind=INTEGERS,
    )
    mel_floor_db: float = setting(
        -200.0,
        "white noise of that level (dB re full scale, RMS) is silence to the mel loss",
        at_most=0,
    )
    mel_turns: int = count(
        1, "the mel windows are dealt to so many steps, which take turns: less work", at_least=1
    )
    loudness_weight: float = weight(
        0.0, "weight of the relative distance of compressed mel spectrograms, of the same windows"
    )
    waveform_weight: float = weight(0.0, "weight of the relative L1 distance of the waveforms")
    commitment_weight: float = weight(0.25, "weight of the commitment loss")
    codebook_weight: float = weight(1.0, "weight of the codebook loss")
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
        32, "width of the discriminators' first layers", at_least=1, at_most=512
    )
    discriminator_periods: tuple[int, ...] = setting(
        (2, 3, 5, 7, 11), "periods of the multi-period ones", kind=INTEGERS
    )
    discriminator_windows: tuple[int, ...] = setting(
        (2048, 1024, 512), "window lengths of the spectral ones", kind=INTEGERS
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
    """The second stage: a codec against discriminators."""

    codec: CodecSettings = CodecSettings()
    discriminators: DiscriminatorSettings = DiscriminatorSettings()
    adversarial_weight: float = weight(1.0, "weight of the adversarial loss")
    feature_matching_weight: float = weight(2.0, "weight of the feature matching loss")
    discriminator_learning_rate: float = setting(
        1e-4, "highest learning rate of the discriminators' AdamW", above=0
    )
    discriminator_gradient_clip: float = setting(
        10.0, "largest global norm of the discriminators' gradient", above=0
    )

    def __post_init__(self):
        settings.check(self)


@dataclasses.dataclass(frozen=True)
class RecognitionSettings:
    """A language model on a codec that stays as it is."""

    model: str = setting("", "preset, or a config.json of a codec; default: init_from's, or tiny")
    codes: CodesSettings = CodesSettings()
    text: TextSettings = TextSettings()

    def __post_init__(self):
        settings.check(self)


@dataclasses.dataclass(frozen=True)
class SelectionConfig:
    """Which objective a run has, and which part of a codec it trains."""

    objective: str = setting("", "what is trained; empty: what stage and trainable say")
    stage: str = setting("pretrain", "adversarial adds the discriminators", choices=STAGES)
    trainable: str = setting(
        "all", "decoder: encoder and quantizer stay; language: the whole codec", choices=TRAINABLE
    )

    def __post_init__(self):
        settings.check(self)
        check_choice("objective", self.objective, ("", *OBJECTIVES))

    @property
    def name(self) -> str:
        """The objective, a key of OBJECTIVES."""
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
      data: Settings classes of the data that it can be trained on.
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
}
_COMMON = (SelectionConfig, RunConfig, OptimizerConfig, DevicesConfig)


def all_fields() -> dict[str, dataclasses.Field]:
    """Every setting of every objective by name: the flags of train.py."""
    classes = [*_COMMON, AudioDataConfig, CodeDataConfig]
    classes += [entry.settings for entry in OBJECTIVES.values()]
    fields: dict[str, dataclasses.Field] = {}
    for cls in classes:
        for field in settings.leaf_fields(cls):
            fields.setdefault(field.name, field)
    return fields


def configure(**flags: Any) -> TrainConfig:
    """A run from values of flags; what is not given takes its default.

    Raises:
      ValueError: A value that is not accepted, or a flag that the objective does not have.
    """
    selection = settings.build(SelectionConfig, flags)
    chosen = OBJECTIVES[selection.name].settings
    data = data_settings(flags.get("train_data", ""))
    if data not in OBJECTIVES[selection.name].data:
        raise ValueError(f"the objective {selection.name} trains on audio, train_data is codes")
    _check_names(flags, selection.name, data)
    config = TrainConfig(
        selection=selection,
        run=settings.build(RunConfig, flags),
        optimizer=settings.build(OptimizerConfig, flags),
        devices=settings.build(DevicesConfig, flags),
        data=settings.build(data, flags),
        objective=settings.build(chosen, flags),
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
    if trainable != "all" and not config.run.init_from:
        raise ValueError(f"trainable={trainable} needs init_from, the codec to start from")
    if config.selection.name == "recognition":
        if config.selection.stage != "pretrain" or not config.objective.text.language_model:
            raise ValueError("trainable=language needs language_model, and stage=pretrain")
    elif trainable == "decoder":
        codec = getattr(config.objective, "codec", config.objective)
        if codec.text.language_model:
            raise ValueError("trainable=decoder leaves nothing for language_model to teach")


def build_objective(config: TrainConfig, **given: Any) -> Any:
    """The objective of a run; reads the configs of the models that it starts from.

    Args:
      config: The run.
      given: What its builder need not look for, as `codec`.

    Raises:
      ValueError: A model that does not exist or does not fit.
    """
    module, _, function = OBJECTIVES[config.selection.name].location.partition(":")
    return getattr(importlib.import_module(module), function)(config, **given)
