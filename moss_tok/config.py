"""Frozen configurations: the codec as a list of modules, how to compute it, and a training run.

Shapes follow the legend in `moss_tok/__init__.py`. A `CodecConfig` is hashable, so it can be a
static argument of `jax.jit`.
"""

import contextlib
import dataclasses
import json
import math
import numbers
from pathlib import Path
from typing import Any

FORMAT = "moss_tok"
ATTENTION = ("auto", "dense", "blocked", "splash", "cudnn")
REMAT = ("none", "dots", "full")
DTYPES = ("float32", "bfloat16")
STAGES = ("pretrain", "adversarial")
TRAINABLE = ("all", "decoder", "language")
TASKS = ("transcribe", "transcribe_speakers", "caption")
DOMAINS = ("speech", "music", "sound", "other")
MESH_AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class PatchConfig:
    """Folds `patch_size` frames into one (encoder) or unfolds one into `patch_size` (decoder)."""

    patch_size: int

    def __post_init__(self):
        _check_positive(self, "patch_size")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """One causal Transformer stage.

    Attributes:
      input_dim: Width of the incoming frames.
      output_dim: Width of the outgoing frames.
      model_dim: Width inside, D.
      num_heads: Attention heads, N.
      num_layers: Blocks, L.
      mlp_dim: Width of the feed-forward layer, F.
      context_seconds: How far a frame sees back, itself included.
      layer_scale: Initial value of the LayerScale vectors.
      max_period: Longest RoPE period, in frames over 2 pi.
      input_projection: Whether the stage has an input projection (needed where dims differ).
      output_projection: The same for the output.
    """

    input_dim: int
    output_dim: int
    model_dim: int
    num_heads: int
    num_layers: int
    mlp_dim: int
    context_seconds: float
    layer_scale: float = 0.01
    max_period: float = 10000.0
    input_projection: bool = True
    output_projection: bool = True

    def __post_init__(self):
        names = ("input_dim", "output_dim", "model_dim", "num_heads", "num_layers", "mlp_dim")
        _check_positive(self, *names, "context_seconds", "max_period")
        if self.max_period < 1:
            raise ValueError(f"max_period must be at least 1, got {self.max_period}")
        if self.model_dim % (2 * self.num_heads):
            raise ValueError(
                f"model_dim must be a multiple of 2 * num_heads = {2 * self.num_heads}, "
                f"got {self.model_dim}"
            )
        for side in ("input", "output"):
            dim = getattr(self, f"{side}_dim")
            if dim != self.model_dim and not getattr(self, f"{side}_projection"):
                raise ValueError(
                    f"{side}_projection must be true where {side}_dim {dim} is not "
                    f"model_dim {self.model_dim}"
                )

    @property
    def head_dim(self) -> int:
        """Width of one attention head, H."""
        return self.model_dim // self.num_heads


ModuleConfig = PatchConfig | TransformerConfig


@dataclasses.dataclass(frozen=True)
class QuantizerConfig:
    """Residual LFQ quantizer: `num_quantizers` codebooks of `codebook_size` x `codebook_dim`."""

    input_dim: int
    rvq_dim: int
    output_dim: int
    num_quantizers: int
    codebook_size: int
    codebook_dim: int

    def __post_init__(self):
        _check_positive(self, *(f.name for f in dataclasses.fields(self)))
        if self.codebook_size > 32768:
            raise ValueError(f"codebook_size must be at most 32768, got {self.codebook_size}")


@dataclasses.dataclass(frozen=True)
class CodecConfig:
    """A codec: the modules of both sides, in order, and the quantizer between them.

    Attributes:
      sample_rate: Hz.
      num_channels: C; several channels are interleaved into one stream of C * sample_rate Hz.
      encoder: Modules from the stream to the latents.
      quantizer: The quantizer.
      decoder: Modules from the quantized latents to the stream.
      layout: Family of the official tensor names it is exported with, "v1" or "v2".
      official_json: The official config.json it was read from, kept for the way back; or empty.
    """

    sample_rate: int
    num_channels: int
    encoder: tuple[ModuleConfig, ...]
    quantizer: QuantizerConfig
    decoder: tuple[ModuleConfig, ...]
    layout: str = "v1"
    official_json: str = dataclasses.field(default="", repr=False)

    def __post_init__(self):
        _check_positive(self, "sample_rate", "num_channels")
        if self.layout not in ("v1", "v2"):
            raise ValueError(f"layout must be v1 or v2, got {self.layout!r}")
        dim = _chain("encoder", self.encoder, 1, downsample=True)
        if dim != self.quantizer.input_dim:
            raise ValueError(
                f"quantizer input_dim must be {dim}, the encoder's output, "
                f"got {self.quantizer.input_dim}"
            )
        if _chain("decoder", self.decoder, self.quantizer.output_dim, downsample=False) != 1:
            raise ValueError("the decoder must end in one sample per frame of the stream")
        down, up = _patch_product(self.encoder), _patch_product(self.decoder)
        if down != up:
            raise ValueError(f"the encoder downsamples by {down}, the decoder upsamples by {up}")
        if down % self.num_channels:
            raise ValueError(
                f"the patches fold {down} samples, no multiple of {self.num_channels} channels"
            )

    @property
    def hop_length(self) -> int:
        """Samples per channel and code frame."""
        return _patch_product(self.encoder) // self.num_channels

    @property
    def frame_rate(self) -> float:
        """Code frames per second."""
        return self.sample_rate / self.hop_length

    def stage_rates(self, side: str) -> tuple[float, ...]:
        """Frames per second inside each module of `side` ("encoder" or "decoder").

        For a patch it is the slower of its two rates.
        """
        stream_rate = float(self.sample_rate * self.num_channels)
        rates, folded = [], _patch_product(self.encoder) if side == "decoder" else 1
        for module in getattr(self, side):
            if isinstance(module, PatchConfig) and side == "encoder":
                folded *= module.patch_size
            rates.append(stream_rate / folded)
            if isinstance(module, PatchConfig) and side == "decoder":
                folded //= module.patch_size
        return tuple(rates)

    def windows(self, side: str) -> tuple[int | None, ...]:
        """Attention window of each module of `side` in frames, self included; None for patches."""
        return tuple(
            None if isinstance(m, PatchConfig) else max(1, int(round(rate * m.context_seconds)))
            for m, rate in zip(getattr(self, side), self.stage_rates(side), strict=True)
        )

    def num_frames(self, num_samples: int) -> int:
        """Code frames of `num_samples` samples per channel; a partly filled one counts."""
        return -(-num_samples // self.hop_length)

    def bitrate(self, num_quantizers: int | None = None) -> float:
        """Bits per second with the first `num_quantizers` (default: all) quantizers."""
        num_quantizers = num_quantizers or self.quantizer.num_quantizers
        return self.frame_rate * num_quantizers * math.log2(self.quantizer.codebook_size)

    def check_num_quantizers(self, num_quantizers: int | None) -> int:
        """Returns a valid `num_quantizers`, all of them for None.

        Raises:
          ValueError: It is no integer of 1..Q.
        """
        most = self.quantizer.num_quantizers
        if num_quantizers is None:
            return most
        is_integer = isinstance(num_quantizers, numbers.Integral)
        is_integer &= not isinstance(num_quantizers, bool)
        if not is_integer or not 1 <= num_quantizers <= most:
            raise ValueError(f"num_quantizers must be 1..{most}, got {num_quantizers}")
        return int(num_quantizers)

    def to_json(self) -> str:
        """The config as JSON text that `from_json` reads."""
        fields = {"format": FORMAT} | dataclasses.asdict(self)
        for side in ("encoder", "decoder"):
            fields[side] = [
                {"type": _TYPE_NAMES[type(m)]} | dataclasses.asdict(m) for m in getattr(self, side)
            ]
        return json.dumps(fields, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "CodecConfig":
        """Reads what `to_json` wrote.

        Raises:
          ValueError: No JSON, or a key or value that is not known.
        """
        fields = parse_json_object(text)
        if fields.pop("format", None) != FORMAT:
            raise ValueError(f'not a moss_tok config: "format" must be "{FORMAT}"')
        for side in ("encoder", "decoder"):
            modules = fields.get(side)
            if not isinstance(modules, list) or not all(isinstance(m, dict) for m in modules):
                raise ValueError(f"{side} must be a list of modules")
            fields[side] = tuple(_module_from_dict(m) for m in modules)
        if not isinstance(fields.get("quantizer"), dict):
            raise ValueError("quantizer must be an object")
        fields["quantizer"] = _from_dict(QuantizerConfig, fields["quantizer"], "quantizer")
        return _from_dict(cls, fields, "config")


_TYPE_NAMES = {PatchConfig: "patch", TransformerConfig: "transformer"}


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How a codec is computed; it changes speed and rounding, never the model.

    Attributes:
      dtype: "float32" or "bfloat16" for the Transformers; parameters, norms, softmax, RoPE and
        the quantizer stay in float32.
      precision: Matmul precision of jax.lax: "default", "high" or "highest".
      attention: "auto", "dense", "blocked", "splash" or "cudnn", see `attention.attend`.
      remat: What the backward pass recomputes per block: "none", "dots" (all but matmuls), "full".
    """

    dtype: str = "float32"
    precision: str = "highest"
    attention: str = "auto"
    remat: str = "none"

    def __post_init__(self):
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("precision", self.precision, ("default", "high", "highest"))
        check_choice("attention", self.attention, ATTENTION)
        check_choice("remat", self.remat, REMAT)


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
    mel_turns: int = _count(
        1, "the mel windows are dealt to so many steps, which take turns: less work", at_least=1
    )
    loudness_weight: float = _weight(
        0.0, "weight of the relative distance of compressed mel spectrograms, of the same windows"
    )
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
        _check_types(self)
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
        if self.mel_turns > len(self.mel_window_lengths):
            raise ValueError(
                f"mel_turns must be at most the number of mel_windows, got {self.mel_turns}"
            )
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


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes of the axes in `text`, "data:4,fsdp:8": 1 for those not named, -1 for the rest.

    Raises:
      ValueError: Another name or form, a size that is neither positive nor -1, or -1 twice.
    """
    sizes = {}
    for part in text.split(","):
        name, _, size = part.strip().partition(":")
        known = name in MESH_AXES and name not in sizes
        if not known or not (size == "-1" or size.isdecimal() and int(size) > 0):
            raise ValueError(
                f"mesh must be {','.join(f'{axis}:N' for axis in MESH_AXES)} or some of them, "
                f"N positive or -1 for the rest, got {text!r}"
            )
        sizes[name] = int(size)
    if list(sizes.values()).count(-1) > 1:
        raise ValueError(f"mesh must have one -1 at most, got {text!r}")
    return {axis: sizes.get(axis, 1) for axis in MESH_AXES}


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


def load_codec_config(model: str) -> CodecConfig:
    """The codec of `TrainConfig.model`: a preset or a config.json of ours.

    Raises:
      ValueError: Neither.
    """
    if model in PRESETS:
        return preset(model)
    path = Path(model)
    if not path.is_file():
        raise ValueError(
            f"model must be one of {', '.join(PRESETS)} or a config.json, got {model!r}"
        )
    return read_codec_config(path)


def read_codec_config(path: Path) -> CodecConfig:
    """Reads a config.json of ours; ValueError names the file if it is broken."""
    try:
        return CodecConfig.from_json(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error


def is_number(value: Any) -> bool:
    """Whether a value is a finite real number; true and false are none."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and math.isfinite(value)


def check_choice(name: str, value: Any, accepted: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `accepted`."""
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {value!r}")


# Of bulk work, where speed may be worth some codes.
PRECISIONS = {
    "highest": ComputeConfig(),
    "high": ComputeConfig(precision="high"),
    "bfloat16": ComputeConfig(dtype="bfloat16", precision="default"),
}


def user_error(error: Exception, less: str) -> str:
    """The line that an error is worth to a user; empty for a mistake of ours.

    Args:
      error: Any.
      less: What takes less of a device's memory.
    """
    if isinstance(error, ModuleNotFoundError):
        name = (error.name or str(error)).partition(".")[0]
        line = f"{name} is not installed: pip install 'moss_tok[train]'"
    elif isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):  # jax's
        line = f"{str(error).splitlines()[0]}; {less}"
    else:
        line = str(error) if isinstance(error, (ValueError, OSError)) else ""
    return " ".join(line.split())


def parse_json_object(text: str) -> dict[str, Any]:
    """Parses a JSON object; ValueError if it is something else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"broken JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a file with a JSON object; ValueError names the file if it holds something else."""
    try:
        return parse_json_object(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error


def split_lines(text: str) -> list[str]:
    """The lines of a JSONL text; its strings may hold what else ends a line."""
    return text.removesuffix("\n").split("\n") if text else []


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line, without lines that a kill has cut; [] without it."""
    rows = []
    for line in split_lines(path.read_text(errors="replace")) if path.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(parse_json_object(line))
    return rows


# No real model or run needs more; beyond, arithmetic on sizes overflows somewhere.
_LARGEST = {int: 2**31 - 1, float: 1e12}
_LARGEST_COUNT = 4096  # of layers, heads, quantizers, channels
_LARGEST_WIDTH = 2**20


def _check_types(config: Any) -> None:
    """Raises ValueError unless each plain field has its type and a number is finite and sane."""
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), field.type
        if kind in _LARGEST:
            whole = isinstance(value, int) or kind is float
            if not (is_number(value) and whole):
                name = {int: "an integer", float: "a finite number"}[kind]
                raise ValueError(f"{field.name} must be {name}, got {value!r}")
            if abs(value) > _LARGEST[kind]:
                raise ValueError(f"{field.name} must be at most {_LARGEST[kind]:g}, got {value!r}")
        elif kind in (bool, str) and not isinstance(value, kind):
            raise ValueError(f"{field.name} must be of type {kind.__name__}, got {value!r}")


def _check_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not (is_number(value) and value > 0):
            raise ValueError(f"{name} must be a positive number, got {value!r}")
        if isinstance(value, int):
            most = _LARGEST_COUNT if name.startswith("num_") else _LARGEST_WIDTH
            if value > most:
                raise ValueError(f"{name} must be at most {most}, got {value}")
    _check_types(config)


def _patch_product(modules: tuple[ModuleConfig, ...]) -> int:
    return math.prod(m.patch_size for m in modules if isinstance(m, PatchConfig))


def _chain(side: str, modules: tuple[ModuleConfig, ...], dim: int, downsample: bool) -> int:
    """Follows the frame width through `modules`, raising where two do not fit; the last width."""
    for i, module in enumerate(modules):
        if isinstance(module, PatchConfig):
            if not downsample and dim % module.patch_size:
                raise ValueError(
                    f"{side} module {i}: patch_size {module.patch_size} does not divide width {dim}"
                )
            dim = dim * module.patch_size if downsample else dim // module.patch_size
        elif module.input_dim != dim:
            raise ValueError(f"{side} module {i}: input_dim must be {dim}, got {module.input_dim}")
        else:
            dim = module.output_dim
    return dim


def _module_from_dict(fields: dict[str, Any]) -> ModuleConfig:
    fields = dict(fields)
    name = fields.pop("type", None)
    types = {v: k for k, v in _TYPE_NAMES.items()}
    check_choice("module type", name, tuple(types))
    return _from_dict(types[name], fields, name)


def _from_dict(cls: type, fields: dict[str, Any], what: str) -> Any:
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(fields.keys() - known):
        raise ValueError(f"unknown key {unknown[0]!r} in {what}; accepted: {', '.join(known)}")
    required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
    if missing := sorted(required - fields.keys()):
        raise ValueError(f"missing key {missing[0]!r} in {what}")
    return cls(**fields)


def _stack(
    patches: tuple[int, ...],
    rows: list[tuple[int, int, int, int, int, int, float]],
    layout: str,
    layer_scale: float = 0.01,
) -> tuple[ModuleConfig, ...]:
    """An encoder: a patch before each stage, and after the last one where a patch is left.

    Rows are (input_dim, output_dim, model_dim, num_heads, num_layers, mlp_dim, context_seconds).
    """
    modules: list[ModuleConfig] = []
    for patch_size, row in zip(patches, rows, strict=False):
        modules.append(PatchConfig(patch_size))
        stage = TransformerConfig(*row, layer_scale=layer_scale)
        # The v1 classes have a projection only where it changes the width; later ones always.
        if layout == "v1":
            stage = dataclasses.replace(
                stage,
                input_projection=stage.input_dim != stage.model_dim,
                output_projection=stage.output_dim != stage.model_dim,
            )
        modules.append(stage)
    modules += [PatchConfig(p) for p in patches[len(rows) :]]
    return tuple(modules)


def mirror(modules: tuple[ModuleConfig, ...]) -> tuple[ModuleConfig, ...]:
    """The decoder that undoes an encoder module by module."""

    def turn(module: ModuleConfig) -> ModuleConfig:
        if isinstance(module, PatchConfig):
            return module
        return dataclasses.replace(
            module,
            input_dim=module.output_dim,
            output_dim=module.input_dim,
            input_projection=module.output_projection,
            output_projection=module.input_projection,
        )

    return tuple(turn(m) for m in reversed(modules))


def _v1() -> CodecConfig:
    rows = [
        (240, 384, 768, 12, 12, 3072, 10.0),
        (768, 384, 768, 12, 12, 3072, 10.0),
        (768, 640, 768, 12, 12, 3072, 10.0),
        (1280, 768, 1280, 20, 32, 5120, 10.0),
    ]
    encoder = _stack((240, 2, 2, 2), rows, "v1")
    quantizer = QuantizerConfig(768, 512, 768, 32, 1024, 8)
    return CodecConfig(24000, 1, encoder, quantizer, mirror(encoder), "v1")


def _v2() -> CodecConfig:
    rows = [
        (240, 384, 768, 12, 12, 3072, 1.0),
        (768, 384, 768, 12, 12, 3072, 2.0),
        (768, 384, 768, 12, 12, 3072, 4.0),
        (768, 384, 768, 12, 12, 3072, 8.0),
        (768, 640, 768, 12, 12, 3072, 10.0),
        (1280, 768, 1280, 20, 32, 5120, 10.0),
    ]
    encoder = _stack((240, 2, 2, 2, 2, 2), rows, "v2")
    quantizer = QuantizerConfig(768, 512, 768, 32, 1024, 8)
    return CodecConfig(48000, 2, encoder, quantizer, mirror(encoder), "v2")


def _nano() -> CodecConfig:
    rows = [
        (240, 384, 256, 4, 4, 1024, 4.0),
        (768, 384, 256, 4, 2, 1024, 6.0),
        (768, 384, 256, 4, 2, 1024, 8.0),
        (768, 192, 256, 4, 4, 1024, 10.0),
    ]
    encoder = _stack((240, 2, 2, 2, 4), rows, "v2")
    quantizer = QuantizerConfig(768, 512, 768, 16, 1024, 8)
    return CodecConfig(48000, 2, encoder, quantizer, mirror(encoder), "v2")


def _tiny() -> CodecConfig:
    # 50 Hz: at 12.5 Hz a model this small has no room for phases, and so none for pitch.
    rows = [
        (240, 160, 128, 2, 2, 384, 1.0),
        (320, 256, 192, 3, 2, 512, 1.0),
    ]
    encoder = _stack((240, 2), rows, "v1", layer_scale=0.1)
    quantizer = QuantizerConfig(256, 96, 256, 16, 1024, 8)
    return CodecConfig(24000, 1, encoder, quantizer, mirror(encoder), "v1")


_PRESETS = {"v1": _v1, "v2": _v2, "nano": _nano, "tiny": _tiny}
PRESETS = tuple(_PRESETS)


def preset(name: str) -> CodecConfig:
    """The codec called `name`: "v1", "v2" and "nano" as published, "tiny" to try things with."""
    check_choice("preset", name, PRESETS)
    return _PRESETS[name]()
