"""Speed, model FLOPs utilisation and peak memory of training steps.

    python experiments/benchmark_training.py tiny:batch_size=8 nano:stage=adversarial,dtype=bfloat16

A run is a preset, or a JSON file of a codec, and flags of train.py. `flagfile=FILE` takes the flags
of a file, without its model and data; `xla_NAME=VALUE` is an option of the compiler. All runs are
compiled at the same time, and then timed one by one, on random audio that is already on the device,
so that only the step is measured. Utilisation is the step's rate of useful FLOPs
(moss_tok/objectives/flops.py) over the rate of a large matrix product in the same process. The peak
is the memory that XLA reserves for state, batch and step.
"""

import argparse
import dataclasses
import functools
import json
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from moss_tok import settings, sharding
from moss_tok.errors import exit_code
from moss_tok.objectives import flops
from moss_tok.objectives.config import all_fields, build_objective, configure
from moss_tok.training.state import Recipe, init_state
from moss_tok.training.step import batch_shapes, train_step


def peak_flops(dtype: str, size: int) -> float:
    """FLOP/s of a product of two square random matrices, best of ten."""
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(lambda a: a @ a)
    jax.block_until_ready(product(a))
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        jax.block_until_ready(product(a))
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A run to measure: its text on the command line, and what it means."""

    text: str
    recipe: Recipe
    batch_size: int
    compiler_options: dict[str, bool | int | float]


def read_flagfile(path: str) -> list[str]:
    """The lines FLAG=VALUE of a flagfile."""
    lines = []
    for line in Path(path).read_text().splitlines():
        flag = line.removeprefix("--").partition("=")[0]
        if line.startswith("--") and flag not in ("model", "train_data", "workdir", "init_from"):
            lines.append(line.removeprefix("--"))
    return lines


def parse_run(text: str) -> Benchmark:
    """Reads MODEL:FLAG=VALUE,..."""
    name, _, flags = text.partition(":")
    types = {name: type(settings.flag_default(field)) for name, field in all_fields().items()}
    values = {"model": name}
    pairs = []
    options = {}
    try:
        for pair in filter(None, flags.split(",")):
            if pair.startswith("flagfile="):
                pairs += read_flagfile(pair.removeprefix("flagfile="))
            else:
                pairs.append(pair)
        for pair in pairs:
            flag, _, value = pair.partition("=")
            if flag.startswith("xla_"):
                options[flag] = json.loads(value)
                continue
            if flag not in types:
                raise ValueError(f"unknown flag {flag!r}; flags are train.py's, as FLAG=VALUE")
            values[flag] = types[flag](value)
        config = configure(**values)
        objective = build_objective(config)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    recipe = Recipe(objective, config.optimizer, 0, config.devices.num_microbatches)
    return Benchmark(text, recipe, config.data.batch_size, options)


def compile_step(run: Benchmark) -> Any:
    """Compiles the step of a run, for a batch on one device."""
    began = time.perf_counter()
    mesh = sharding.make_mesh("data:1")
    shapes = batch_shapes(run.recipe, run.batch_size, mesh)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes)
    state = jax.eval_shape(functools.partial(init_state, run.recipe))
    options = sharding.compiler_options(mesh) | run.compiler_options
    step = train_step.lower(run.recipe, state, shapes).compile(options)
    seconds = time.perf_counter() - began
    print(f"{run.text}: compiled in {seconds:.0f} s", file=sys.stderr, flush=True)
    return step


def peak_bytes(step: Any) -> int:
    """Bytes of memory that XLA reserves for a compiled step."""
    memory = step.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return needed + memory.output_size_in_bytes - memory.alias_size_in_bytes


def measure(run: Benchmark, step: Any, num_steps: int) -> float:
    """Median seconds of `num_steps` steps, after two warm-up steps."""
    shapes = batch_shapes(run.recipe, run.batch_size, sharding.make_mesh("data:1"))
    batch = {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes.items()}
    batch["wav"] += 0.1 * jax.random.normal(jax.random.key(0), batch["wav"].shape)
    batch["length"] += batch["wav"].shape[-1]
    state = jax.jit(init_state, static_argnums=0)(run.recipe)
    times = []
    for _ in range(num_steps + 2):
        began = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - began)
    return sorted(times[2:])[num_steps // 2]


def row(run: Benchmark, step: Any, num_steps: int, peak: float) -> str:
    """Measures a run; its row of the table. `peak` is in FLOP/s."""
    objective = run.recipe.objective
    work = run.batch_size * flops.item_flops(objective)
    speed = "- | -"
    share = "too large"
    memory = jax.devices()[0].memory_stats() or {}
    if peak_bytes(step) < memory.get("bytes_limit", math.inf):
        seconds = measure(run, step, num_steps)
        item_seconds = objective.num_samples / objective.codec.sample_rate
        audio = run.batch_size * item_seconds / seconds
        speed = f"{seconds:.4g} | {audio:.0f}"
        share = f"{work / seconds / peak:.1%}"
    return (
        f"| {run.text.replace(',', ', ')} | {speed} | {work / 1e12:.3g} | {share} | "
        f"{peak_bytes(step) / 1e9:.2f} GB |"
    )


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=parse_run, help="MODEL:FLAG=VALUE,...")
    parser.add_argument("--num_steps", type=int, default=10)
    parser.add_argument("--matmul_size", type=int, default=4096)
    parser.add_argument("--matmul_dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--one_by_one",
        action="store_true",
        help="compile a run when the one before it was timed, so that rows are printed earlier",
    )
    args = parser.parse_args()
    if args.num_steps < 1:
        raise ValueError(f"--num_steps must be at least 1, got {args.num_steps}")
    device = jax.devices()[0]
    peak = peak_flops(args.matmul_dtype, args.matmul_size)
    print(f"{device.device_kind}: {peak / 1e12:.3g} TFLOP/s in a {args.matmul_dtype} product of "
          f"{args.matmul_size}")  # fmt: skip
    if args.one_by_one:
        steps = [functools.partial(compile_step, run) for run in args.runs]
    else:
        with ThreadPoolExecutor() as pool:  # at the same time, because compiling takes minutes
            steps = [pool.submit(compile_step, run).result for run in args.runs]
    print("| run | s per step | audio s/s | TFLOP per step | utilisation | peak |")
    print("|---|---|---|---|---|---|")
    for run, compiled in zip(args.runs, steps, strict=True):
        try:
            print(row(run, compiled(), args.num_steps, peak), flush=True)
        except jax.errors.JaxRuntimeError as error:  # the other runs may be possible
            print(f"failed: {run.text}: {str(error).splitlines()[0][:200]}", flush=True)


if __name__ == "__main__":
    sys.exit(exit_code(main))
