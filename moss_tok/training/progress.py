"""Progress lines of a run, and its speed."""

import sys
import time
from typing import Any

import tqdm

from moss_tok import sharding
from moss_tok.training.objective import Objective


class Rates:
    """Training speed since the last line of the log."""

    def __init__(self, step: int):
        self._step = step
        self._began = time.perf_counter()

    def since_last(self, step: int, batch_seconds: float) -> dict[str, float]:
        """Steps per second and seconds of audio per second since the last call; starts again."""
        per_second = (step - self._step) / (time.perf_counter() - self._began)
        self.__init__(step)
        return {
            "steps_per_second": per_second,
            "audio_seconds_per_second": per_second * batch_seconds,
        }

    def leave_out(self, seconds: float) -> None:
        """Excludes time that was not spent on training."""
        self._began += seconds


def line(step: int, num_steps: int, values: dict[str, Any], objective: Objective) -> str:
    """A progress line from the values of a line of metrics.jsonl."""
    minutes = (num_steps - step) / values["steps_per_second"] / 60
    parts = [f"step {step}/{num_steps} loss {values['loss']:.3f}"]
    for name, value in values.items():
        if name.endswith("_loss") and "/" not in name:
            parts.append(f"{name.removesuffix('_loss')} {value:.3f}")
    parts.append(objective.progress(values))
    speed = values["audio_seconds_per_second"]
    parts.append(f"{speed:.0f} s of audio per s, {minutes:.1f} min left")
    return " ".join(part for part in parts if part)


def say(text: str, everywhere: bool = False) -> None:
    """Prints a line in the main process, or with `everywhere` in any process."""
    if everywhere or sharding.is_main_process():
        tqdm.tqdm.write(text)
        sys.stdout.flush()
