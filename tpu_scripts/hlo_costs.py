"""FLOPs of products and bytes of collectives, from single instructions of an HLO module."""

import dataclasses
import math
import re

import numpy as np
from hlo_text import Computation, Instruction

PASSES = {"highest": 6, "high": 3}  # bfloat16 products per float32 product


def product_flops(computation: Computation, i: Instruction) -> float:
    """FLOPs of a product, times its passes; 0 for other instructions."""
    if i.opcode not in ("dot", "convolution"):
        return 0.0
    left, right = (computation[name].arrays[0] for name in i.operands)
    precision = re.search(r"operand_precision=\{(\w+)", i.attributes)
    passes = PASSES.get(precision[1], 1) if precision and left.dtype == "f32" else 1
    if i.opcode == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", i.attributes)[1]
        contracted = math.prod(left.dims[int(a)] for a in axes.split(",") if a)
        return 2.0 * passes * contracted * math.prod(i.arrays[0].dims)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    lhs, rhs, out = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", i.attributes)
    window = dict(item.split("=") for item in window[1].split()) if window else {}
    products = 1
    for n in range(len(lhs) - 2):
        axis = str(n)
        outputs = i.arrays[0].dims[out.index(axis)]
        products *= taps(window, n, left.dims[lhs.index(axis)], outputs)
    products *= i.arrays[0].dims[out.index("b")] * i.arrays[0].dims[out.index("f")]
    return 2.0 * passes * products * right.dims[rhs.index("i")]


def taps(window: dict[str, str], n: int, size: int, outputs: int) -> int:
    """Pairs of output position and kernel tap that meet an element of the input."""

    def value(key, default):
        return window[key].split("x")[n] if key in window else default

    kernel = int(value("size", 1))
    stride = int(value("stride", 1))
    low = int(value("pad", "0_0").split("_")[0])
    base = int(value("lhs_dilate", 1))
    dilation = int(value("rhs_dilate", 1))
    count = 0
    for tap in range(kernel):
        start = tap * dilation - low  # its position for the first output
        # Outputs o with start + o * stride = base * x, 0 <= x < size.
        first = max(0, -(start // stride)) if start < 0 else 0
        last = min(outputs - 1, (base * (size - 1) - start) // stride)
        if base == 1:
            count += max(0, last - first + 1)
        else:
            period = base // math.gcd(base, stride)
            hits = [o for o in range(first, min(first + period, last + 1))
                    if (start + o * stride) % base == 0]  # fmt: skip
            count += sum((last - o) // period + 1 for o in hits)
    return count


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of transfer between chips, and how often it runs in a step.

    If it is spread over several fusions, `chain` identifies it, and `flops_beside` and
    `bytes_beside` are what these fusions compute and move at the same time.
    """

    opcode: str
    source: str  # the operation in the Python program
    num_bytes: float  # over the links of each chip, summed over all runs
    group_size: int
    stride: int  # from one chip of a group to the next, in the order of the mesh
    times: float
    is_async: bool
    chain: str | None = None
    flops_beside: float = 0
    bytes_beside: float = 0

    def repeated(self, times: float) -> "Collective":
        """This collective in a program that runs `times` times."""
        sums = ("num_bytes", "times", "flops_beside", "bytes_beside")
        return dataclasses.replace(self, **{name: times * getattr(self, name) for name in sums})


def collective(computation: Computation, i: Instruction, kind: str, is_async: bool) -> Collective:
    """The transfer that an instruction of this kind makes in one run."""
    group = first_group(i.attributes)
    size = len(group)
    stride = group[1] - group[0] if size > 1 else 0
    data = 0  # one chip's share
    for name in i.operands:
        data += sum(math.prod(a.dims) * a.item_size for a in computation[name].arrays)
    share = (size - 1) / size
    moved = {"all-reduce": 2 * share, "all-gather": size - 1.0, "collective-permute": 1.0}
    moved_bytes = data * moved.get(kind, share)
    return Collective(kind, i.source, moved_bytes, size, stride, 1, is_async, i.chain)


def is_scattered(computation: Computation, i: Instruction) -> bool:
    """Whether each chip keeps only its part of the sum: an all-reduce fused with a slice."""
    *_, root = computation.values()
    return root.opcode == "dynamic-slice" and root.operands[0] == i.name


_IOTA = r"\[([0-9,]*)\](?:T\(([0-9,]*)\))?"


def first_group(attributes: str) -> list[int]:
    """Chips of the first group of a collective, in order."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", attributes):
        names, sizes = zip(*re.findall(r"'(\w+)'=(\d+)", mesh[1]), strict=True)
        chosen = re.findall(r"'(\w+)'", mesh[3])
        sizes = [int(n) for n in sizes]
        order = re.search(rf"device_ids=\({_IOTA}\)", mesh[2])
        chips = _iota(*order.groups()) if order else np.arange(math.prod(sizes))
        first = tuple(slice(None) if name in chosen else 0 for name in names)
        return chips.reshape(sizes)[first].ravel().tolist()
    if iota := re.search(rf"replica_groups=\[\d+,(\d+)\]<={_IOTA}", attributes):
        return _iota(iota[2], iota[3])[: int(iota[1])].tolist()
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([0-9,]*)\}", attributes)
    if listed:
        return _integers(listed[1])
    raise ValueError(f"collective without groups: {attributes[:200]}")


def _iota(sizes: str, order: str | None) -> np.ndarray:
    """The device numbers that the notation "[2,4]T(1,0)" stands for."""
    numbers = np.arange(math.prod(_integers(sizes))).reshape(_integers(sizes))
    return numbers.transpose(_integers(order) if order else None).ravel()


def _integers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]
