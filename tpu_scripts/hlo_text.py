"""The text of an optimised HLO module, parsed into computations of instructions."""

import dataclasses
import math
import re
from collections.abc import Iterator

_BYTES = {"pred": 1, "token": 0}  # for other types, the number of bits in the name
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

    @property
    def source(self) -> str:
        """The operation of the Python program that it comes from."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else self.name

    @property
    def chain(self) -> str | None:
        """Id of the transfer that it is part of, if that is spread over several fusions."""
        match = re.search(r'chain_id="(\w+)"', self.attributes)
        return match[1] if match else None


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """All computations of a module by name, and the name of the entry.

    Raises:
      ValueError: A line of unknown form, or no entry.
    """
    computations: dict[str, Computation] = {}
    entry = None
    for name, is_entry, lines in _blocks(text):
        computations[name] = {}
        for line in lines:
            i = _instruction(line)
            if i is not None:
                computations[name][i.name] = i
        if is_entry:
            entry = name
    if entry is None:
        raise ValueError("the HLO text has no ENTRY computation")
    return computations, entry


def _blocks(text: str) -> Iterator[tuple[str, bool, list[str]]]:
    """For each computation: its name, whether it is the entry, and its lines."""
    name = None
    is_entry = False
    lines: list[str] = []
    for line in text.splitlines():
        if name is None:
            head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if head:
                name = head[2]
                is_entry = bool(head[1])
                lines = []
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
    arrays = []
    for dtype, listed, layout in _ARRAY.findall(line[:end]):
        dims = tuple(int(size) for size in listed.split(",") if size)
        arrays.append(Array(dtype, dims, layout or ""))
    inside = line[opened + 1 : closed]
    opcode = line[end:opened].strip()
    if opcode in ("constant", "parameter"):
        operands = (inside,)
    else:
        operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(head[1], tuple(arrays), opcode, operands, line[closed + 1 :])


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for n in range(start, len(text)):
        depth += (text[n] == "(") - (text[n] == ")")
        if depth == 0:
            return n
    raise ValueError(f"unbalanced parentheses: {text[:100]}")
