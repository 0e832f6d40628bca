"""FLOPs, bytes and collectives of a compiled TPU program, from its optimised HLO.

`compiled.cost_analysis()` counts the body of a loop once; this counts it as often as it runs.
"""

import dataclasses
import re
from collections.abc import Iterator

from hlo_costs import Collective, collective, is_scattered, product_flops
from hlo_text import Computation, Instruction, parse

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
        self._computations, entry = parse(text)
        self._done: dict[str, Costs] = {}
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
            total.collectives.append(collective(computation, i, kind, kind != i.opcode))
        elif i.opcode == "custom-call" and "tpu_custom_call" in i.attributes:
            name = i.source
            total.kernels[name] = total.kernels.get(name, 0) + 1
        elif i.opcode in ("fusion", "async-start"):
            inner = self._computations[i.called("calls")]
            flops = self._flops(inner)
            total.flops += flops
            self._put_beside(total, i.called("calls"), flops, moved)
            total.collectives += self._inner_collectives(inner, flops > 0)
        else:
            total.flops += product_flops(computation, i)
        total.move(i.source, moved)

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
            total += product_flops(computation, i)
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
            if kind in _COLLECTIVES and (started or not i.chain):
                if kind == "all-reduce" and is_scattered(computation, i):
                    kind = "reduce-scatter"
                hidden = computes or marked or bool(i.chain) or i.opcode.endswith("-start")
                yield collective(computation, i, kind, hidden)
            elif i.opcode == "fusion":
                inner = self._computations[i.called("calls")]
                yield from self._inner_collectives(inner, computes or marked)

    def _put_beside(self, total: Costs, fusion: str, flops: float, num_bytes: float) -> None:
        """Divides the costs of a fusion among the transfers that are spread over it."""
        chains = {i.chain for i in self._reachable(fusion)} - {None}
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
        read = 0.0
        written = sum(a.num_bytes for a in i.arrays if a.in_hbm)
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
            elif i.opcode == "tuple" or i.chain or '"AsyncCollective' in i.attributes:
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
