"""Processor time of training steps of speech recognition, from audio and from codes.

    python experiments/benchmark_recognition.py CODEC digits.jsonl codes/

Settings are those of asr.flags and asr_codes.flags. "codes, padded" are codes in arrays as long as
those of the audio, so that this row differs from "audio" in the encoder only. Runs take turns,
block by block, so that other jobs on the machine slow them down alike. "step" is the step on
batches that are already on the device, "with data" also reads the batches.
"""

import argparse
import dataclasses
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moss_tok import settings, storage
from moss_tok.errors import exit_code
from moss_tok.objectives.config import all_fields, build_objective, configure
from moss_tok.training.objective import Batch
from moss_tok.training.state import Recipe, init_state
from moss_tok.training.step import train_step

_FOLDER = Path(__file__).parent
_BLOCK_STEPS = 8
_WINDOW = 32  # batches of codes, among which are all lengths
_SETTLE_SECONDS = 2.0  # after a block, for readers to fill their buffers


@dataclasses.dataclass
class Run:
    """A training run: its step, its state and its batches."""

    recipe: Recipe
    state: Any
    batches: Iterator[Batch]
    fixed: list[Batch]  # batches on the device

    def step(self, batch: Batch) -> None:
        """One training step, to its end."""
        self.state, metrics = train_step(self.recipe, self.state, batch)
        jax.block_until_ready((self.state, metrics))

    def steps(self) -> None:
        """A block of steps on batches that are there already."""
        for batch in itertools.islice(itertools.cycle(self.fixed), _BLOCK_STEPS):
            self.step(batch)

    def steps_with_data(self) -> None:
        """A block of steps on new batches."""
        for batch in itertools.islice(self.batches, _BLOCK_STEPS):
            self.step(batch)
        time.sleep(_SETTLE_SECONDS)


def read_flags(name: str) -> dict[str, Any]:
    """The flags of a flagfile by name."""
    fields = all_fields()
    values = {}
    for line in (_FOLDER / name).read_text().splitlines():
        if line.startswith("--"):
            flag, _, value = line.removeprefix("--").partition("=")
            values[flag] = type(settings.flag_default(fields[flag]))(value)
    return values


def make_run(flags: dict[str, Any], num_warm_up: int = 1, pad: bool = False) -> Run:
    """Opens the data, initializes the state and compiles the step in some steps.

    `pad`: codes are padded to segment_seconds.
    """
    config = configure(**flags)
    objective = build_objective(config)
    recipe = Recipe(objective, config.optimizer)
    data = objective.find_data(config, storage.Mirror(storage.to_path(flags["workdir"])), print)
    num_frames = objective.codec.num_frames(objective.num_samples)

    def finished(batch: Batch) -> Batch:
        failed = batch.pop("failed")
        batch |= {
            "failed_reads": np.zeros(len(failed), np.int32),
            "stop": np.zeros(len(failed), bool),
        }
        if pad:
            missing = num_frames - batch["codes"].shape[-1]
            batch["codes"] = np.pad(batch["codes"], ((0, 0), (0, 0), (0, missing)))
        return jax.tree.map(jnp.asarray, batch)

    batches = map(finished, data.batches(0, range(config.data.batch_size)))
    state = jax.jit(init_state, static_argnums=0)(recipe)
    run = Run(recipe, state, batches, list(itertools.islice(batches, _BLOCK_STEPS)))
    for batch in itertools.islice(batches, num_warm_up):
        run.step(batch)
    return run


def take_turns(blocks: list[Callable[[], None]], num_turns: int) -> list[float]:
    """Median processor seconds per step of each kind of block."""
    times: list[list[float]] = [[] for _ in blocks]
    for _ in range(num_turns):
        for block, seconds in zip(blocks, times, strict=True):
            began = time.process_time()
            block()
            seconds.append((time.process_time() - began) / _BLOCK_STEPS)
    return [float(np.median(seconds)) for seconds in times]


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("codec", help="of both runs")
    parser.add_argument("audio", help="a manifest")
    parser.add_argument("codes", help="the codes of its recordings, from moss-tok tokenize")
    parser.add_argument("--num_turns", type=int, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as workdir:
        common = {"init_from": args.codec, "workdir": workdir, "num_eval_clips": 0}
        audio = read_flags("asr.flags") | common | {"train_data": args.audio}
        codes = read_flags("asr_codes.flags") | common | {"train_data": args.codes}
        for name in ("language_model", "batch_size", "segment_seconds", "max_text_tokens"):
            codes[name] = audio[name]
        runs = {
            "audio": make_run(audio),
            "codes, padded": make_run(codes, pad=True),
            "codes": make_run(codes, num_warm_up=_WINDOW),
        }
    step = take_turns([run.steps for run in runs.values()], args.num_turns)
    with_data = take_turns([run.steps_with_data for run in runs.values()], args.num_turns)
    print("| | processor s per step | ratio | with data | ratio |")
    print("|---|---|---|---|---|")
    for name, a, b in zip(runs, step, with_data, strict=True):
        print(f"| {name} | {a:.4f} | {step[0] / a:.1f} | {b:.4f} | {with_data[0] / b:.1f} |")


if __name__ == "__main__":
    sys.exit(exit_code(main))
