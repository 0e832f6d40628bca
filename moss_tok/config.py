"""Frozen configurations: the codec as a list of modules, how to compute it, and a training run.

Shapes follow the legend in `moss_tok/__init__.py`. A `CodecConfig` is hashable, so it can be a
static argument of `jax.jit`.
"""

import dataclasses
import json
import math
import numbers
from pathlib import Path
from typing import Any

FORMAT = "moss_tok"
ATTENTION = ("auto", "dense", "blocked")
REMAT = ("none", "dots", "full")


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
      attention: "auto", "dense" or "blocked".
      remat: What the backward pass recomputes per block: "none", "dots" (all but matmuls), "full".
    """

    dtype: str = "float32"
    precision: str = "highest"
    attention: str = "auto"
    remat: str = "none"

    def __post_init__(self):
        check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        check_choice("precision", self.precision, ("default", "high", "highest"))
        check_choice("attention", self.attention, ATTENTION)
        check_choice("remat", self.remat, REMAT)


def _flag(default: Any, help_text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help_text})


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run; each field is a flag of train.py."""

    model: str = _flag("tiny", "preset, or a config.json of a codec")
    train_data: str = _flag("", "folder of audio or manifest.jsonl; empty: synthetic sounds")
    eval_data: str = _flag("", "the same for evaluation (its test split); empty: train_data's")
    workdir: str = _flag("runs/quickstart", "everything is written here")
    num_steps: int = _flag(1000, "steps of the whole run")
    batch_size: int = _flag(8, "segments per step")
    segment_seconds: float = _flag(0.96, "length of a segment, rounded down to whole frames")
    num_microbatches: int = _flag(1, "parts a batch is split into; gradients are summed")
    seed: int = _flag(0, "of parameters, data order, crops and quantizer dropout")
    learning_rate: float = _flag(1e-4, "highest learning rate of AdamW")
    codebook_learning_rate: float = _flag(1.0, "factor on the learning rate of the codebooks")
    warmup_steps: int = _flag(1000, "steps of linear warm-up")
    decay_steps: int = _flag(0, "step at which a cosine has taken the learning rate to 0; 0: never")
    beta1: float = _flag(0.8, "AdamW's decay of the first moment")
    beta2: float = _flag(0.99, "AdamW's decay of the second moment")
    weight_decay: float = _flag(0.01, "AdamW's weight decay, on matrices only")
    gradient_clip: float = _flag(1000.0, "largest global norm of the gradient")
    reconstruction_weight: float = _flag(15.0, "weight of the multi-scale mel loss")
    commitment_weight: float = _flag(0.25, "weight of the commitment loss")
    codebook_weight: float = _flag(1.0, "weight of the codebook loss")
    quantizer_dropout: float = _flag(1.0, "share of items that use a random number of quantizers")
    reseed_every: int = _flag(0, "steps between re-seedings of dead codes; 0: never")
    dtype: str = _flag("float32", "of the Transformers: float32 or bfloat16")
    attention: str = _flag("auto", "auto, dense or blocked")
    remat: str = _flag("none", "recomputed in the backward pass: none, dots or full")
    log_every: int = _flag(50, "steps between lines of metrics.jsonl")
    checkpoint_every: int = _flag(1000, "steps between checkpoints")
    keep_checkpoints: int = _flag(2, "how many of the newest checkpoints stay")
    num_eval_clips: int = _flag(100, "clips of the evaluation at the end, at most; 0: none")

    def __post_init__(self):
        _check_types(self)
        for name in ("num_steps", "batch_size", "num_microbatches", "log_every"):
            _check_at_least(self, name, 1)
        for name in ("checkpoint_every", "keep_checkpoints"):
            _check_at_least(self, name, 1)
        for name in ("seed", "warmup_steps", "decay_steps", "reseed_every", "num_eval_clips"):
            _check_at_least(self, name, 0)
        for name in ("segment_seconds", "learning_rate", "gradient_clip"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in ("reconstruction_weight", "commitment_weight", "codebook_weight",
                     "weight_decay", "codebook_learning_rate"):  # fmt: skip
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be at least 0, got {value}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 0 and below 1, got {getattr(self, name)}"
                )
        if self.segment_seconds > 600:
            raise ValueError(f"segment_seconds must be at most 600, got {self.segment_seconds}")
        if not 0 <= self.quantizer_dropout <= 1:
            raise ValueError(f"quantizer_dropout must be 0..1, got {self.quantizer_dropout}")
        if self.batch_size % self.num_microbatches:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of num_microbatches "
                f"{self.num_microbatches}"
            )
        if not self.workdir:
            raise ValueError("workdir must not be empty")
        self.compute  # noqa: B018  checks dtype, attention and remat

    @property
    def compute(self) -> ComputeConfig:
        """How the codec is computed during training."""
        return ComputeConfig(self.dtype, "default", self.attention, self.remat)


# Fields that may change when a run goes on: they do not change what a step computes.
FREE_FIELDS = (
    "workdir", "num_steps", "log_every", "checkpoint_every", "keep_checkpoints", "eval_data",
    "num_eval_clips",
)  # fmt: skip


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
    try:
        return CodecConfig.from_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_at_least(config: Any, name: str, least: int) -> None:
    value = getattr(config, name)
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_choice(name: str, value: Any, accepted: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `accepted`."""
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {value!r}")


def parse_json_object(text: str) -> dict[str, Any]:
    """Parses a JSON object; ValueError if it is something else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"broken JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value


# No real model or run needs more; beyond, arithmetic on sizes overflows somewhere.
_LARGEST = {int: 2**31 - 1, float: 1e12}
_LARGEST_COUNT = 4096  # of layers, heads, quantizers, channels
_LARGEST_WIDTH = 2**20


def _check_types(config: Any) -> None:
    """Raises ValueError unless each plain field has its type and a number is finite and sane."""
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), field.type
        if kind not in (int, float, bool, str):
            continue
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (kind in (int, float) and isinstance(value, bool)):
            raise ValueError(f"{field.name} must be of type {kind.__name__}, got {value!r}")
        if kind in _LARGEST and not -_LARGEST[kind] <= value <= _LARGEST[kind]:
            raise ValueError(f"{field.name} must be at most {_LARGEST[kind]:g}, got {value!r}")


def _check_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 < value < math.inf:
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
    # Few stages and wide latents: narrow ones at 12.5 Hz leave the later quantizers nothing to do.
    rows = [
        (240, 128, 128, 2, 2, 384, 1.0),
        (512, 256, 128, 2, 1, 512, 1.0),
    ]
    encoder = _stack((240, 4, 2), rows, "v1", layer_scale=0.1)
    quantizer = QuantizerConfig(512, 96, 512, 16, 1024, 8)
    return CodecConfig(24000, 1, encoder, quantizer, mirror(encoder), "v1")


_PRESETS = {"v1": _v1, "v2": _v2, "nano": _nano, "tiny": _tiny}
PRESETS = tuple(_PRESETS)


def preset(name: str) -> CodecConfig:
    """The codec called `name`: "v1", "v2" and "nano" as published, "tiny" to try things with."""
    check_choice("preset", name, PRESETS)
    return _PRESETS[name]()
