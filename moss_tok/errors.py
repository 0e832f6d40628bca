"""Checks of values that users give, and the one line that an error is worth to them."""

import dataclasses
import math
import numbers
from typing import Any

# No real model or run needs more; beyond, arithmetic on sizes overflows somewhere.
_LARGEST = {int: 2**31 - 1, float: 1e12}


_LARGEST_COUNT = 4096  # of layers, heads, quantizers, channels
_LARGEST_WIDTH = 2**20


def is_number(value: Any) -> bool:
    """Whether a value is a finite real number; true and false are none."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and math.isfinite(value)


def check_choice(name: str, value: Any, accepted: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `accepted`."""
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {value!r}")


def check_types(config: Any) -> None:
    """Raises ValueError unless each plain field has its type and a number is finite and sane."""
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), field.type
        if kind in _LARGEST:
            whole = isinstance(value, int) or kind is float
            if not (is_number(value) and whole):
                name = {int: "an integer", float: "a finite number"}[kind]
                raise ValueError(f"{field.name} must be {name}, got {value!r}")
            if abs(value) > _LARGEST[kind]:
                raise ValueError(f"{field.name} must be at most {_LARGEST[kind]:g}, got {value!r}")
        elif kind in (bool, str) and not isinstance(value, kind):
            raise ValueError(f"{field.name} must be of type {kind.__name__}, got {value!r}")


def check_positive(config: Any, *names: str) -> None:
    """Raises ValueError unless the fields `names` are positive and all have their types."""
    for name in names:
        value = getattr(config, name)
        if not (is_number(value) and value > 0):
            raise ValueError(f"{name} must be a positive number, got {value!r}")
        if isinstance(value, int):
            most = _LARGEST_COUNT if name.startswith("num_") else _LARGEST_WIDTH
            if value > most:
                raise ValueError(f"{name} must be at most {most}, got {value}")
    check_types(config)


def user_error(error: Exception, less: str) -> str:
    """The line that an error is worth to a user; empty for a mistake of ours.

    Args:
      error: Any.
      less: What takes less of a device's memory.
    """
    if isinstance(error, ModuleNotFoundError):
        name = (error.name or str(error)).partition(".")[0]
        line = f"{name} is not installed: pip install 'moss_tok[train]'"
    elif isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):  # jax's
        line = f"{str(error).splitlines()[0]}; {less}"
    else:
        line = str(error) if isinstance(error, (ValueError, OSError)) else ""
    return " ".join(line.split())
