"""The architecture of a codec as frozen configs: encoder, quantizer, decoder.

Shapes follow the legend in `moss_tok/__init__.py`. A `CodecConfig` is hashable, so it can be a
static argument of `jax.jit`.
"""

import dataclasses
import math
import numbers
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from moss_tok.errors import check_choice, check_positive
from moss_tok.json_files import format_json, from_fields, parse_json_object

if TYPE_CHECKING:
    import jax

# A count, or counts of a batch.
Count = TypeVar("Count", int, "jax.Array")

FORMAT = "moss_tok"


@dataclasses.dataclass(frozen=True)
class PatchConfig:
    """Folds `patch_size` frames into one (encoder), or unfolds a frame into `patch_size` (decoder).

    It has no parameters.
    """

    patch_size: int

    def __post_init__(self) -> None:
        check_positive(self, "patch_size")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """One causal Transformer stage.

    Attributes:
      input_dim: Width of the incoming frames.
      output_dim: Width of the outgoing frames.
      model_dim: Width of the blocks, D.
      num_heads: Attention heads, N.
      num_layers: Blocks, L.
      mlp_dim: Width of the feed-forward layer, F.
      context_seconds: Length of the attention window, the current frame included.
      layer_scale: Initial value of the LayerScale vectors.
      max_period: Longest RoPE period, in frames over 2 pi.
      input_projection: Whether the stage has an input projection; required where input_dim differs
        from model_dim.
      output_projection: The same for output_dim.
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

    def __post_init__(self) -> None:
        names = ("input_dim", "output_dim", "model_dim", "num_heads", "num_layers", "mlp_dim")
        check_positive(self, *names, "context_seconds", "max_period")
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
                    f"{side}_projection must be true because {side}_dim {dim} differs from "
                    f"model_dim {self.model_dim}"
                )

    @property
    def head_dim(self) -> int:
        """Width of one attention head, H."""
        return self.model_dim // self.num_heads


ModuleConfig = PatchConfig | TransformerConfig


@dataclasses.dataclass(frozen=True)
class QuantizerConfig:
    """Residual LFQ quantizer: `num_quantizers` codebooks of `codebook_size` x `codebook_dim`.

    Attributes:
      input_dim: Width of the latents.
      rvq_dim: Width of the residual that the quantizers code one after the other, R.
      output_dim: Width of the quantized latents.
      num_quantizers: Quantizers, Q.
      codebook_size: Rows of each codebook, K; at most 32768, so that codes fit int16.
      codebook_dim: Width of a codebook row.
    """

    input_dim: int
    rvq_dim: int
    output_dim: int
    num_quantizers: int
    codebook_size: int
    codebook_dim: int

    def __post_init__(self) -> None:
        names = [field.name for field in dataclasses.fields(self)]
        check_positive(self, *names)
        if self.codebook_size > 32768:
            raise ValueError(f"codebook_size must be at most 32768, got {self.codebook_size}")


@dataclasses.dataclass(frozen=True)
class CodecConfig:
    """The architecture of a codec: encoder modules, quantizer, decoder modules.

    Attributes:
      sample_rate: Hz.
      num_channels: C; several channels are interleaved into one stream of C * sample_rate Hz.
      encoder: Modules from the stream to the latents, in order.
      quantizer: The residual quantizer.
      decoder: Modules from the quantized latents to the stream, in order.
      layout: Family of tensor names in the official layout, "v1" or "v2"; for conversion only.
      official_json: The official config.json it was read from, written again on conversion; or "".
    """

    sample_rate: int
    num_channels: int
    encoder: tuple[ModuleConfig, ...]
    quantizer: QuantizerConfig
    decoder: tuple[ModuleConfig, ...]
    layout: str = "v1"
    official_json: str = dataclasses.field(default="", repr=False)

    def __post_init__(self) -> None:
        check_positive(self, "sample_rate", "num_channels")
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
        down = _patch_product(self.encoder)
        up = _patch_product(self.decoder)
        if down != up:
            raise ValueError(
                f"the decoder must upsample by {down}, the encoder's downsampling factor, got {up}"
            )
        if down % self.num_channels:
            raise ValueError(
                f"the product of the patch sizes must be a multiple of the {self.num_channels} "
                f"channels, got {down}"
            )

    @property
    def hop_length(self) -> int:
        """Samples per channel in one code frame."""
        return _patch_product(self.encoder) // self.num_channels

    @property
    def frame_rate(self) -> float:
        """Code frames per second."""
        return self.sample_rate / self.hop_length

    def stage_rates(self, side: str) -> tuple[float, ...]:
        """Frames per second inside each module of `side` ("encoder" or "decoder").

        For a patch module it is the lower of its input and output rates.
        """
        stream_rate = float(self.sample_rate * self.num_channels)
        rates = []
        folded = _patch_product(self.encoder) if side == "decoder" else 1
        for module in getattr(self, side):
            if isinstance(module, PatchConfig) and side == "encoder":
                folded *= module.patch_size
            rates.append(stream_rate / folded)
            if isinstance(module, PatchConfig) and side == "decoder":
                folded //= module.patch_size
        return tuple(rates)

    def windows(self, side: str) -> tuple[int | None, ...]:
        """Attention window of each module of `side`, in its frames; None for patch modules."""
        windows: list[int | None] = []
        for module, rate in zip(getattr(self, side), self.stage_rates(side), strict=True):
            if isinstance(module, PatchConfig):
                windows.append(None)
            else:
                windows.append(max(1, round(rate * module.context_seconds)))
        return tuple(windows)

    def num_frames(self, num_samples: Count) -> Count:
        """Code frames of `num_samples` samples per channel; a partly filled last frame counts."""
        return -(-num_samples // self.hop_length)

    def bitrate(self, num_quantizers: int | None = None) -> float:
        """Bits per second of the codes of the first `num_quantizers` quantizers; default: all."""
        num_quantizers = num_quantizers or self.quantizer.num_quantizers
        return self.frame_rate * num_quantizers * math.log2(self.quantizer.codebook_size)

    def check_num_quantizers(self, num_quantizers: int | None) -> int:
        """Returns `num_quantizers` if it is valid; None means all Q.

        Raises:
          ValueError: `num_quantizers` is not an integer in 1..Q.
        """
        limit = self.quantizer.num_quantizers
        if num_quantizers is None:
            return limit
        is_integer = isinstance(num_quantizers, numbers.Integral)
        is_integer &= not isinstance(num_quantizers, bool)
        if not is_integer or not 1 <= num_quantizers <= limit:
            raise ValueError(f"num_quantizers must be 1..{limit}, got {num_quantizers}")
        return int(num_quantizers)

    def to_json(self) -> str:
        """The config as JSON text that `from_json` reads."""
        fields = {"format": FORMAT} | dataclasses.asdict(self)
        for side in ("encoder", "decoder"):
            modules = []
            for module in getattr(self, side):
                modules.append({"type": _TYPE_NAMES[type(module)]} | dataclasses.asdict(module))
            fields[side] = modules
        return format_json(fields)

    @classmethod
    def from_json(cls, text: str) -> "CodecConfig":
        """Reads the JSON text that `to_json` wrote.

        Raises:
          ValueError: The text is not JSON, or has an unknown key or an invalid value.
        """
        fields = parse_json_object(text)
        if "temporal" in fields:
            raise ValueError("this is a speech model, not a codec")
        if fields.pop("format", None) != FORMAT:
            raise ValueError(f'not a moss_tok config: "format" must be "{FORMAT}"')
        for side in ("encoder", "decoder"):
            modules = fields.get(side)
            if not isinstance(modules, list) or not all(isinstance(m, dict) for m in modules):
                raise ValueError(f"{side} must be a list of modules")
            fields[side] = tuple(map(_module_from_dict, modules))
        if not isinstance(fields.get("quantizer"), dict):
            raise ValueError("quantizer must be an object")
        fields["quantizer"] = from_fields(QuantizerConfig, fields["quantizer"], "quantizer")
        return from_fields(cls, fields, "config")


_TYPE_NAMES = {PatchConfig: "patch", TransformerConfig: "transformer"}


def _patch_product(modules: tuple[ModuleConfig, ...]) -> int:
    product = 1
    for module in modules:
        if isinstance(module, PatchConfig):
            product *= module.patch_size
    return product


def _chain(side: str, modules: tuple[ModuleConfig, ...], dim: int, downsample: bool) -> int:
    """The width of frames after `modules`, if it is `dim` before them.

    Raises:
      ValueError: The widths of two modules differ.
    """
    for number, module in enumerate(modules):
        name = f"{side} module {number}"
        if isinstance(module, TransformerConfig):
            if module.input_dim != dim:
                raise ValueError(f"{name}: input_dim must be {dim}, got {module.input_dim}")
            dim = module.output_dim
        elif downsample:
            dim *= module.patch_size
        else:
            if dim % module.patch_size:
                raise ValueError(
                    f"{name}: patch_size {module.patch_size} does not divide width {dim}"
                )
            dim //= module.patch_size
    return dim


def _module_from_dict(fields: dict[str, Any]) -> ModuleConfig:
    fields = dict(fields)
    name = fields.pop("type", None)
    types = {type_name: cls for cls, type_name in _TYPE_NAMES.items()}
    check_choice("module type", name, tuple(types))
    return from_fields(types[name], fields, name)


def read_codec_config(path: Path) -> CodecConfig:
    """Reads a config.json that moss_tok wrote; a ValueError names the file if it is broken."""
    try:
        return CodecConfig.from_json(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error
