"""FLOPs, bytes and collectives of a compiled TPU program, from its optimised HLO.

`compiled.cost_analysis()` counts the body of a loop once; this counts it as often as it runs.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

_BYTES = {"pred": 1, "token": 0}  # for other types, the number of bits in the name
PASSES = {"highest": 6, "high": 3}  # bfloat16 products per float32 product
_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_NO_TRAFFIC = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id",
    "replica-id", "iota", "opt-barrier", "domain",
}  # fmt: skip
_HEAD = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z]+[0-9a-z]*)\[([0-9,]*)\](?:\{([^}]*)\})?")


@dataclasses.dataclass(frozen=True)
class Array:
    """Type of an array: its dimensions and its layout."""

    dtype: str
    dims: tuple[int, ...]
    layout: str

    @property
    def in_hbm(self) -> bool:
        """Whether it is in main memory and not in memory of the core."""
        return "S(" not in self.layout

    @property
    def num_bytes(self) -> float:
        """Size in memory, padded to whole tiles."""
        dims = list(self.dims)
        order, _, tiles = self.layout.partition(":")
        tile = re.match(r"T\(([0-9,]+)\)", tiles)
        if tile and order and dims:
            sizes = [int(t) for t in tile[1].split(",")]
            minor_first = [int(d) for d in order.split(",")]
            for size, axis in zip(reversed(sizes), minor_first, strict=False):
                dims[axis] = -(-dims[axis] // size) * size
        return math.prod(dims) * self.item_size

    @property
    def item_size(self) -> float:
        """Bytes per element."""
        if self.dtype in _BYTES:
            return _BYTES[self.dtype]
        return int(re.search(r"\d+", self.dtype)[0]) / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    arrays: tuple[Array, ...]  # arrays of the result, flattened
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    def called(self, key: str) -> str | None:
        """Name of the computation in attribute `key`; None without it."""
        match = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else None


Computation = dict[str, Instruction]


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


@dataclasses.dataclass
class Costs:
    """Costs of one chip in one run of the program.

    flops: FLOPs of products; a float32 product at HIGHEST counts as six bfloat16 products.
    hbm_bytes: bytes read from and written to main memory.
    kernels: source of each Pallas kernel -> how often it runs; the HLO does not have their costs.
    traffic: source -> hbm_bytes, without kernels.
    """

    flops: float = 0
    hbm_bytes: float = 0
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    kernels: dict[str, float] = dataclasses.field(default_factory=dict)
    traffic: dict[str, float] = dataclasses.field(default_factory=dict)

    def add(self, other: "Costs", times: float = 1) -> None:
        """Adds another program that runs `times` times."""
        self.flops += times * other.flops
        self.hbm_bytes += times * other.hbm_bytes
        self.collectives += [c.repeated(times) for c in other.collectives]
        for mine, others in ((self.kernels, other.kernels), (self.traffic, other.traffic)):
            for name, amount in others.items():
                mine[name] = mine.get(name, 0) + times * amount

    def move(self, source: str, num_bytes: float) -> None:
        """Counts traffic with main memory."""
        self.hbm_bytes += num_bytes
        self.traffic[source] = self.traffic.get(source, 0) + num_bytes


def analyse(text: str) -> Costs:
    """Costs of one run of an optimised module.

    Args:
      text: `compiled.as_text()`, or the program from XLA's dump.

    Raises:
      ValueError: A loop with an unknown number of iterations, or a line of unknown form.
    """
    return _Module(text).costs


class _Module:
    def __init__(self, text: str):
        self._computations: dict[str, Computation] = {}
        self._done: dict[str, Costs] = {}
        entry = None
        for name, is_entry, lines in _blocks(text):
            self._computations[name] = {}
            for line in lines:
                i = _instruction(line)
                if i is not None:
                    self._computations[name][i.name] = i
            if is_entry:
                entry = name
        if entry is None:
            raise ValueError("the HLO text has no ENTRY computation")
        self.costs = self._run(entry)

    def _run(self, name: str) -> Costs:
        """Costs of a computation whose instructions run one by one."""
        if name not in self._done:
            total = Costs()
            for instruction in self._computations[name].values():
                self._execute(total, self._computations[name], instruction)
            self._done[name] = total
        return self._done[name]

    def _execute(self, total: Costs, computation: Computation, i: Instruction) -> None:
        if i.opcode == "while":
            iterations = self._iterations(i, i.called("condition"))
            total.add(self._run(i.called("body")), iterations)
            return
        if i.opcode == "conditional":
            branches = [self._run(b) for b in self._branches(i)]
            total.add(max(branches, key=lambda c: (c.flops, c.hbm_bytes)))
            return
        if i.opcode == "call":
            total.add(self._run(i.called("to_apply")))
            return
        if 'async_execution_thread="sparsecore"' in i.attributes:  # runs in parallel
            beside = self._run(i.called("to_apply") or i.called("calls"))
            moving = [dataclasses.replace(c, is_async=True) for c in beside.collectives]
            total.add(dataclasses.replace(beside, collectives=moving))
            return
        if i.opcode in _NO_TRAFFIC or i.opcode.endswith(("-done", "-update")):
            return
        kind = i.opcode.removesuffix("-start")
        moved = self._traffic(computation, i)
        if kind in _COLLECTIVES:
            total.collectives.append(_collective(computation, i, kind, kind != i.opcode))
        elif i.opcode == "custom-call" and "tpu_custom_call" in i.attributes:
            name = _source(i)
            total.kernels[name] = total.kernels.get(name, 0) + 1
        elif i.opcode in ("fusion", "async-start"):
            inner = self._computations[i.called("calls")]
            flops = self._flops(inner)
            total.flops += flops
            self._put_beside(total, i.called("calls"), flops, moved)
            total.collectives += self._inner_collectives(inner, flops > 0)
        else:
            total.flops += _flops(computation, i)
        total.move(_source(i), moved)

    def _branches(self, i: Instruction) -> list[str]:
        listed = re.search(r"branch_computations=\{([^}]*)\}", i.attributes)
        if listed:
            return [b.strip().lstrip("%") for b in listed[1].split(",")]
        return [i.called("true_computation"), i.called("false_computation")]

    def _iterations(self, loop: Instruction, condition: str) -> int:
        """Iterations of a loop that counts from 0 to a constant."""
        known = re.search(r"known_trip_count\D+(\d+)", loop.attributes)
        if known:
            return int(known[1])
        limits = set()
        for i in self._reachable(condition):
            if i.opcode == "constant" and i.arrays[0].dims == ():
                limits.add(int(i.operands[0]))
        if len(limits) != 1:
            raise ValueError(f"loop {loop.name}: {len(limits)} candidates for its limit: {limits}")
        return limits.pop()

    def _reachable(self, name: str) -> Iterator[Instruction]:
        for i in self._computations[name].values():
            yield i
            called = i.called("calls")
            if called:
                yield from self._reachable(called)

    def _flops(self, computation: Computation) -> float:
        total = 0.0
        for i in computation.values():
            total += _flops(computation, i)
            if i.opcode in ("fusion", "call"):
                total += self._flops(self._computations[i.called("calls") or i.called("to_apply")])
        return total

    def _inner_collectives(self, computation: Computation, computes: bool) -> Iterator[Collective]:
        """Collectives of a fusion; hidden if it `computes` at the same time or only starts them.

        A collective that is spread over several fusions is in each of them; it counts in the one
        that starts it.
        """
        marked = any('"AsyncCollective' in i.attributes for i in computation.values())
        started = any('"AsyncCollectiveStart"' in i.attributes for i in computation.values())
        for i in computation.values():
            kind = i.opcode.removesuffix("-start")
            if kind in _COLLECTIVES and (started or not _chain(i)):
                if kind == "all-reduce" and _is_scattered(computation, i):
                    kind = "reduce-scatter"
                hidden = computes or marked or bool(_chain(i)) or i.opcode.endswith("-start")
                yield _collective(computation, i, kind, hidden)
            elif i.opcode == "fusion":
                inner = self._computations[i.called("calls")]
                yield from self._inner_collectives(inner, computes or marked)

    def _put_beside(self, total: Costs, fusion: str, flops: float, num_bytes: float) -> None:
        """Divides the costs of a fusion among the transfers that are spread over it."""
        chains = {_chain(i) for i in self._reachable(fusion)} - {None}
        for n, c in enumerate(total.collectives):
            if c.chain in chains:
                total.collectives[n] = dataclasses.replace(
                    c,
                    flops_beside=c.flops_beside + flops / len(chains),
                    bytes_beside=c.bytes_beside + num_bytes / len(chains),
                )

    def _traffic(self, computation: Computation, i: Instruction) -> float:
        """Bytes that an instruction reads from and writes to main memory."""
        if i.opcode.endswith("-start"):
            if i.opcode in ("copy-start", "slice-start", "async-start"):
                moved = i.arrays[1] if len(i.arrays) > 1 else i.arrays[0]
                return moved.num_bytes * (1 + all(a.in_hbm for a in i.arrays[:2]))
            return 0.0
        if i.opcode == "custom-call":
            return 0.0  # views and allocations; kernels are counted separately
        operands = [computation[name] for name in i.operands if name in computation]
        inner = self._computations[i.called("calls")] if i.opcode == "fusion" else None
        read, written = 0.0, sum(a.num_bytes for a in i.arrays if a.in_hbm)
        for number, operand in enumerate(operands):
            size = sum(a.num_bytes for a in operand.arrays if a.in_hbm)
            if size and inner:
                size = min(size, self._read_by_fusion(inner, number, size))
            elif i.opcode in ("dynamic-slice", "slice", "gather") and number == 0:
                size = min(size, i.arrays[0].num_bytes)
            elif i.opcode == "dynamic-update-slice" and number == 0:
                size = 0.0
            read += size
        if i.opcode == "dynamic-update-slice":
            written = operands[1].arrays[0].num_bytes
        elif inner:
            written = self._written_by_fusion(inner, written)
        return read + written

    def _read_by_fusion(self, inner: Computation, number: int, size: float) -> float:
        """Bytes of a parameter that a fusion reads; only the slices if it reads slices of it."""
        parameter = next(
            i for i in inner.values() if i.opcode == "parameter" and i.operands == (str(number),)
        )
        names = {parameter.name}
        read = 0.0
        for i in inner.values():  # in order of use
            if not names & set(i.operands):
                continue
            if i.opcode == "bitcast":
                names.add(i.name)
            elif i.opcode in ("dynamic-slice", "slice", "gather") and i.operands[0] in names:
                read += i.arrays[0].num_bytes
            elif i.opcode == "dynamic-update-slice" and i.operands[0] in names:
                pass  # updated in place
            elif i.opcode == "tuple" or _chain(i) or '"AsyncCollective' in i.attributes:
                pass  # passed on
            elif i.opcode == "fusion":
                nested = self._computations[i.called("calls")]
                for n, operand in enumerate(i.operands):
                    if operand in names:
                        read += self._read_by_fusion(nested, n, size)
            else:
                return size
        return read

    def _written_by_fusion(self, inner: Computation, written: float) -> float:
        """Bytes that a fusion writes: updates of in-place arrays, nothing of passed-on ones."""
        *_, root = inner.values()
        if '"AsyncCollectiveDone"' in root.attributes:
            return 0.0
        for i in inner.values():
            passed_on = root.opcode == "tuple" and i.name in root.operands
            if passed_on and i.opcode in ("parameter", "all-gather"):
                written -= sum(a.num_bytes for a in i.arrays if a.in_hbm)
            elif i.opcode == "dynamic-update-slice" and i.arrays[0].in_hbm:
                update = inner[i.operands[1]].arrays[0]
                whole = i.arrays[0].num_bytes
                if whole <= written:
                    written -= whole - update.num_bytes
        return max(written, 0.0)


def _blocks(text: str) -> Iterator[tuple[str, bool, list[str]]]:
    """For each computation: its name, whether it is the entry, and its lines."""
    name, is_entry, lines = None, False, []
    for line in text.splitlines():
        if name is None:
            head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if head:
                name, is_entry, lines = head[2], bool(head[1]), []
        elif re.fullmatch(r'\}(, execution_thread="\w+")?', line):
            yield name, is_entry, lines
            name = None
        elif lines and not _HEAD.match(line):  # attributes may have line breaks
            lines[-1] += line
        else:
            lines.append(line)


def _instruction(line: str) -> Instruction | None:
    head = _HEAD.match(line)
    if not head:
        return None
    line = re.sub(r"/\*.*?\*/", "", line[head.end() :])
    end = _closing(line, 0) + 1 if line.startswith("(") else line.index(" ")
    opened = line.index("(", end)
    closed = _closing(line, opened)
    arrays = tuple(
        Array(dtype, tuple(int(d) for d in dims.split(",") if d), layout or "")
        for dtype, dims, layout in _ARRAY.findall(line[:end])
    )
    inside = line[opened + 1 : closed]
    opcode = line[end:opened].strip()
    if opcode in ("constant", "parameter"):
        operands = (inside,)
    else:
        operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(head[1], arrays, opcode, operands, line[closed + 1 :])


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for n in range(start, len(text)):
        depth += (text[n] == "(") - (text[n] == ")")
        if depth == 0:
            return n
    raise ValueError(f"unbalanced parentheses: {text[:100]}")


def _flops(computation: Computation, i: Instruction) -> float:
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
        taps = _taps(window, n, left.dims[lhs.index(axis)], i.arrays[0].dims[out.index(axis)])
        products *= taps
    products *= i.arrays[0].dims[out.index("b")] * i.arrays[0].dims[out.index("f")]
    return 2.0 * passes * products * right.dims[rhs.index("i")]


def _taps(window: dict[str, str], n: int, size: int, outputs: int) -> int:
    """Pairs of output position and kernel tap that meet an element of the input."""

    def number(key, default):
        return window[key].split("x")[n] if key in window else default

    kernel, stride = int(number("size", 1)), int(number("stride", 1))
    low = int(number("pad", "0_0").split("_")[0])
    base, dilation = int(number("lhs_dilate", 1)), int(number("rhs_dilate", 1))
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


def _collective(computation: Computation, i: Instruction, kind: str, is_async: bool) -> Collective:
    group = _first_group(i.attributes)
    size, stride = len(group), group[1] - group[0] if len(group) > 1 else 0
    operands = [a for name in i.operands for a in computation[name].arrays]
    data = sum(math.prod(a.dims) * a.item_size for a in operands)  # one chip's share
    share = (size - 1) / size
    moved = {"all-reduce": 2 * share, "all-gather": size - 1.0, "collective-permute": 1.0}
    moved_bytes = data * moved.get(kind, share)
    return Collective(kind, _source(i), moved_bytes, size, stride, 1, is_async, _chain(i))


def _is_scattered(computation: Computation, i: Instruction) -> bool:
    """Whether each chip keeps only its part of the sum: an all-reduce fused with a slice."""
    *_, root = computation.values()
    return root.opcode == "dynamic-slice" and root.operands[0] == i.name


def _chain(i: Instruction) -> str | None:
    """Id of the transfer that it is part of, if that is spread over several fusions."""
    match = re.search(r'chain_id="(\w+)"', i.attributes)
    return match[1] if match else None


def _source(i: Instruction) -> str:
    """The operation of the Python program that it comes from."""
    match = re.search(r'op_name="([^"]*)"', i.attributes)
    return match[1] if match else i.name


_IOTA = r"\[([0-9,]*)\](?:T\(([0-9,]*)\))?"


def _first_group(attributes: str) -> list[int]:
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
