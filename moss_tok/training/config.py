"""A training run as flat settings; each one is a flag of train.py."""

import dataclasses
import math
from typing import Any

from moss_tok.errors import check_choice, check_types
from moss_tok.nn.compute import ATTENTION, DTYPES, REMAT, ComputeConfig
from moss_tok.sharding import parse_mesh

STAGES = ("pretrain", "adversarial")
TRAINABLE = ("all", "decoder", "language")


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """Multi-period and complex multi-band STFT discriminators.

    Attributes:
      channels: Width of their first layers; the published ones have 32.
      periods: One multi-period discriminator each.
      windows: Window lengths (samples), one spectral discriminator each.
    """

    channels: int = 32
    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    windows: tuple[int, ...] = (2048, 1024, 512)

    def __post_init__(self):
        if not all(2 <= period <= 64 for period in self.periods):
            raise ValueError(f"discriminator_periods must be 2..64, got {self.periods}")
        if not all(64 <= w <= 8192 and w % 64 == 0 for w in self.windows):
            raise ValueError(
                f"discriminator_windows must be multiples of 64 up to 8192, got {self.windows}"
            )


def _flag(
    default: Any,
    help_text: str,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
    choices: tuple[str, ...] = (),
    free: bool = False,
) -> Any:
    """A field with what `_check_flag` accepts; `free` ones may change when a run goes on."""
    bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    bounds = {name: bound for name, bound in bounds.items() if math.isfinite(bound)}
    metadata = {"help": help_text, "bounds": bounds, "choices": choices, "free": free}
    return dataclasses.field(default=default, metadata=metadata)


def _weight(default: float, help_text: str) -> Any:
    return _flag(default, help_text, at_least=0.0)


def _count(default: int, help_text: str, at_least: int = 0, free: bool = False) -> Any:
    return _flag(default, help_text, at_least=at_least, free=free)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run; each field is a flag of train.py. Loss weights are the paper's."""

    # What is trained.
    model: str = _flag("", "preset, or a config.json of a codec; default: init_from's, or tiny")
    init_from: str = _flag("", "checkpoint, workdir, official directory or Hub id to start from")
    stage: str = _flag("pretrain", "adversarial adds the discriminators", choices=STAGES)
    trainable: str = _flag(
        "all", "decoder: encoder and quantizer stay; language: the whole codec", choices=TRAINABLE
    )
    language_model: str = _flag(
        "", "tiny, small, 0.5b or a directory with Qwen2.5 weights: reads codes and predicts text"
    )
    tokenizer: str = _flag("", "tokenizer.json, or its folder; empty: language_model's, or bytes")
    language_input: str = _flag("codes", "what it hears", choices=("codes", "latents"))
    workdir: str = _flag("runs/quickstart", "everything is written here", free=True)
    seed: int = _count(0, "of parameters, data order, crops and quantizer dropout")
    # Data.
    train_data: str = _flag(
        "", "folders, manifests or *.array_record, SOURCE[:WEIGHT],...; empty: synthetic sounds"
    )
    eval_data: str = _flag(
        "", "the same for evaluation (its test split); empty: train_data's", free=True
    )
    batch_size: int = _count(8, "segments per step", at_least=1)
    segment_seconds: float = _flag(
        0.96, "length of a segment, rounded down to whole frames", above=0, at_most=600
    )
    silence_db: float = _flag(
        -60.0, "segments whose level (dB re full scale, RMS) is below are drawn again", at_most=0
    )
    augment_gain_db: float = _flag(
        0.0, "random gain of up to that many dB up or down", at_least=0, at_most=60
    )
    augment_loudness_db: str = _flag(
        "", "LOW:HIGH: segments are set to a random level (dB re full scale, RMS) in between"
    )
    augment_equalizer_db: float = _flag(
        0.0, "random gain of up to that many dB up or down by octave", at_least=0, at_most=60
    )
    augment_noise_db: str = _flag(
        "", "LOW:HIGH: random noise, white to pink, at a random signal-to-noise ratio in between"
    )
    augment_speed: float = _flag(
        0.0, "recordings are played up to this share faster or slower, which moves pitch, too",
        at_least=0, at_most=0.5,
    )  # fmt: skip
    augment_shift_seconds: float = _flag(
        0.0, "up to so much silence before what leaves room for it", at_least=0, at_most=600
    )
    max_text_tokens: int = _count(
        128, "longest text; audio with a longer one counts as without", at_least=1
    )
    max_failed_share: float = _flag(
        0.1, "stop if more than this share of reads fails", at_least=0, at_most=1, free=True
    )
    num_workers: int = _count(0, "processes that read data; 0: threads", free=True)
    # Optimizers.
    num_steps: int = _count(1000, "steps of the whole run", at_least=1, free=True)
    num_microbatches: int = _count(1, "parts a batch is split into, to save memory", at_least=1)
    learning_rate: float = _flag(1e-4, "highest learning rate of the generator's AdamW", above=0)
    discriminator_learning_rate: float = _flag(1e-4, "the same of the discriminators'", above=0)
    codebook_learning_rate: float = _weight(1.0, "factor on the learning rate of the codebooks")
    language_learning_rate: float = _weight(1.0, "factor on that of the language model")
    warmup_steps: int = _count(1000, "steps of linear warm-up")
    decay_steps: int = _count(0, "step at which a cosine has taken the learning rate to 0; 0: none")
    decay_per_step: float = _flag(
        0.999996, "factor on the learning rate at each step after warm-up", above=0, at_most=1
    )
    beta1: float = _flag(0.8, "AdamW's decay of the first moment", at_least=0, below=1)
    beta2: float = _flag(0.99, "AdamW's decay of the second moment", at_least=0, below=1)
    weight_decay: float = _weight(0.01, "AdamW's weight decay, on matrices only")
    gradient_clip: float = _flag(1000.0, "largest global norm of the generator's gradient", above=0)
    discriminator_gradient_clip: float = _flag(10.0, "the same of the discriminators'", above=0)
    ema_decay: float = _flag(
        0.999, "of the averaged weights that are evaluated and exported; 0: no averaging",
        at_least=0, below=1,
    )  # fmt: skip
    max_skipped_steps: int = _count(
        20, "updates in a row that may be skipped for not being finite", at_least=1, free=True
    )
    # Losses.
    reconstruction_weight: float = _weight(15.0, "weight of the multi-scale mel loss")
    mel_windows: str = _flag(
        "32,64,128,256,512,1024,2048", "window lengths (samples) of the multi-scale mel loss"
    )
    mel_floor_db: float = _flag(
        -200.0, "white noise of that level (dB re full scale, RMS) is silence to the mel loss",
        at_most=0,
    )  # fmt: skip
    waveform_weight: float = _weight(0.0, "weight of the relative L1 distance of the waveforms")
    commitment_weight: float = _weight(0.25, "weight of the commitment loss")
    codebook_weight: float = _weight(1.0, "weight of the codebook loss")
    language_mask: float = _flag(
        0.0, "up to this share of the frames, in two spans, is hidden from the language model",
        at_least=0, at_most=1,
    )  # fmt: skip
    semantic_weight: float = _weight(20.0, "weight of the cross-entropy of the text")
    adversarial_weight: float = _weight(1.0, "weight of the adversarial loss")
    feature_matching_weight: float = _weight(2.0, "weight of the feature matching loss")
    quantizer_dropout: float = _flag(
        1.0, "share of items that use a random number of quantizers", at_least=0, at_most=1
    )
    reseed_every: int = _count(0, "steps between re-seedings of dead codes; 0: never")
    discriminator_channels: int = _flag(
        32, "width of the discriminators' first layers", at_least=1, at_most=512
    )
    discriminator_periods: str = _flag("2,3,5,7,11", "periods of the multi-period ones")
    discriminator_windows: str = _flag("2048,1024,512", "window lengths of the spectral ones")
    # How it is computed.
    mesh: str = _flag(
        "data:-1", "devices along data, fsdp and tensor, as in data:4,fsdp:8; -1: the rest",
        free=True,
    )  # fmt: skip
    dtype: str = _flag("float32", "of Transformers and discriminators", choices=DTYPES)
    attention: str = _flag("auto", "implementation of attention", choices=ATTENTION)
    remat: str = _flag("none", "what the backward pass recomputes", choices=REMAT)
    # What is written.
    log_every: int = _count(50, "steps between lines of metrics.jsonl", at_least=1, free=True)
    checkpoint_every: int = _count(1000, "steps between checkpoints", at_least=1, free=True)
    keep_checkpoints: int = _count(
        2, "how many of the newest checkpoints stay", at_least=1, free=True
    )
    keep_every: int = _count(
        0, "checkpoints at multiples of this stay for good; 0: none", free=True
    )
    eval_every: int = _count(0, "steps between evaluations; 0: only at the end", free=True)
    num_eval_clips: int = _count(100, "clips of an evaluation, at most; 0: none", free=True)
    profile_steps: str = _flag(
        "", "FIRST:LAST: steps of which a jax.profiler trace goes into the workdir", free=True
    )

    def __post_init__(self):
        check_types(self)
        for field in dataclasses.fields(self):
            _check_flag(field, getattr(self, field.name))
        if self.batch_size % self.num_microbatches:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of num_microbatches "
                f"{self.num_microbatches}"
            )
        if 0 < self.decay_steps <= self.warmup_steps:
            raise ValueError(
                f"decay_steps must be 0 or more than warmup_steps {self.warmup_steps}, "
                f"got {self.decay_steps}"
            )
        self._check_trainable()
        if not self.workdir:
            raise ValueError("workdir must not be empty")
        self.loudness_range  # noqa: B018  checks augment_loudness_db
        self.noise_range  # noqa: B018  checks augment_noise_db
        self.profile_range  # noqa: B018  checks profile_steps
        self.mel_window_lengths  # noqa: B018  checks mel_windows
        parse_mesh(self.mesh)
        if not self.discriminators.periods + self.discriminators.windows:
            raise ValueError(
                "discriminator_periods and discriminator_windows must not both be empty"
            )

    def _check_trainable(self) -> None:
        if self.trainable != "all" and not self.init_from:
            raise ValueError(f"trainable={self.trainable} needs init_from, the codec to start from")
        if self.trainable == "decoder" and self.language_model:
            raise ValueError("trainable=decoder leaves nothing for language_model to teach")
        if self.trainable == "language" and not (self.language_model and not self.adversarial):
            raise ValueError("trainable=language needs language_model, and stage=pretrain")

    @property
    def compute(self) -> ComputeConfig:
        """How the codec is computed during training."""
        return ComputeConfig(self.dtype, "default", self.attention, self.remat)

    @property
    def discriminators(self) -> DiscriminatorConfig:
        """The discriminators of the adversarial stage."""
        lists = [
            _integers(f"discriminator_{name}", getattr(self, f"discriminator_{name}"))
            for name in ("periods", "windows")
        ]
        return DiscriminatorConfig(self.discriminator_channels, *lists)

    @property
    def mel_window_lengths(self) -> tuple[int, ...]:
        """`mel_windows` as numbers."""
        windows = _integers("mel_windows", self.mel_windows)
        if not windows or not all(32 <= w <= 32768 and w % 32 == 0 for w in windows):
            raise ValueError(
                "mel_windows must be one or more multiples of 32 up to 32768, "
                f"got {self.mel_windows!r}"
            )
        return windows

    @property
    def adversarial(self) -> bool:
        """Whether this stage has discriminators."""
        return self.stage == "adversarial"

    @property
    def loudness_range(self) -> tuple[float, float] | None:
        """`augment_loudness_db` as (low, high), or None."""
        return self._decibels("augment_loudness_db", -100, 0)

    @property
    def noise_range(self) -> tuple[float, float] | None:
        """`augment_noise_db` as (low, high), or None."""
        return self._decibels("augment_noise_db", -20, 100)

    def _decibels(self, name: str, lowest: float, highest: float) -> tuple[float, float] | None:
        text = getattr(self, name)
        if not text:
            return None
        try:
            low, high = map(float, text.split(":"))
        except ValueError:
            low, high = 1.0, 0.0
        if not lowest <= low <= high <= highest:
            raise ValueError(
                f"{name} must be LOW:HIGH with {lowest} <= LOW <= HIGH <= {highest}, got {text!r}"
            )
        return low, high

    @property
    def profile_range(self) -> range:
        """The steps of `profile_steps`."""
        if not self.profile_steps:
            return range(0)
        try:
            first, last = map(int, self.profile_steps.split(":"))
        except ValueError:
            first, last = 0, 0
        if not 1 <= first <= last:
            raise ValueError(
                "profile_steps must be FIRST:LAST with 1 <= FIRST <= LAST, "
                f"got {self.profile_steps!r}"
            )
        return range(first, last + 1)


def _integers(name: str, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"{name} must be whole numbers with commas between, got {text!r}")
    return tuple(map(int, parts))


def _check_flag(field: dataclasses.Field, value: Any) -> None:
    holds = {
        "at least": lambda bound: value >= bound,
        "above": lambda bound: value > bound,
        "at most": lambda bound: value <= bound,
        "below": lambda bound: value < bound,
    }
    bounds, choices = field.metadata["bounds"], field.metadata["choices"]
    if not all(holds[name](bound) for name, bound in bounds.items()):
        accepted = " and ".join(f"{name} {bound:g}" for name, bound in bounds.items())
        raise ValueError(f"{field.name} must be {accepted}, got {value!r}")
    if choices:
        check_choice(field.name, value, choices)


# Fields that may change when a run goes on: they do not change what a step computes.
FREE_FIELDS = tuple(f.name for f in dataclasses.fields(TrainConfig) if f.metadata["free"])
