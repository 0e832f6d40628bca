r"""Compiles a run for a TPU slice on any machine; prints whether it fits and what it costs.

    python tpu_scripts/compile_check.py --topology=v5e:2x2 \
        --flagfile=experiments/nano_pretrain.flags

Needs libtpu (`pip install 'jax[tpu]'`). Takes every flag of train.py. Exit code 1: does not fit.
--nocode skips the machine code, which takes most of the time; it ends when memory is assigned.
tpu_scripts/README.md explains the estimate.
"""

import os

# Before importing jax: compile for TPUs without looking for any.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")  # libtpu warns without it
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import dataclasses
import math
import re
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import hlo
import jax
import jax.numpy as jnp
from absl import flags
from estimates import CHIPS, Chip, Estimate, check_scaling, giga, show_scaling
from flax import linen as nn
from hlo_costs import PASSES
from jax.experimental import topologies

import moss_tok
from moss_tok import sharding
from moss_tok.codec import pretrained
from moss_tok.codec.config import CodecConfig
from moss_tok.codec.presets import load_codec_config
from moss_tok.errors import check_choice
from moss_tok.language.config import LanguageConfig
from moss_tok.nn.compute import BF16_PRODUCTS, PRECISIONS, ComputeConfig
from moss_tok.nn.kernels import splash_block
from moss_tok.objectives import flags as train_flags
from moss_tok.objectives import flops
from moss_tok.objectives.config import build_objective
from moss_tok.training import state, step

FUNCTIONS = ("train_step", "encode", "decode")


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
    """Lowers the train step of a run, or encode or decode of a batch of the same shape."""
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
    """A compiled program: the optimised HLO, and its memory per chip.

    Attributes:
      text: The HLO.
      arguments: Bytes of the arguments.
      peak: Peak bytes that the compiler compares with the chip's memory, arguments included.
      code: Bytes of the machine code; None if it was not generated.
    """

    text: str
    arguments: int
    peak: int
    code: int | None


def compiled(lowered: jax.stages.Lowered) -> Program:
    """Compiles the program completely."""
    executable = lowered.compile()
    memory = executable.memory_analysis()
    arguments = memory.argument_size_in_bytes
    code = memory.generated_code_size_in_bytes
    # Not temp_size_in_bytes, which counts the buffers of loops more than once.
    return Program(executable.as_text(), arguments, memory.peak_memory_in_bytes, code)


def optimised(lowered: jax.stages.Lowered) -> Program:
    """Compiles in a thread, and reads the program from XLA's dump once memory is assigned."""
    errors = []

    def run(folder: str) -> None:
        try:
            lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except Exception as error:
            errors.append(error)

    def dumped(ending: str) -> str:
        paths = Path(folder).glob(f"*.after_optimizations{ending}.txt")
        return "".join(path.read_text() for path in paths)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        threading.Thread(target=run, args=(folder,), daemon=True).start()
        text = ""
        while not text or text != dumped("_after_buffer_assignment"):  # written last
            text = dumped("_after_buffer_assignment")
            time.sleep(1)
            if errors:
                raise errors[0]
        buffers = dumped("-buffer-assignment")
        memory = dumped("-memory-usage-report")
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
    """FLOPs and bytes of the attention kernels, which the HLO does not show.

    Partly masked blocks count in full; keys and values are read for every block of queries that
    attends to them.

    Args:
      kernels: Sources of the kernels, and how often each runs.
      codec: The codec whose stages have kernels.
      compute: Compute settings of the kernels.
      seconds: Length of an item.
      items: Number of items in a batch.
      language: The language model; it has the kernels that belong to no stage.
      num_tokens: Length of its text.
      parts: Numbers of parts that items and heads are split into. If a number does not divide,
        every chip computes all items or heads.
    """
    total = hlo.Costs()
    half = compute.dtype == "bfloat16"
    is_single = half or compute.precision in ("default", BF16_PRODUCTS)
    passes = 1 if is_single else PASSES["highest"]  # kernels have no high
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
    """Compiles a function, prints its costs, and returns whether it fits."""
    objective = recipe.objective
    codec = objective.codec
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
    code = "" if program.code is None else f", code {giga(program.code)}"
    print(f"{function}, {made} in {seconds:.0f} s")
    print(f"  bytes per chip   arguments {giga(program.arguments)}, temporaries "
          f"{giga(program.peak - program.arguments)}{code}, peak {giga(peak)} of "
          f"{giga(chip.hbm_bytes)} GB{'' if fits else ': DOES NOT FIT'}")  # fmt: skip
    estimate.show()
    show_traffic(costs)
    if flags.FLAGS.scaling:
        show_scaling(estimate, mesh, batch_size / mesh.size, program.arguments, peak)
    return fits


def show_traffic(costs: hlo.Costs) -> None:
    """Prints the operations of the Python program with the most memory traffic."""
    largest = sorted(costs.traffic.items(), key=lambda item: -item[1])[: flags.FLAGS.top]
    for source, num_bytes in largest:
        print(f"  {giga(num_bytes):>10} GB  {source}")


def main() -> None:
    """Compiles and reports the functions of --functions."""
    jax.config.update("jax_enable_compilation_cache", False)  # no device here can run the programs
    topology = flags.FLAGS.topology
    precision = flags.FLAGS.codec_precision
    functions = flags.FLAGS.functions.split(",")
    for function in functions:
        check_choice("functions", function, FUNCTIONS)
    check_choice("codec_precision", precision, tuple(PRECISIONS))
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
    discriminators = shapes.extra.get("discriminators")
    discriminator_count = sum(x.size for x in jax.tree.leaves(discriminators))
    more = f", discriminators {discriminator_count / 1e6:.1f} M" if discriminator_count else ""
    axes = " ".join(f"{name}:{size}" for name, size in mesh.shape.items())
    print(f"{topology}: {mesh.size} chips, mesh {axes}")
    print(
        f"{model or init_from}: {count / 1e6:.1f} M parameters{more}; "
        f"{batch_size} x {config.data.segment_seconds:g} s"
    )
    kind, _, shape = topology.partition(":")
    chip = CHIPS[kind]
    link_rate = chip.link_rate([int(n) for n in shape.split("x")])
    fit = all([report(f, recipe, batch_size, mesh, chip, link_rate, precision) for f in functions])
    if not flags.FLAGS.code:
        sys.stdout.flush()
        os._exit(0 if fit else 1)  # the compiler is still running
    if not fit:
        sys.exit(1)


if __name__ == "__main__":
    train_flags.define()
    flags.DEFINE_string("topology", "v5p:2x2x1", "chip and shape of the slice, as in v5p:4x4x4")
    flags.DEFINE_string("functions", ",".join(FUNCTIONS), "functions to compile")
    flags.DEFINE_string(
        "codec_precision", "highest", f"of encode and decode: {', '.join(PRECISIONS)}"
    )
    flags.DEFINE_bool(
        "code",
        True,
        "also generate the machine code: slow, adds only its size",
    )
    flags.DEFINE_integer("top", 0, "how many operations with the most memory traffic to print")
    flags.DEFINE_bool("scaling", False, "also print the weak-scaling estimate for 4 to 4096 chips")
    train_flags.run(main)
