"""What a language model is: the shape of Qwen2.5, as a frozen config, and presets."""

import dataclasses
import json

from moss_tok.errors import check_choice, is_number
from moss_tok.json_files import from_fields, parse_json_object
from moss_tok.nn.blocks import BlockConfig

INPUTS = ("codes", "latents")

# model_dim, num_layers, num_heads, num_kv_heads, mlp_dim. The last is Qwen2.5-0.5B.
_SHAPES = {
    "tiny": (192, 4, 3, 1, 512),
    "small": (512, 8, 8, 2, 1536),
    "0.5b": (896, 24, 14, 2, 4864),
}
PRESETS = tuple(_SHAPES)
_LARGEST = 2**20


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """A decoder-only Transformer, and the audio that goes into it.

    Attributes:
      latents_dim: Width of the codec's frames.
      vocab_size: Text tokens, V.
      end_id: Token before and after each text.
      model_dim: Width, D.
      num_layers: Blocks, L.
      num_heads: Query heads, N.
      num_kv_heads: Heads of keys and values, which groups of query heads share.
      mlp_dim: Width of the feed-forward layer, F.
      head_dim: Width of a head, H.
      rope_theta: Longest RoPE period, in positions over 2 pi.
      norm_epsilon: Of the RMS norms.
      audio: "codes": it hears quantized latents, which follow from codes; "latents": those before
        the quantizer.
    """

    latents_dim: int
    vocab_size: int
    end_id: int
    model_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    mlp_dim: int
    head_dim: int = 64
    rope_theta: float = 1e6
    norm_epsilon: float = 1e-6
    audio: str = "codes"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            least = 0 if field.name == "end_id" else 1
            if field.type is int and not (whole and least <= value <= _LARGEST):
                raise ValueError(f"{field.name} must be {least}..{_LARGEST}, got {value!r}")
        for name in ("rope_theta", "norm_epsilon"):
            if not (is_number(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")
        if self.end_id >= self.vocab_size:
            raise ValueError(f"end_id {self.end_id} must be below vocab_size {self.vocab_size}")
        check_choice("language_input", self.audio, INPUTS)

    @property
    def block(self) -> BlockConfig:
        """The shape of its blocks."""
        return BlockConfig(
            self.model_dim,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.mlp_dim,
            self.norm_epsilon,
        )

    def to_json(self) -> str:
        """JSON text that `from_json` reads."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "LanguageConfig":
        """Reads what `to_json` of this or an earlier version wrote: missing keys take defaults.

        Raises:
          ValueError: No JSON, or a key or value that is not known.
        """
        return from_fields(cls, parse_json_object(text), "language model")


def preset(
    name: str, latents_dim: int, vocab_size: int, end_id: int, audio: str = "codes"
) -> LanguageConfig:
    """The model called `name` over frames of `latents_dim` and `vocab_size` tokens."""
    check_choice("language_model", name, PRESETS)
    dim, layers, heads, kv_heads, mlp = _SHAPES[name]
    return LanguageConfig(
        latents_dim, vocab_size, end_id, dim, layers, heads, kv_heads, mlp, audio=audio
    )
