"""The shape of a speech model: a temporal and a depth Transformer, as a frozen config.

Source: arXiv 2602.10934, its section on CAT-TTS; MossTTSLocal of OpenMOSS/MOSS-TTS.
"""

import dataclasses
import json
from typing import Any

from moss_tok.errors import check_choice, check_positive, check_types
from moss_tok.json_files import from_fields, parse_json_object
from moss_tok.nn.blocks import BlockConfig


@dataclasses.dataclass(frozen=True)
class StackConfig:
    """A stack of blocks, by default of Qwen3.

    Attributes:
      model_dim: Width, D.
      num_layers: Blocks, L.
      num_heads: Query heads, N.
      num_kv_heads: Key and value heads; each is shared by a group of query heads.
      head_dim: Width of a head, H.
      mlp_dim: Width of the feed-forward layer, F.
      norm_epsilon: Epsilon of the RMS norms.
      qkv_bias: Whether q, k and v have biases, as in Qwen2.5.
      head_norm: Whether each head of q and k has an RMS norm, as in Qwen3.
    """

    model_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    norm_epsilon: float = 1e-6
    qkv_bias: bool = False
    head_norm: bool = True

    def __post_init__(self) -> None:
        check_positive(self, "num_layers")
        _ = self.block  # checks the other values

    @property
    def block(self) -> BlockConfig:
        """The shape of one block."""
        return BlockConfig(
            self.model_dim,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.mlp_dim,
            self.norm_epsilon,
            self.qkv_bias,
            self.head_norm,
        )


LAYOUTS = ("plain", "chat")


@dataclasses.dataclass(frozen=True)
class SpeechConfig:
    """A speech model.

    Attributes:
      vocab_size: Tokens of the text channel, V.
      codebook_size: Codes of a quantizer, K; the code K means that there is no code.
      num_quantizers: Q.
      temporal: Blocks over the positions of text and frames.
      depth: Blocks over the channels of one frame.
      adapter_dim: Inner width of the adapters between both Transformers.
      slot_id: Token of the text channel where a frame of speech stands.
      end_id: Token of the text channel that ends speech.
      rope_theta: Longest RoPE period of the temporal blocks, in positions over 2 pi. The depth
        blocks have no positional encoding.
      start_id: Token of the text channel just before the first frame.
      user_slot_id: Token of the text channel where a frame of a reference stands.
      layout: Layout of its sequences, see `speech.layout`: "plain", or "chat", that of the official
        models.
      max_positions: Longest sequence that it was trained on.
      frame_rate: Frames per second of its codes, Hz.
      codec: Fingerprint of the codec of its codes; "" if it is unknown.
      official_json: The official config.json it was read from, written again on conversion; or "".
    """

    vocab_size: int
    codebook_size: int
    num_quantizers: int
    temporal: StackConfig
    depth: StackConfig
    adapter_dim: int
    slot_id: int
    end_id: int
    rope_theta: float = 1e6
    start_id: int = 0
    user_slot_id: int = 0
    layout: str = "plain"
    max_positions: int = 32768
    frame_rate: float = 12.5
    codec: str = ""
    official_json: str = dataclasses.field(default="", repr=False)

    def __post_init__(self) -> None:
        check_types(self)
        check_choice("layout", self.layout, LAYOUTS)
        for name in ("vocab_size", "codebook_size", "num_quantizers", "adapter_dim", "rope_theta",
                     "max_positions", "frame_rate"):  # fmt: skip
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        for name in ("slot_id", "end_id", "start_id", "user_slot_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(
                    f"{name} must be 0..{self.vocab_size - 1}, got {getattr(self, name)}"
                )

    @property
    def num_channels(self) -> int:
        """Channels of a position: the text, and one per quantizer."""
        return 1 + self.num_quantizers

    def to_json(self) -> str:
        """JSON text that `from_json` reads."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "SpeechConfig":
        """Reads the JSON text of `to_json`, also of earlier versions: missing keys take defaults.

        Raises:
          ValueError: The text is not JSON, or has an unknown key or an invalid value.
        """
        fields = parse_json_object(text)
        for name in ("temporal", "depth"):
            if not isinstance(fields.get(name), dict):
                raise ValueError(f"{name} must be an object")
            fields[name] = from_fields(StackConfig, fields[name], name)
        return from_fields(cls, fields, "speech model")


# model_dim, num_layers, num_heads, num_kv_heads, head_dim, mlp_dim of both stacks; adapter_dim.
# The heads of both stacks are equal, because the official class has one setting for both.
_SHAPES = {
    "tiny": ((192, 6, 3, 1, 64, 512), (128, 2, 3, 1, 64, 384), 192),
    "small": ((512, 12, 8, 2, 64, 1536), (384, 3, 8, 2, 64, 1152), 512),
    "1.7b": ((2048, 28, 16, 8, 128, 6144), (1536, 4, 16, 8, 128, 8960), 2048),
}
PRESETS = tuple(_SHAPES)


def preset(
    name: str,
    vocab_size: int,
    codebook_size: int,
    num_quantizers: int,
    slot_id: int,
    end_id: int,
    **fields: Any,
) -> SpeechConfig:
    """The model called `name`; "1.7b" has the published widths (MossTTSLocal).

    `fields` are other fields of `SpeechConfig`.
    """
    check_choice("speech_model", name, PRESETS)
    temporal, depth, adapter_dim = _SHAPES[name]
    return SpeechConfig(
        vocab_size,
        codebook_size,
        num_quantizers,
        StackConfig(*temporal),
        StackConfig(*depth),
        adapter_dim,
        slot_id,
        end_id,
        **fields,
    )


PUBLISHED = ("tts-1.7b",)


def published(name: str) -> SpeechConfig:
    """The config of a published model: "tts-1.7b", MossTTSLocal 1.0 of OpenMOSS.

    Raises:
      ValueError: There is no published model of that name.
    """
    check_choice("speech model", name, PUBLISHED)
    return preset(
        "1.7b",
        vocab_size=151936,
        codebook_size=1024,
        num_quantizers=32,
        slot_id=151656,
        end_id=151653,
        start_id=151652,
        user_slot_id=151654,
        layout="chat",
        max_positions=40960,  # of Qwen3-1.7B
    )
