"""Progress lines of a run, and its speed."""

import sys
import time
from typing import Any

import tqdm

from moss_tok import sharding
from moss_tok.training.config import TrainConfig
from moss_tok.training.objective import Objective, TrainingData

_LONG_WAIT = 0.1  # share of the time; more workers would help


class Rates:
    """Training speed since the last line of the log."""

    def __init__(self, step: int):
        self._step = step
        self._began = time.perf_counter()
        self._waited = 0.0

    def since_last(self, step: int, batch_seconds: float) -> dict[str, float]:
        """Steps and seconds of audio per second, and the share of waiting; starts again."""
        elapsed = time.perf_counter() - self._began
        per_second = (step - self._step) / elapsed
        values = {
            "steps_per_second": per_second,
            "audio_seconds_per_second": per_second * batch_seconds,
            "data_wait_share": self._waited / elapsed,
        }
        self.__init__(step)
        return values

    def add_wait(self, seconds: float) -> None:
        """Counts time in which a batch was read and the step before it came to its end.

        The devices may have been idle for a part of this time, so the share of waiting for data is
        an upper bound.
        """
        self._waited += seconds

    def leave_out(self, seconds: float) -> None:
        """Excludes time that was not spent on training."""
        self._began += seconds


def introduce(config: TrainConfig, objective: Objective, data: TrainingData) -> None:
    """Says what the run trains on, and how to read its progress lines."""
    say(f"{data.describe()}; workdir {config.run.workdir}")
    if objective.good_signs():
        say(f"good signs: {objective.good_signs()}")
    if 0 < config.optimizer.decay_steps < config.run.num_steps:
        decayed = config.optimizer.decay_steps
        say(f"warning: the learning rate is 0 from step {decayed} (decay_steps) on")


def line(step: int, num_steps: int, values: dict[str, Any], objective: Objective) -> str:
    """A progress line from the values of a line of metrics.jsonl."""
    minutes = (num_steps - step) / values["steps_per_second"] / 60
    loss = f"loss {values['loss']:.3f}" if "loss" in values else "all updates skipped"
    parts = [f"step {step}/{num_steps} {loss}"]
    for name, value in values.items():
        if name.endswith("_loss") and "/" not in name:
            parts.append(f"{name.removesuffix('_loss')} {value:.3f}")
    parts.append(objective.progress(values))
    speed = values["audio_seconds_per_second"]
    parts.append(f"{speed:.0f} s of audio per s, {minutes:.1f} min left")
    if values["data_wait_share"] >= _LONG_WAIT:
        parts.append(f"{values['data_wait_share']:.0%} of the time waiting for data")
    return " ".join(part for part in parts if part)


def say(text: str, everywhere: bool = False) -> None:
    """Prints a line in the main process, or with `everywhere` in any process."""
    if everywhere or sharding.is_main_process():
        tqdm.tqdm.write(text)
        sys.stdout.flush()
