"""FLOPs and bytes of the attention kernels, which the HLO does not show."""

import dataclasses
import math
import re
from collections.abc import Callable

import hlo
from hlo_costs import PASSES

from moss_tok.codec.config import CodecConfig
from moss_tok.language.config import LanguageConfig
from moss_tok.nn.compute import BF16_PRODUCTS, ComputeConfig
from moss_tok.nn.kernels import splash_block


@dataclasses.dataclass(frozen=True)
class Attention:
    """What a kernel computes for one item.

    Attributes:
      num_frames: Queries, and keys.
      window: Keys that a query attends to.
      num_heads: Heads.
      head_dim: Width of a head.
    """

    num_frames: int
    window: int
    num_heads: int
    head_dim: int


def of_codec(
    name: str,
    codec: CodecConfig,
    seconds: float,
    language: LanguageConfig | None = None,
    num_tokens: int = 0,
) -> Attention:
    """The attention of a kernel in a codec or in the language model that reads its codes.

    Args:
      name: Source of the kernel; one that belongs to no stage is in the language model.
      codec: The codec.
      seconds: Length of an item.
      language: The language model.
      num_tokens: Length of its text.
    """
    stage = re.search(r"(encoder|decoder)/stage_(\d+)", name)
    if not stage:
        size = round(codec.frame_rate * seconds) + 2 + num_tokens
        return Attention(size, size, language.num_heads, language.head_dim)
    side = stage[1]
    number = int(stage[2])
    module = getattr(codec, side)[number]
    num_frames = round(codec.stage_rates(side)[number] * seconds)
    return Attention(num_frames, codec.windows(side)[number], module.num_heads, module.head_dim)


def kernel_costs(
    kernels: dict[str, float],
    attention_of: Callable[[str], Attention],
    compute: ComputeConfig,
    items: int,
    parts: tuple[int, int] = (1, 1),
) -> hlo.Costs:
    """Costs of the attention kernels of a batch.

    Partly masked blocks count in full; keys and values are read for every block of queries that
    attends to them.

    Args:
      kernels: Sources of the kernels, and how often each runs.
      attention_of: Source of a kernel -> what it computes.
      compute: Compute settings of the kernels.
      items: Number of items in a batch.
      parts: Numbers of parts that items and heads are split into. If a number does not divide,
        every chip computes all items or heads.
    """
    total = hlo.Costs()
    half = compute.dtype == "bfloat16"
    is_single = half or compute.precision in ("default", BF16_PRODUCTS)
    passes = 1 if is_single else PASSES["highest"]  # kernels have no high
    for name, times in kernels.items():
        attention = attention_of(name)
        num_frames = attention.num_frames
        window = attention.window
        size = splash_block(num_frames, min(window, num_frames))
        blocks = -(-num_frames // size)
        seen = sum(i - max(0, i * size - window + 1) // size + 1 for i in range(blocks))
        rows = zip((items, attention.num_heads), parts, strict=True)
        heads = math.prod(count // n if count % n == 0 else count for count, n in rows)
        products = {"fwd": 2, "dq": 3, "dkv": 4}[re.search(r"fwd|dq|dkv", name)[0]]
        block_flops = products * 2 * passes * size * size * attention.head_dim
        block_bytes = size * max(attention.head_dim, 128) * (2 if half else 4)
        total.flops += times * heads * seen * block_flops
        total.hbm_bytes += times * heads * block_bytes * (2 * seen + (products + 1) * blocks)
    return total
