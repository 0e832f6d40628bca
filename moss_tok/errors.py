"""Checks of values that users give, and one-line messages for their errors."""

import dataclasses
import math
import numbers
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from typing import Any

from moss_tok import extras

# Arithmetic on sizes could overflow with larger values; no real model or run needs them.
_LARGEST = {int: 2**31 - 1, float: 1e12}
_LARGEST_COUNT = 4096  # of layers, heads, quantizers, channels
_LARGEST_WIDTH = 2**20


def is_number(value: Any) -> bool:
    """Whether a value is a finite real number; booleans do not count."""
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_real and math.isfinite(value)


def check_choice(name: str, value: Any, accepted: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `accepted`."""
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {value!r}")


def check_types(config: Any) -> None:
    """Raises ValueError unless all int, float, bool and str fields of a dataclass have their types.

    Numbers must also be finite and at most `_LARGEST` in magnitude.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        kind = field.type
        if kind in _LARGEST:
            has_type = kind is float or isinstance(value, int)
            if not (is_number(value) and has_type):
                name = {int: "an integer", float: "a finite number"}[kind]
                raise ValueError(f"{field.name} must be {name}, got {value!r}")
            if abs(value) > _LARGEST[kind]:
                raise ValueError(f"{field.name} must be at most {_LARGEST[kind]:g}, got {value!r}")
        elif kind in (bool, str) and not isinstance(value, kind):
            raise ValueError(f"{field.name} must be of type {kind.__name__}, got {value!r}")


def check_positive(config: Any, *names: str) -> None:
    """Raises ValueError unless the fields `names` are positive and all fields have their types."""
    for name in names:
        value = getattr(config, name)
        if not (is_number(value) and value > 0):
            raise ValueError(f"{name} must be a positive number, got {value!r}")
        if isinstance(value, int):
            limit = _LARGEST_COUNT if name.startswith("num_") else _LARGEST_WIDTH
            if value > limit:
                raise ValueError(f"{name} must be at most {limit}, got {value}")
    check_types(config)


def user_error(error: Exception, less: str) -> str:
    """The one-line message for an error that the user can fix; "" for a bug in moss_tok.

    Args:
      error: Any exception.
      less: Advice on how to use less memory of a device, for out-of-memory errors.
    """
    if isinstance(error, ModuleNotFoundError):
        name = (error.name or str(error)).partition(".")[0]
        # A missing module of moss_tok itself is a bug, which needs its traceback.
        own = name == "moss_tok"
        line = "" if own else f"{name} is not installed: {extras.install_module(name)}"
    elif isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):  # from jax
        line = f"{str(error).splitlines()[0]}; {less}"
    elif isinstance(error, MemoryError):
        line = f"not enough memory{f' ({error})' if str(error) else ''}; {less}"
    elif isinstance(error, BrokenExecutor):
        line = f"a worker process was killed, probably for lack of memory; {less}, or fewer workers"
    elif isinstance(error, subprocess.CalledProcessError):  # it has said why, if it could
        line = f"{' '.join(map(str, error.cmd))}: exit code {error.returncode}"
    elif isinstance(error, OSError) and error.strerror:  # from the operating system
        line = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        line = str(error) if isinstance(error, (ValueError, OSError)) else ""
    return " ".join(line.split())


def exit_code(run: Callable[[], int | None], less: str = "use fewer or shorter recordings") -> int:
    """Calls `run`, and prints an error that the user can fix as one line.

    Args:
      run: What a command does.
      less: Advice on how to use less memory of a device, for out-of-memory errors.

    Returns:
      The exit code: what `run` returns (0 for None), or 2 after such an error.
    """
    try:
        return run() or 0
    except Exception as error:
        line = user_error(error, less)
        if not line:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 2
