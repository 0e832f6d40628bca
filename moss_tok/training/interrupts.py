"""SIGTERM and profiling, which are handled between steps."""

import contextlib
import signal
from typing import Any

import jax

from moss_tok import storage
from moss_tok.training.objective import Say

_PROFILE = "profile"


class StoppedError(Exception):
    """SIGTERM came during an evaluation."""


# Not multihost_utils.reached_preemption_sync_point: without jax.distributed it never reports a
# signal, so a run of one process would die without a checkpoint and without code 143; and it is
# asked once per step, so a signal could not interrupt an evaluation.
class StopSignal:
    """Records whether SIGTERM came; a context manager. Works in the main thread only."""

    def __init__(self):
        self.received = False

    def __enter__(self) -> "StopSignal":
        def receive(number: int, frame: Any) -> None:
            del number, frame
            self.received = True

        with contextlib.suppress(ValueError):  # not in the main thread
            self._before = signal.signal(signal.SIGTERM, receive)
        return self

    def __exit__(self, *_: Any) -> None:
        with contextlib.suppress(ValueError, AttributeError):
            signal.signal(signal.SIGTERM, self._before)


class Trace:
    """Profiles some steps. It is a context manager, so that an error does not lose the profile."""

    def __init__(self, steps: range, mirror: storage.Mirror, workdir: str, say: Say):
        self._steps = steps
        self._mirror = mirror
        self._workdir = workdir
        self._say = say
        self._on = False

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_: Any) -> None:
        self._switch(False)

    def at(self, step: int, previous: Any) -> None:
        """Starts or ends the profile; the loop calls this before each step.

        `previous` is the output of the last step, which may still run.
        """
        is_profiled = step in self._steps
        if is_profiled != self._on:
            jax.block_until_ready(previous)
        self._switch(is_profiled)

    def _switch(self, on: bool) -> None:
        if on and not self._on:
            jax.profiler.start_trace(str(self._mirror.local / _PROFILE))
        elif self._on and not on:
            jax.profiler.stop_trace()
            self._mirror.send()
            self._say(f"profile: {self._workdir}/{_PROFILE}")
        self._on = on
