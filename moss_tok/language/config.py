"""The architecture of a language model (Qwen2.5) as a frozen config, and presets."""

import dataclasses

from moss_tok.errors import check_choice, check_positive
from moss_tok.json_files import format_json, from_fields, parse_json_object
from moss_tok.nn.blocks import BlockConfig

INPUTS = ("codes", "latents")

# model_dim, num_layers, num_heads, num_kv_heads, mlp_dim. The last row is Qwen2.5-0.5B.
_SHAPES = {
    "tiny": (192, 4, 3, 1, 512),
    "small": (512, 8, 8, 2, 1536),
    "0.5b": (896, 24, 14, 2, 4864),
}
PRESETS = tuple(_SHAPES)


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """The architecture of a decoder-only Transformer, and the audio that it takes.

    Attributes:
      latents_dim: Width of the codec's latents.
      vocab_size: Text tokens, V.
      end_id: Token before and after each text.
      model_dim: Width, D.
      num_layers: Blocks, L.
      num_heads: Query heads, N.
      num_kv_heads: Key and value heads; each is shared by a group of query heads.
      mlp_dim: Width of the feed-forward layer, F.
      head_dim: Width of a head, H.
      rope_theta: Longest RoPE period, in positions over 2 pi.
      norm_epsilon: Epsilon of the RMS norms.
      audio: Input, "codes" for quantized latents, which can be computed from codes; "latents" for
        those before the quantizer.
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

    def __post_init__(self) -> None:
        check_positive(self, "latents_dim", "vocab_size", "num_layers", "rope_theta")
        _ = self.block  # checks its values
        if not 0 <= self.end_id < self.vocab_size:
            raise ValueError(f"end_id must be 0..{self.vocab_size - 1}, got {self.end_id}")
        check_choice("language_input", self.audio, INPUTS)

    @property
    def block(self) -> BlockConfig:
        """The architecture of its blocks."""
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
        return format_json(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "LanguageConfig":
        """Reads the JSON text of `to_json`, also of earlier versions: missing keys take defaults.

        Raises:
          ValueError: The text is not JSON, has an unknown key, lacks a key without default, or has
            an invalid value.
        """
        return from_fields(cls, parse_json_object(text), "language model")


def preset(
    name: str,
    latents_dim: int,
    vocab_size: int,
    end_id: int,
    audio: str = "codes",
) -> LanguageConfig:
    """Returns the config of a model by name.

    Args:
      name: One of PRESETS.
      latents_dim: Width of the codec's latents.
      vocab_size: Text tokens, V.
      end_id: Token before and after each text.
      audio: "codes" or "latents", see `LanguageConfig`.

    Raises:
      ValueError: There is no preset of that name.
    """
    check_choice("language_model", name, PRESETS)
    dim, layers, heads, kv_heads, mlp = _SHAPES[name]
    return LanguageConfig(
        latents_dim=latents_dim,
        vocab_size=vocab_size,
        end_id=end_id,
        model_dim=dim,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        mlp_dim=mlp,
        audio=audio,
    )
