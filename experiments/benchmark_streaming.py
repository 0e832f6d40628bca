"""Latency of streaming, per chunk: median and 99th percentile, by preset and number of streams.

  python experiments/benchmark_streaming.py --presets=nano --slots=1,4,16,64
  python experiments/benchmark_streaming.py --presets=v1 --slots=1 --check_seconds=12

Weights are random. The time of a chunk is from numpy array to numpy array. Real time is the length
of a chunk divided by the time of encode and decode together, at the 99th percentile. With
--check_seconds it also compares the codes and the audio of streams in chunks of 1, 7 and random
numbers of frames with `encode` and `decode` of the whole recording.
"""

import argparse
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmark_codec import random_params

import moss_tok
from moss_tok.codec import streaming
from moss_tok.codec.presets import PRESETS, preset
from moss_tok.errors import exit_code
from moss_tok.nn.compute import ComputeConfig


def main() -> None:
    """Measures and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--presets", default="tiny,nano", help=f"of {', '.join(PRESETS)}")
    parser.add_argument("--slots", default="1,4,16,64", help="numbers of parallel streams")
    parser.add_argument("--chunk_ms", type=float, default=80.0)
    parser.add_argument("--num_chunks", type=int, default=300, help="number of timed chunks")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--check_seconds",
        type=float,
        default=0.0,
        help="audio to compare",
    )
    args = parser.parse_args()
    precision = "highest" if args.dtype == "float32" else "default"
    device = jax.devices()[0]
    print(f"{device.platform} {device.device_kind}, {args.dtype}, chunks of {args.chunk_ms:g} ms")
    print("| preset | streams | encode ms, median | 99 % | decode ms, median | 99 % | real time |")
    print("|---|---|---|---|---|---|---|")
    for name in args.presets.split(","):
        config = preset(name)
        params = jax.tree.map(jnp.asarray, random_params(config))
        codec = moss_tok.Codec(params, config, ComputeConfig(args.dtype, precision))
        frames = max(1, round(args.chunk_ms / 1000 * config.frame_rate))
        for num_slots in map(int, args.slots.split(",")):
            times = measure(codec, num_slots, frames, args.num_chunks)
            encode, decode = (1000 * np.percentile(t, [50, 99]) for t in times.T)
            slowest = np.percentile(times.sum(1), 99)
            print(f"| {name} | {num_slots} | {encode[0]:.2f} | {encode[1]:.2f} | {decode[0]:.2f} | "
                  f"{decode[1]:.2f} | {frames / config.frame_rate / slowest:.1f} |",
                  flush=True)  # fmt: skip
        if args.check_seconds:
            check(codec, args.check_seconds)


def measure(codec: moss_tok.Codec, num_slots: int, frames: int, num_chunks: int) -> np.ndarray:
    """Seconds of encode and decode of each chunk, [num_chunks, 2], without compilation."""
    config = codec.config
    shape = (num_slots, config.num_channels, frames * config.hop_length)
    wav = 0.1 * np.random.default_rng(0).standard_normal(shape, np.float32)
    coder = streaming.init_encoder_stream(codec, num_slots)
    player = streaming.init_decoder_stream(codec, num_slots)
    times = []
    compiled = 0
    for i in range(num_chunks + 5):
        began = time.perf_counter()
        coder, codes = streaming.encode_step(codec, coder, wav)
        codes = np.asarray(codes)
        encoded = time.perf_counter()
        player, out = streaming.decode_step(codec, player, codes)
        np.asarray(out)
        times.append((encoded - began, time.perf_counter() - encoded))
        if i == 4:  # after the warm-up
            compiled = _num_compiled()
    if _num_compiled() != compiled:
        raise RuntimeError("a step was compiled again")
    return np.array(times[5:])


def _num_compiled() -> int:
    return streaming._encode_step._cache_size() + streaming._decode_step._cache_size()


def check(codec: moss_tok.Codec, seconds: float) -> None:
    """Prints the differences between streams in chunks and the whole."""
    config = codec.config
    rng = np.random.default_rng(1)
    num_frames = round(seconds * config.frame_rate)
    shape = (1, config.num_channels, num_frames * config.hop_length)
    wav = 0.1 * rng.standard_normal(shape, np.float32)
    expected = np.asarray(moss_tok.encode(codec, wav, chunk_seconds=0).codes)
    wav_hat = np.asarray(moss_tok.decode(codec, expected, chunk_seconds=0).wav)
    random = list(rng.choice([1, 2, 4, 8], num_frames))
    for name, sizes in {"1": [1] * num_frames, "7": [7] * num_frames, "random": random}.items():
        edges = np.unique(np.minimum(np.cumsum([0, *sizes]), num_frames))
        codes, wavs = _in_chunks(codec, wav, expected, edges)
        different = int((codes != expected).sum())
        error = np.abs(wavs - wav_hat).max() / max(1.0, np.abs(wav_hat).max())
        print(f"chunks of {name} frames, {seconds:g} s: {different} of {codes.size} codes differ, "
              f"audio by {error:.1e} of its peak", flush=True)  # fmt: skip


def _in_chunks(codec: moss_tok.Codec, wav: Any, codes: Any, edges: Any) -> tuple[Any, Any]:
    coder = streaming.init_encoder_stream(codec, 1)
    player = streaming.init_decoder_stream(codec, 1)
    hop = codec.config.hop_length
    all_codes = []
    wavs = []
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        coder, part = streaming.encode_step(codec, coder, wav[..., start * hop : end * hop])
        all_codes.append(part)
        player, part = streaming.decode_step(codec, player, codes[..., start:end])
        wavs.append(part)
    return np.concatenate(all_codes, axis=-1), np.concatenate(wavs, axis=-1)


if __name__ == "__main__":
    sys.exit(exit_code(main))
