r"""Compiles a run for a TPU slice, on a machine without one: does it fit, what does it cost?

    python tpu_scripts/compile_check.py --topology=v5e:2x2 \
        --flagfile=experiments/nano_pretrain.flags

Needs libtpu (`pip install 'jax[tpu]'`). Every flag of train.py is taken. Exit code 1: does not fit.
With --nocode it ends when memory is assigned: the machine code takes most of the time.
See tpu_scripts/README.md for what the estimate is made of.
"""

import os

# Before jax: compile for TPUs, look for none.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")  # or libtpu complains
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import collections
import dataclasses
import math
import re
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hlo
import jax
import jax.numpy as jnp
from absl import flags
from flax import linen as nn
from jax.experimental import topologies

import moss_tok
from moss_tok import sharding
from moss_tok.codec import pretrained
from moss_tok.codec.config import CodecConfig
from moss_tok.codec.presets import load_codec_config
from moss_tok.errors import check_choice
from moss_tok.language.config import LanguageConfig
from moss_tok.nn.compute import PRECISIONS, ComputeConfig
from moss_tok.nn.kernels import splash_block
from moss_tok.objectives import flags as train_flags
from moss_tok.objectives import flops
from moss_tok.objectives.config import build_objective
from moss_tok.training import state, step

FUNCTIONS = ("train_step", "encode", "decode")


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one chip.

    Attributes:
      flops: FLOP/s in bfloat16.
      hbm_bytes: Size of the main memory.
      hbm_rate: Its bandwidth, bytes/s.
      ici_rate: Bytes/s that leave it over all its links.
      num_axes: Of the torus.
      ring: An axis with a multiple of so many chips is closed to a ring; others are lines.
    """

    flops: float
    hbm_bytes: float
    hbm_rate: float
    ici_rate: float
    num_axes: int
    ring: int

    def link_rate(self, sizes: Sequence[int]) -> float:
        """Bytes/s along one axis of a slice of these sizes: on a line half of a ring's."""
        rings = all(n % self.ring == 0 for n in sizes if n > 1)
        return self.ici_rate / self.num_axes / (1 if rings else 2)


# cloud.google.com/tpu/docs; of the interchip bandwidth, which counts both ways, the half.
CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1228e9, 300e9, 3, 4),
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 200e9, 2, 16),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 600e9, 3, 4),
    "v6e": Chip(918e12, 32 * 2**30, 1638e9, 400e9, 2, 16),
}


def get_mesh(topology: str, text: str) -> jax.sharding.Mesh:
    """The mesh of `text` over the chips of a slice such as v5p:4x4x4."""
    check_choice("topology", topology.partition(":")[0], tuple(CHIPS))
    # Without the name a v4 chip counts as two devices.
    names = {"chip_config_name": "megacore"} if topology.startswith("v4") else {}
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **names)
    except (RuntimeError, NotImplementedError, ImportError) as error:
        raise ValueError(f"topology {topology!r}: {error}") from error
    return sharding.make_mesh(text, described.devices)


def lower(
    function: str,
    recipe: state.Recipe,
    batch_size: int,
    mesh: jax.sharding.Mesh,
    precision: str,
) -> jax.stages.Lowered:
    """The train step of a run, or encode or decode of a batch like its batches."""
    codec = recipe.objective.codec
    batch = step.batch_shapes(recipe, batch_size, mesh)
    if function == "train_step":
        shapes = state.state_shapes(recipe, mesh)
        return step.sharded_train_step(recipe, shapes, batch_size).lower(shapes, batch)
    ready = moss_tok.Codec(_params(codec, mesh), codec, PRECISIONS[precision])
    argument = batch["wav"]
    if function == "decode":
        frames = codec.num_frames(argument.shape[-1])
        shape = (batch_size, codec.quantizer.num_quantizers, frames)
        argument = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=argument.sharding)

    def apply(ready, x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return getattr(moss_tok, function)(ready, x)

    out = sharding.batch_sharding(mesh)
    return jax.jit(apply, out_shardings=out).lower(ready, argument)


def _params(codec: CodecConfig, mesh: jax.sharding.Mesh) -> Any:
    boxed = pretrained.boxed_shapes(codec)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        nn.meta.unbox(boxed),
        sharding.param_shardings(boxed, mesh),
    )


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler makes: the optimised HLO, and bytes of a chip.

    Attributes:
      text: The HLO.
      arguments: Bytes.
      peak: What the compiler holds against the chip's memory, the arguments included.
      code: Bytes of the machine code; None: not made.
    """

    text: str
    arguments: int
    peak: int
    code: int | None


def compiled(lowered: jax.stages.Lowered) -> Program:
    """The whole of it."""
    made = lowered.compile()
    memory = made.memory_analysis()
    arguments, code = memory.argument_size_in_bytes, memory.generated_code_size_in_bytes
    # Not temp_size_in_bytes, which counts the buffers of loops more than once.
    return Program(made.as_text(), arguments, memory.peak_memory_in_bytes, code)


def optimised(lowered: jax.stages.Lowered) -> Program:
    """The program when memory is assigned, of XLA's dump; the compiler goes on in its thread."""
    errors = []

    def run(folder: str) -> None:
        try:
            lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except Exception as error:
            errors.append(error)

    def dumped(ending: str) -> str:
        found = Path(folder).glob(f"*.after_optimizations{ending}.txt")
        return "".join(path.read_text() for path in found)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        threading.Thread(target=run, args=(folder,), daemon=True).start()
        text = ""
        while not text or text != dumped("_after_buffer_assignment"):  # the last to be written
            text = dumped("_after_buffer_assignment")
            time.sleep(1)
            if errors:
                raise errors[0]
        buffers, memory = dumped("-buffer-assignment"), dumped("-memory-usage-report")
    arguments = re.findall(r"^allocation \d+: size (\d+), parameter", buffers, re.M)
    peak = re.search(r"color=0\)\nTotal bytes: (\d+)", memory)
    return Program(text, sum(map(int, arguments)), int(peak[1]), None)


def kernel_costs(
    kernels: dict[str, float],
    codec: CodecConfig,
    compute: ComputeConfig,
    seconds: float,
    items: int,
    language: LanguageConfig | None = None,
    num_tokens: int = 0,
    parts: tuple[int, int] = (1, 1),
) -> hlo.Costs:
    """FLOPs and bytes of the attention kernels, whose insides the HLO does not show.

    Blocks that the window hides in part count in full; keys and values are read for every block of
    queries that sees them.

    Args:
      kernels: Where they come from, and how often each runs.
      codec: Whose stages they belong to.
      compute: How they compute.
      seconds: Of an item.
      items: Of a batch.
      language: The language model, whose kernels are those of no stage.
      num_tokens: Of its text.
      parts: Into which items and heads are split; what does not divide, every chip computes whole.
    """
    total = hlo.Costs()
    half = compute.dtype == "bfloat16"
    passes = 1 if half or compute.precision == "default" else hlo.PASSES["highest"]  # none is high
    for name, times in kernels.items():
        if stage := re.search(r"(encoder|decoder)/stage_(\d+)", name):
            side, number = stage[1], int(stage[2])
            module, window = getattr(codec, side)[number], codec.windows(side)[number]
            frames = round(codec.stage_rates(side)[number] * seconds)
        else:
            module = language
            window = frames = round(codec.frame_rate * seconds) + 2 + num_tokens
        size = splash_block(frames, min(window, frames))
        blocks = -(-frames // size)
        seen = sum(i - max(0, i * size - window + 1) // size + 1 for i in range(blocks))
        rows = zip((items, module.num_heads), parts, strict=True)
        heads = math.prod(size // n if size % n == 0 else size for size, n in rows)
        products = {"fwd": 2, "dq": 3, "dkv": 4}[re.search(r"fwd|dq|dkv", name)[0]]
        block_bytes = size * max(module.head_dim, 128) * (2 if half else 4)
        total.flops += times * heads * seen * products * 2 * passes * size * size * module.head_dim
        total.hbm_bytes += times * heads * block_bytes * (2 * seen + (products + 1) * blocks)
    return total


def report(
    function: str,
    recipe: state.Recipe,
    batch_size: int,
    mesh: jax.sharding.Mesh,
    chip: Chip,
    link_rate: float,
    precision: str,
) -> bool:
    """Compiles a function, prints what it costs, and returns whether it fits."""
    objective, codec = recipe.objective, recipe.objective.codec
    began = time.perf_counter()
    try:
        make = compiled if flags.FLAGS.code else optimised
        program = make(lower(function, recipe, batch_size, mesh, precision))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"{function}: DOES NOT FIT: {' '.join(str(error).split())[:300]}", flush=True)
        return False
    seconds = time.perf_counter() - began
    peak = program.peak + (program.code or 0)
    fits = peak <= chip.hbm_bytes
    costs = hlo.analyse(program.text)
    items = batch_size
    if function == "train_step":
        items //= step.fit_microbatches(recipe, mesh, batch_size).num_microbatches
        compute = objective.compute
        useful = batch_size * flops.item_flops(objective)
    else:
        compute = PRECISIONS[precision]
        sides = flops.codec_flops(codec, objective.num_samples)
        names = {"encode": ("encoder", "quantizer"), "decode": ("decoder",)}[function]
        useful = batch_size * sum(sides[name] for name in names)
    audio = objective.num_samples / codec.sample_rate
    parts = (mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"])
    text = (objective.language, objective.settings.text.max_text_tokens)
    costs.add(kernel_costs(costs.kernels, codec, compute, audio, items, *text, parts))
    estimate = Estimate(chip, link_rate, mesh.size, costs, useful)
    made = "optimised" if program.code is None else "compiled"
    code = "" if program.code is None else f", code {_giga(program.code)}"
    print(f"{function}, {made} in {seconds:.0f} s")
    print(f"  bytes per chip   arguments {_giga(program.arguments)}, temporaries "
          f"{_giga(program.peak - program.arguments)}{code}, peak {_giga(peak)} of "
          f"{_giga(chip.hbm_bytes)} GB{'' if fits else ': DOES NOT FIT'}")  # fmt: skip
    estimate.show()
    show_traffic(costs)
    if flags.FLAGS.scaling:
        show_scaling(estimate, mesh, batch_size / mesh.size, program.arguments, peak)
    return fits


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Time of one run of a program, from what it computes and moves at published rates."""

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
        """Seconds of transfers that nothing hides."""
        waiting = sum(c.num_bytes for c in self.costs.collectives if not c.is_async)
        return waiting / self.link_rate

    @property
    def short(self) -> float:
        """Seconds by which transfers take longer than the operations they are spread over."""
        spread = [c for c in self.costs.collectives if c.chain is not None]
        return sum(max(0.0, c.num_bytes / self.link_rate - self._beside(c)) for c in spread)

    def _beside(self, c: hlo.Collective) -> float:
        return max(c.flops_beside / self.chip.flops, c.bytes_beside / self.chip.hbm_rate)

    @property
    def step(self) -> float:
        """Seconds in all."""
        return max(self.compute, self.memory) + self.links

    @property
    def utilisation(self) -> float:
        """Share of the chips' arithmetic that useful FLOPs take."""
        return self.useful_flops / self.num_chips / self.step / self.chip.flops

    @property
    def binds(self) -> str:
        """The largest term."""
        terms = {"arithmetic": self.compute, "memory": self.memory, "links": self.links}
        return max(terms, key=terms.get)

    def show(self) -> None:
        """Prints the terms."""
        c, chip = self.costs, self.chip
        groups: dict[Any, list[hlo.Collective]] = collections.defaultdict(list)
        for x in c.collectives:
            groups[x.opcode, "asynchronous" if x.is_async else "waited for"].append(x)
        for (opcode, kind), xs in sorted(groups.items()):
            count, size = sum(x.times for x in xs), sum(x.num_bytes for x in xs)
            print(f"  {opcode:<16} {count:.0f} x, {_giga(size)} GB over a chip's links, {kind}")
        rows = {
            "arithmetic": f"{c.flops / 1e12:.1f} TFLOP / {chip.flops / 1e12:.0f} TFLOP/s = "
            f"{self.compute:.3f} s",
            "memory": f"{_giga(c.hbm_bytes)} GB / {_giga(chip.hbm_rate)} GB/s = "
            f"{self.memory:.3f} s",
            "estimated time": f"max(arithmetic, memory) + links not hidden {self.links:.3f} s = "
            f"{self.step:.3f} s; {self.binds} binds",
            "not in it": f"{self.short:.3f} s by which transfers take longer than what hides them",
            "utilisation": f"{self.useful_flops / 1e12:.0f} useful TFLOP / {self.num_chips} / "
            f"({self.step:.3f} s x {chip.flops / 1e12:.0f} TFLOP/s) = {self.utilisation:.0%}, "
            "an estimate",
        }
        for name, text in rows.items():
            print(f"  {name:<16} {text}", flush=True)


def show_traffic(costs: hlo.Costs) -> None:
    """Prints the operations of the Python program that read and write the most."""
    largest = sorted(costs.traffic.items(), key=lambda item: -item[1])[: flags.FLAGS.top]
    for source, num_bytes in largest:
        print(f"  {_giga(num_bytes):>10} GB  {source}")


def show_scaling(
    estimate: Estimate, mesh: jax.sharding.Mesh, items_per_chip: float, arguments: int, peak: int
) -> None:
    """Prints the estimate for 4 to 4096 chips, each with as many items as now.

    A chip computes and reads what it does now; the data axis takes more chips, and fsdp fewer where
    there are not enough, each then with more of the `arguments`. Transfers in a ring of n send
    (n - 1) / n of an array; slices too small for a torus have lines for rings.
    """
    data, fsdp, tensor = (mesh.shape[name] for name in ("data", "fsdp", "tensor"))
    chip = estimate.chip
    print("| chips | batch | peak, GB | step, s | links not hidden | estimated utilisation |")
    print("|---|---|---|---|---|---|")
    for num_chips in (4**n for n in range(1, 7) if 4**n % tensor == 0):
        new_fsdp = min(fsdp, num_chips // tensor)
        new_data = num_chips // tensor // new_fsdp
        sizes = {  # (size, stride): size then
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
        held = _giga(peak + arguments * (fsdp / new_fsdp - 1))
        print(
            f"| {num_chips} | {items_per_chip * num_chips:g} | {held} | {e.step:.3f} | "
            f"{e.links / e.step:.1%} | {e.utilisation:.0%} |",
            flush=True,
        )


def check_scaling(mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError unless the compiled program has the transfers of a larger slice."""
    data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
    if data == 1 or fsdp == 1:
        raise ValueError(f"scaling needs a mesh of data and fsdp above 1, got {data} and {fsdp}")
    for name in ("fsdp", "tensor"):
        if (size := mesh.shape[name]) & (size - 1):
            raise ValueError(f"scaling needs a power of two for {name}, got {size}")


def _giga(x: float) -> str:
    return f"{x / 1e9:.3g}" if x < 1e11 else f"{x / 1e9:.0f}"


def main() -> None:
    """Checks the functions that the flags name."""
    jax.config.update("jax_enable_compilation_cache", False)  # no device here could run them
    topology, precision = flags.FLAGS.topology, flags.FLAGS.precision
    functions = flags.FLAGS.functions.split(",")
    for function in functions:
        check_choice("functions", function, FUNCTIONS)
    check_choice("precision", precision, tuple(PRECISIONS))
    config = train_flags.config()
    init_from = config.run.init_from
    model = getattr(config.objective, "codec", config.objective).model
    if init_from and not model:
        codec = pretrained.load_config(init_from)
    else:
        codec = load_codec_config(model or "tiny")
    batch_size = config.data.batch_size
    mesh = get_mesh(topology, config.devices.mesh)
    sharding.check_batch_size(mesh, batch_size)
    if flags.FLAGS.scaling:
        check_scaling(mesh)
    objective = build_objective(config, codec=codec)
    recipe = state.Recipe(objective, config.optimizer, 0, config.devices.num_microbatches)
    shapes = state.state_shapes(recipe, mesh)
    count = sum(x.size for x in jax.tree.leaves(shapes.params))
    judges = shapes.extra.get("discriminators")
    judges = sum(x.size for x in jax.tree.leaves(judges))
    axes = " ".join(f"{name}:{size}" for name, size in mesh.shape.items())
    print(f"{topology}: {mesh.size} chips, mesh {axes}")
    print(f"{model or init_from}: {count / 1e6:.1f} M parameters"
          f"{f', discriminators {judges / 1e6:.1f} M' if judges else ''}; "
          f"{batch_size} x {config.data.segment_seconds:g} s")  # fmt: skip
    kind, _, shape = topology.partition(":")
    chip, link_rate = CHIPS[kind], CHIPS[kind].link_rate([int(n) for n in shape.split("x")])
    fit = all([report(f, recipe, batch_size, mesh, chip, link_rate, precision) for f in functions])
    if not flags.FLAGS.code:
        sys.stdout.flush()
        os._exit(0 if fit else 1)  # the compiler is still at work
    if not fit:
        sys.exit(1)


if __name__ == "__main__":
    train_flags.define()
    flags.DEFINE_string("topology", "v5p:2x2x1", "kind and shape of the slice")
    flags.DEFINE_string("functions", ",".join(FUNCTIONS), "what is compiled")
    flags.DEFINE_string("precision", "highest", f"of encode and decode: {', '.join(PRECISIONS)}")
    flags.DEFINE_bool("code", True, "machine code too: most of the time; no figure but its size")
    flags.DEFINE_integer("top", 0, "also so many operations with the most memory traffic")
    flags.DEFINE_bool("scaling", False, "also the estimate for 4 to 4096 chips, by weak scaling")
    train_flags.run(main)
