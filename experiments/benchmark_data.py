"""Speed at which one core turns FLAC files at 44.1 kHz into training batches.

    python experiments/benchmark_data.py [--train_data=SOURCE]

Without a source it writes stereo FLAC files of noise and tones to a temporary folder, and reads
them as files and as ArrayRecord shards.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

from moss_tok.codec.config import CodecConfig
from moss_tok.codec.presets import preset
from moss_tok.data import pipeline, prepare, sources
from moss_tok.data.config import AudioDataConfig
from moss_tok.errors import exit_code


def write_files(folder: Path, num_files: int = 40, seconds: float = 20.0) -> None:
    """Writes stereo FLAC files at 44.1 kHz."""
    rng = np.random.default_rng(0)
    t = np.arange(int(seconds * 44100)) / 44100
    folder.mkdir()
    for i in range(num_files):
        tone = np.sin(2 * np.pi * rng.uniform(100, 2000) * t)[:, None]
        wav = 0.2 * tone + 0.05 * rng.standard_normal((t.size, 2))
        soundfile.write(folder / f"{i}.flac", wav, 44100)


def audio_per_second(
    source: str, codec: CodecConfig, config: AudioDataConfig, measured_seconds: float
) -> float:
    """Seconds of audio in batches per second of wall time."""
    num_samples = int(config.segment_seconds * codec.frame_rate) * codec.hop_length
    mixture = sources.training_mixture(source, config.segment_seconds)
    shape = pipeline.SegmentShape(num_samples, codec.sample_rate, codec.num_channels)
    batches = pipeline.batches(config, mixture, shape)
    for _ in range(10):  # more than the pipeline prefetches
        next(batches)
    count = 0
    began = time.perf_counter()
    while time.perf_counter() - began < measured_seconds:
        next(batches)
        count += 1
    seconds = time.perf_counter() - began
    return count * config.batch_size * num_samples / codec.sample_rate / seconds


def main() -> None:
    """Prints a line per source."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train_data", default="")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--segment_seconds", type=float, default=2.0)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--measured_seconds", type=float, default=20.0)
    args = parser.parse_args()
    config = AudioDataConfig(batch_size=args.batch_size, segment_seconds=args.segment_seconds)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        data = [args.train_data]
        if not args.train_data:
            write_files(Path(folder) / "flac")
            settings = prepare.Settings()
            out = Path(folder) / "shards"
            plan = prepare.make_plan(Path(folder) / "flac", out, settings)
            for shard in plan.shards:
                prepare.write_shard(plan, shard)
            data = [f"{folder}/flac", f"{folder}/shards"]
        for source in data:
            rate = audio_per_second(source, preset(args.model), config, args.measured_seconds)
            print(f"{Path(source).name}: {rate:.0f} s of audio per second on one core, "
                  f"{rate / 3600:.2f} hours", flush=True)  # fmt: skip


if __name__ == "__main__":
    sys.exit(exit_code(main))
