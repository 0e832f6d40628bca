"""Estimated time of a compiled program on the published rates of a TPU chip, and its scaling."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import hlo
import jax
from hlo_costs import Collective


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one chip.

    Attributes:
      flops: FLOP/s in bfloat16.
      hbm_bytes: Size of the main memory.
      hbm_rate: Its bandwidth, bytes/s.
      ici_rate: Bytes/s that it sends over all its links.
      num_axes: Number of axes of the torus.
      ring: Axes with a multiple of this number of chips are closed to rings; others are lines.
    """

    flops: float
    hbm_bytes: float
    hbm_rate: float
    ici_rate: float
    num_axes: int
    ring: int

    def link_rate(self, sizes: Sequence[int]) -> float:
        """Bytes/s along one axis of a slice of these sizes; a line has half the rate of a ring."""
        rings = all(n % self.ring == 0 for n in sizes if n > 1)
        return self.ici_rate / self.num_axes / (1 if rings else 2)


# From cloud.google.com/tpu/docs; the interchip bandwidth there counts both directions, so half.
CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1228e9, 300e9, 3, 4),
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 200e9, 2, 16),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 600e9, 3, 4),
    "v6e": Chip(918e12, 32 * 2**30, 1638e9, 400e9, 2, 16),
}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Estimated time of one run of a program, at the published rates of a chip."""

    chip: Chip
    link_rate: float
    num_chips: int
    costs: hlo.Costs
    useful_flops: float  # of all chips

    @property
    def compute(self) -> float:
        """Seconds of arithmetic."""
        return self.costs.flops / self.chip.flops

    @property
    def memory(self) -> float:
        """Seconds of traffic with the main memory."""
        return self.costs.hbm_bytes / self.chip.hbm_rate

    @property
    def links(self) -> float:
        """Seconds of transfers that no computation hides."""
        waiting = sum(c.num_bytes for c in self.costs.collectives if not c.is_async)
        return waiting / self.link_rate

    @property
    def short(self) -> float:
        """Seconds by which transfers take longer than the operations that hide them."""
        spread = [c for c in self.costs.collectives if c.chain is not None]
        return sum(max(0.0, c.num_bytes / self.link_rate - self._beside(c)) for c in spread)

    def _beside(self, c: Collective) -> float:
        return max(c.flops_beside / self.chip.flops, c.bytes_beside / self.chip.hbm_rate)

    @property
    def step(self) -> float:
        """Seconds in total."""
        return max(self.compute, self.memory) + self.links

    @property
    def utilisation(self) -> float:
        """Useful FLOPs as a share of the chips' peak."""
        return self.useful_flops / self.num_chips / self.step / self.chip.flops

    @property
    def binds(self) -> str:
        """Name of the largest term."""
        terms = {"arithmetic": self.compute, "memory": self.memory, "links": self.links}
        return max(terms, key=terms.get)

    def show(self) -> None:
        """Prints the terms."""
        c = self.costs
        chip = self.chip
        groups: dict[Any, list[Collective]] = collections.defaultdict(list)
        for transfer in c.collectives:
            kind = "asynchronous" if transfer.is_async else "waited for"
            groups[transfer.opcode, kind].append(transfer)
        for (opcode, kind), transfers in sorted(groups.items()):
            count = sum(transfer.times for transfer in transfers)
            size = sum(transfer.num_bytes for transfer in transfers)
            print(f"  {opcode:<16} {count:.0f} x, {giga(size)} GB over a chip's links, {kind}")
        rows = {
            "arithmetic": f"{c.flops / 1e12:.1f} TFLOP / {chip.flops / 1e12:.0f} TFLOP/s = "
            f"{self.compute:.3f} s",
            "memory": f"{giga(c.hbm_bytes)} GB / {giga(chip.hbm_rate)} GB/s = {self.memory:.3f} s",
            "estimated time": f"max(arithmetic, memory) + links not hidden {self.links:.3f} s = "
            f"{self.step:.3f} s; {self.binds} binds",
            "not in it": f"{self.short:.3f} s by which transfers take longer than what hides them",
            "utilisation": f"{self.useful_flops / 1e12:.0f} useful TFLOP / {self.num_chips} / "
            f"({self.step:.3f} s x {chip.flops / 1e12:.0f} TFLOP/s) = {self.utilisation:.0%}, "
            "an estimate",
        }
        for name, text in rows.items():
            print(f"  {name:<16} {text}", flush=True)


def show_scaling(
    estimate: Estimate, mesh: jax.sharding.Mesh, items_per_chip: float, arguments: int, peak: int
) -> None:
    """Prints the estimate for 4 to 4096 chips with the same number of items per chip.

    Arithmetic and memory traffic per chip stay the same. More chips extend the data axis; fewer
    chips shorten fsdp, so that each has more of the `arguments`. Transfers in a ring of n send
    (n - 1) / n of an array; slices too small for a torus have lines instead of rings.
    """
    data, fsdp, tensor = (mesh.shape[name] for name in ("data", "fsdp", "tensor"))
    chip = estimate.chip
    print("| chips | batch | peak, GB | step, s | links not hidden | estimated utilisation |")
    print("|---|---|---|---|---|---|")
    for num_chips in (4**n for n in range(1, 7) if 4**n % tensor == 0):
        new_fsdp = min(fsdp, num_chips // tensor)
        new_data = num_chips // tensor // new_fsdp
        sizes = {  # (size, stride) of a group now: its new size
            (fsdp, tensor): new_fsdp,
            (data, tensor * fsdp): new_data,
            (data * fsdp, tensor): new_data * new_fsdp,
            (mesh.size, 1): num_chips,
        }
        scaled = dataclasses.replace(estimate.costs, collectives=[])
        for c in estimate.costs.collectives:
            ring = c.opcode != "collective-permute"
            if ring and (new := sizes.get((c.group_size, c.stride))):
                was, now = ((n - 1) / n for n in (c.group_size, new))
                c = dataclasses.replace(c, num_bytes=c.num_bytes * now / was)
            scaled.collectives.append(c)
        useful = estimate.useful_flops / estimate.num_chips * num_chips
        rings = num_chips >= chip.ring**chip.num_axes
        rate = chip.link_rate([chip.ring if rings else chip.ring // 2])
        e = Estimate(chip, rate, num_chips, scaled, useful)
        held = giga(peak + arguments * (fsdp / new_fsdp - 1))
        print(
            f"| {num_chips} | {items_per_chip * num_chips:g} | {held} | {e.step:.3f} | "
            f"{e.links / e.step:.1%} | {e.utilisation:.0%} |",
            flush=True,
        )


def check_scaling(mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError if the program lacks transfers that a larger slice has."""
    data = mesh.shape["data"]
    fsdp = mesh.shape["fsdp"]
    if data == 1 or fsdp == 1:
        raise ValueError(f"scaling needs a mesh of data and fsdp above 1, got {data} and {fsdp}")
    for name in ("fsdp", "tensor"):
        if (size := mesh.shape[name]) & (size - 1):
            raise ValueError(f"scaling needs a power of two for {name}, got {size}")


def giga(x: float) -> str:
    """A number in units of 1e9, with three digits."""
    return f"{x / 1e9:.3g}" if x < 1e11 else f"{x / 1e9:.0f}"
