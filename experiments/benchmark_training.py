"""Speed, model FLOPs utilisation and peak memory of training, by preset and stage.

    python experiments/benchmark_training.py --presets=tiny,nano --batch_size=8 --seconds=0.96

Random audio that is on the device already, so it measures the step alone. Utilisation is the
step's useful FLOPs (moss_tok/training/flops.py) over the rate of a large matrix product measured
in the same run. The peak is what XLA reserves for the state, the batch and the step.
"""

import argparse
import dataclasses
import time

import jax
import jax.numpy as jnp

from moss_tok import sharding
from moss_tok.config import CodecConfig, TrainConfig, preset
from moss_tok.training import flops
from moss_tok.training.state import init_state
from moss_tok.training.step import batch_shapes, segment_samples, train_step


def peak_flops(dtype: str, size: int) -> float:
    """FLOP/s of a product of two square matrices: the best of ten."""
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: a @ a)
    jax.block_until_ready(product(a))
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        jax.block_until_ready(product(a))
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def measure(config: TrainConfig, codec: CodecConfig, num_steps: int) -> tuple[float, float]:
    """Seconds per step, the median of `num_steps` after two, and the peak of memory in GB."""
    shapes = batch_shapes(config, codec, sharding.make_mesh("data:1"))
    batch = {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes.items()}
    batch["wav"] += 0.1 * jax.random.normal(jax.random.key(0), batch["wav"].shape)
    batch["length"] += batch["wav"].shape[-1]
    state = jax.jit(init_state, static_argnums=(0, 1))(config, codec)
    step = train_step.lower(config, codec, state, batch).compile()
    memory = step.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    peak += memory.output_size_in_bytes - memory.alias_size_in_bytes
    times = []
    for _ in range(num_steps + 2):
        began = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - began)
    return sorted(times[2:])[num_steps // 2], peak / 1e9


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--presets", default="tiny")
    parser.add_argument("--stages", default="pretrain,adversarial")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.96)
    parser.add_argument("--num_microbatches", type=int, default=1)
    parser.add_argument("--discriminator_channels", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--remat", default="none")
    parser.add_argument("--num_steps", type=int, default=10)
    parser.add_argument("--matmul_size", type=int, default=4096)
    args = parser.parse_args()
    device = jax.devices()[0].device_kind
    peak = peak_flops(args.dtype, args.matmul_size)
    print(f"{device}, {args.dtype}: {peak / 1e12:.3g} TFLOP/s in a product of {args.matmul_size}")
    print("| preset | stage | steps/s | audio s/s | TFLOP per step | utilisation | peak |")
    print("|---|---|---|---|---|---|---|")
    for name in args.presets.split(","):
        codec = preset(name)
        for stage in args.stages.split(","):
            config = dataclasses.replace(
                TrainConfig(), stage=stage, batch_size=args.batch_size, dtype=args.dtype,
                num_microbatches=args.num_microbatches, remat=args.remat,
                discriminator_channels=args.discriminator_channels,
                segment_seconds=args.seconds,
            )  # fmt: skip
            num_samples = segment_samples(config, codec)
            step, memory_gb = measure(config, codec, args.num_steps)
            work = flops.step_flops(config, codec, num_samples)
            audio = args.batch_size * num_samples / codec.sample_rate / step
            print(
                f"| {name} | {stage} | {1 / step:.2f} | {audio:.0f} | {work / 1e12:.3g} | "
                f"{work / step / peak:.1%} | {memory_gb:.2f} GB |",
                flush=True,
            )


if __name__ == "__main__":
    main()
