"""Speed of `moss-tok tokenize`, compared with `encode` alone on the same batches.

  python experiments/benchmark_tokenize.py --presets=nano --minutes=10 [--price=1.2]

Writes FLAC files of 2 to 20 s (noise, the codec's rate and channels), tokenizes them twice (the
first run compiles), and then encodes the same number of batches of the same shapes without reading
or writing. Weights are random. The price is that of the machine per hour.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from benchmark_codec import names_of, random_params

import moss_tok
from moss_tok.audio import files
from moss_tok.codec.config import CodecConfig
from moss_tok.codec.presets import PRESETS, preset
from moss_tok.data import tokenize
from moss_tok.errors import exit_code
from moss_tok.nn.compute import PRECISIONS


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    known = f"of {', '.join(PRESETS)}; with commas"
    parser.add_argument("--presets", default="nano", type=names_of(PRESETS), help=known)
    parser.add_argument("--minutes", type=float, default=10.0, help="minutes of audio")
    known = f"of {', '.join(PRECISIONS)}; with commas"
    parser.add_argument("--precisions", default="highest", type=names_of(PRECISIONS), help=known)
    parser.add_argument("--batch_seconds", type=float, default=60.0)
    parser.add_argument("--price", type=float, default=0.0, help="price of the machine per hour")
    args = parser.parse_args()
    for name in args.presets.split(","):
        config = preset(name)
        params = jax.tree.map(jnp.asarray, random_params(config))
        with tempfile.TemporaryDirectory() as folder:
            _write_recordings(Path(folder) / "in", config, 60 * args.minutes)
            for precision in args.precisions.split(","):
                codec = moss_tok.Codec(params, config, PRECISIONS[precision])
                found = _measure(codec, Path(folder), precision, args)
                print(f"{name}, {precision}, {found}", flush=True)


def _measure(codec: moss_tok.Codec, folder: Path, precision: str, args: argparse.Namespace) -> str:
    num_quantizers = codec.config.quantizer.num_quantizers
    settings = tokenize.Settings(num_quantizers, batch_seconds=args.batch_seconds, num_workers=2)
    items = tokenize.find_items(f"{folder}/in")
    for name in ("cold", "warm"):
        plan = tokenize.make_plan(codec, items, f"{folder}/{precision}_{name}", settings)
        done = tokenize.run(codec, plan)
    raw = _raw_seconds(codec, done.shapes)
    rate = done.audio_seconds / done.seconds
    text = (
        f"{jax.devices()[0].device_kind}: {len(items)} recordings, "
        f"{done.audio_seconds:.0f} s of audio; {rate:.1f} s of audio per s, "
        f"{raw / done.seconds:.0%} of the raw encode rate on the same batches; "
        f"device idle {1 - done.device_seconds / done.seconds:.0%}, "
        f"padding {done.padded_seconds / done.audio_seconds - 1:.1%}"
    )
    if args.price:
        text += f"; {1000 / rate * args.price:.2f} per 1000 hours at {args.price:g} per hour"
    return text


def _write_recordings(folder: Path, config: CodecConfig, seconds: float) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    number = 0
    while seconds > 0:
        length = rng.uniform(2, 20)
        shape = (config.num_channels, int(length * config.sample_rate))
        wav = 0.1 * rng.standard_normal(shape, np.float32)
        files.write(folder / f"{number}.flac", wav, config.sample_rate)
        seconds -= length
        number += 1


def _raw_seconds(codec: moss_tok.Codec, shapes: dict[tuple[int, int], int]) -> float:
    """Seconds of `encode` for `shapes`, the number of batches of each (rows, frames)."""
    config = codec.config
    total = 0.0
    for (rows, size), count in shapes.items():
        shape = (rows, config.num_channels, size * config.hop_length)
        wav = jnp.asarray(0.1 * np.random.default_rng(0).standard_normal(shape, np.float32))
        jax.block_until_ready(moss_tok.encode(codec, wav))
        began = time.perf_counter()
        for _ in range(count):
            jax.block_until_ready(moss_tok.encode(codec, wav))
        total += time.perf_counter() - began
    return total


if __name__ == "__main__":
    sys.exit(exit_code(main))
