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
import functools
import re
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import attention_costs
import hlo
import jax
import jax.numpy as jnp
from absl import flags
from estimates import CHIPS, Chip, Estimate, check_scaling, giga, show_scaling
from flax import linen as nn
from jax.experimental import topologies

import moss_tok
from moss_tok import sharding
from moss_tok.codec import pretrained
from moss_tok.codec.config import CodecConfig
from moss_tok.codec.presets import PRESETS, load_codec_config
from moss_tok.errors import check_choice
from moss_tok.nn.compute import PRECISIONS
from moss_tok.objectives import flags as train_flags
from moss_tok.objectives import flops
from moss_tok.objectives.config import build_objective
from moss_tok.objectives.speech import SpeechObjective
from moss_tok.training import state, step
from moss_tok.training.config import TrainConfig

FUNCTIONS = ("train_step", "encode", "decode")  # of a codec; a speech model has the first


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
    batch = step.batch_shapes(recipe, batch_size, mesh)
    if function == "train_step":
        shapes = state.state_shapes(recipe, mesh)
        return step.sharded_train_step(recipe, shapes, batch_size).lower(shapes, batch)
    codec = recipe.objective.codec
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
    useful = useful_flops(function, recipe, batch_size)
    costs.add(_kernel_costs(function, recipe, batch_size, mesh, precision, costs.kernels))
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


def useful_flops(function: str, recipe: state.Recipe, batch_size: int) -> float:
    """Useful FLOPs of a function on a batch, on all chips together."""
    objective = recipe.objective
    if function == "train_step":
        return batch_size * flops.item_flops(objective)
    sides = flops.codec_flops(objective.codec, objective.num_samples)
    names = {"encode": ("encoder", "quantizer"), "decode": ("decoder",)}[function]
    return batch_size * sum(sides[name] for name in names)


def _kernel_costs(
    function: str,
    recipe: state.Recipe,
    batch_size: int,
    mesh: jax.sharding.Mesh,
    precision: str,
    kernels: dict[str, float],
) -> hlo.Costs:
    objective = recipe.objective
    items = batch_size
    compute = PRECISIONS[precision]
    if function == "train_step":
        items //= step.fit_microbatches(recipe, mesh, batch_size).num_microbatches
        compute = objective.compute
    if isinstance(objective, SpeechObjective):
        # The depth Transformer has so few channels that it uses no kernel.
        stack = objective.config.temporal
        (size,), _ = objective.item_shapes()["text"]
        attention = attention_costs.Attention(size, size, stack.num_heads, stack.head_dim)

        def attention_of(name: str) -> attention_costs.Attention:
            return attention
    else:
        attention_of = functools.partial(
            attention_costs.of_codec,
            codec=objective.codec,
            seconds=objective.num_samples / objective.codec.sample_rate,
            language=objective.language,
            num_tokens=objective.settings.text.max_text_tokens,
        )
    parts = (mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"])
    return attention_costs.kernel_costs(kernels, attention_of, compute, items, parts)


def show_traffic(costs: hlo.Costs) -> None:
    """Prints the operations of the Python program with the most memory traffic."""
    largest = sorted(costs.traffic.items(), key=lambda item: -item[1])[: flags.FLAGS.top]
    for source, num_bytes in largest:
        print(f"  {giga(num_bytes):>10} GB  {source}")


def find_codec(config: TrainConfig) -> CodecConfig | None:
    """The codec of a run, without its weights; None if the flags say none.

    The flag codec of the objective speech may also be the name of a preset.
    """
    if config.selection.name == "speech":
        name = config.objective.codec
        if name in PRESETS:
            return load_codec_config(name)
        return pretrained.load_config(name) if name else None
    model = getattr(config.objective, "codec", config.objective).model
    if config.run.init_from and not model:
        return pretrained.load_config(config.run.init_from)
    return load_codec_config(model or "tiny")


def describe(
    topology: str, mesh: jax.sharding.Mesh, config: TrainConfig, recipe: state.Recipe
) -> None:
    """Prints the slice, the model and the batch."""
    shapes = state.state_shapes(recipe, mesh)
    count = sum(x.size for x in jax.tree.leaves(shapes.params))
    discriminators = shapes.extra.get("discriminators")
    discriminator_count = sum(x.size for x in jax.tree.leaves(discriminators))
    more = f", discriminators {discriminator_count / 1e6:.1f} M" if discriminator_count else ""
    axes = " ".join(f"{name}:{size}" for name, size in mesh.shape.items())
    items = f"{config.data.batch_size} x {config.data.segment_seconds:g} s"
    objective = recipe.objective
    if isinstance(objective, SpeechObjective):
        model = config.objective.speech_model
        (size,), _ = objective.item_shapes()["text"]
        (num_targets,), _ = objective.item_shapes()["targets"]
        items += (
            f", {objective.num_positions} positions padded to {size}, "
            f"{objective.max_frames} frames to {num_targets}"
        )
    else:
        model = getattr(config.objective, "codec", config.objective).model
    print(f"{topology}: {mesh.size} chips, mesh {axes}")
    model = model or config.run.init_from or "tiny"
    print(f"{model}: {count / 1e6:.1f} M parameters{more}; {items}")


def main() -> None:
    """Compiles and reports the functions of --functions."""
    jax.config.update("jax_enable_compilation_cache", False)  # no device here can run the programs
    topology = flags.FLAGS.topology
    precision = flags.FLAGS.codec_precision
    check_choice("codec_precision", precision, tuple(PRECISIONS))
    config = train_flags.config()
    is_speech = config.selection.name == "speech"
    known = FUNCTIONS[:1] if is_speech else FUNCTIONS
    functions = flags.FLAGS.functions.split(",") if flags.FLAGS.functions else known
    for function in functions:
        check_choice("functions", function, known)
    batch_size = config.data.batch_size
    mesh = get_mesh(topology, config.devices.mesh)
    sharding.check_batch_size(mesh, batch_size)
    if flags.FLAGS.scaling:
        check_scaling(mesh)
    objective = build_objective(config, codec=find_codec(config))
    recipe = state.Recipe(objective, config.optimizer, 0, config.devices.num_microbatches)
    describe(topology, mesh, config, recipe)
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
    flags.DEFINE_string(
        "functions",
        "",
        f"functions to compile, separated by commas; empty: {', '.join(FUNCTIONS)}, or of the "
        f"objective speech {FUNCTIONS[0]}",
    )
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
