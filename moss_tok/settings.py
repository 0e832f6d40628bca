"""Settings: frozen dataclasses whose fields are the flags of train.py.

A settings class may have other settings classes as fields, so a run is a tree of small classes.
`flatten` converts such a tree to flat values by name, as flags and train_config.json have them, and
`build` converts them back. Each field knows which values it accepts.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from moss_tok.errors import check_choice, check_types


@dataclasses.dataclass(frozen=True)
class Kind:
    """The text form of a flag whose value is neither a number nor a string.

    Attributes:
      parse: (name of the flag, text) -> value. Raises ValueError if the text is not accepted.
      format: The inverse, value -> text.
    """

    parse: Callable[[str, str], Any]
    format: Callable[[Any], str]


def setting(
    default: Any,
    help_text: str,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
    choices: tuple[str, ...] = (),
    free: bool = False,
    kind: Kind | None = None,
) -> Any:
    """A field of a settings class.

    Args:
      default: Value if the flag is not given.
      help_text: Its text in `--help`.
      at_least: Smallest accepted value.
      above: Every accepted value is larger than this.
      at_most: Largest accepted value.
      below: Every accepted value is smaller than this.
      choices: Accepted values; empty: any.
      free: Whether the value may change when a run is resumed, because it does not change what a
        step computes.
      kind: Text form of the value; default: numbers and strings as they are.
    """
    bounds = {}
    if math.isfinite(at_least):
        bounds["at least"] = at_least
    if math.isfinite(above):
        bounds["above"] = above
    if math.isfinite(at_most):
        bounds["at most"] = at_most
    if math.isfinite(below):
        bounds["below"] = below
    metadata = {
        "help": help_text,
        "bounds": bounds,
        "choices": choices,
        "free": free,
        "kind": kind,
    }
    return dataclasses.field(default=default, metadata=metadata)


def weight(default: float, help_text: str) -> Any:
    """A factor of at least 0."""
    return setting(default, help_text, at_least=0.0)


def count(default: int, help_text: str, at_least: int = 0, free: bool = False) -> Any:
    """A whole number of at least 0 or `at_least`."""
    return setting(default, help_text, at_least=at_least, free=free)


def _parse_integers(name: str, text: str) -> tuple[int, ...]:
    numbers = []
    for part in text.split(","):
        part = part.strip()
        if not part:
            continue
        if not part.isdecimal():
            raise ValueError(f"{name} must be whole numbers with commas between, got {text!r}")
        numbers.append(int(part))
    return tuple(numbers)


def _format_integers(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


INTEGERS = Kind(_parse_integers, _format_integers)


def decibel_range(lowest: float, highest: float) -> Kind:
    """The text form LOW:HIGH of a pair (low, high) in lowest..highest; "" is the form of None."""

    def parse(name: str, text: str) -> tuple[float, float] | None:
        if not text:
            return None
        error = ValueError(
            f"{name} must be LOW:HIGH with {lowest} <= LOW <= HIGH <= {highest}, got {text!r}"
        )
        try:
            low, high = map(float, text.split(":"))
        except ValueError:
            raise error from None
        if not lowest <= low <= high <= highest:
            raise error
        return low, high

    def format_range(value: tuple[float, float] | None) -> str:
        if value is None:
            return ""
        low, high = value
        return f"{low:g}:{high:g}"

    return Kind(parse, format_range)


def _parse_steps(name: str, text: str) -> range:
    if not text:
        return range(0)
    error = ValueError(f"{name} must be FIRST:LAST with 1 <= FIRST <= LAST, got {text!r}")
    try:
        first, last = map(int, text.split(":"))
    except ValueError:
        raise error from None
    if not 1 <= first <= last:
        raise error
    return range(first, last + 1)


def _format_steps(steps: range) -> str:
    return f"{steps.start}:{steps.stop - 1}" if steps else ""


STEPS = Kind(_parse_steps, _format_steps)


def check(config: Any) -> None:
    """Checks the fields of a settings object; its `__post_init__` calls this.

    Raises:
      ValueError: A value has another type, is out of its bounds, or is not one of its choices.
    """
    check_types(config)
    for field in dataclasses.fields(config):
        if field.metadata:
            _check_field(field, getattr(config, field.name))


_HOLDS = {
    "at least": lambda value, bound: value >= bound,
    "above": lambda value, bound: value > bound,
    "at most": lambda value, bound: value <= bound,
    "below": lambda value, bound: value < bound,
}


def _check_field(field: dataclasses.Field, value: Any) -> None:
    bounds = field.metadata["bounds"]
    are_kept = [_HOLDS[name](value, bound) for name, bound in bounds.items()]
    if not all(are_kept):
        accepted = " and ".join(f"{name} {bound:g}" for name, bound in bounds.items())
        raise ValueError(f"{field.name} must be {accepted}, got {value!r}")
    if field.metadata["choices"]:
        check_choice(field.name, value, field.metadata["choices"])


def leaf_fields(cls: type) -> Iterator[dataclasses.Field]:
    """The settings of a class and of the classes that its fields are, in order."""
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            yield from leaf_fields(field.type)
        else:
            yield field


def flag_default(field: dataclasses.Field) -> str | int | float:
    """The default of a setting, in the form of a flag."""
    return _to_flag(field, field.default)


def _to_flag(field: dataclasses.Field, value: Any) -> str | int | float:
    kind = field.metadata["kind"]
    return kind.format(value) if kind else value


def flatten(config: Any) -> dict[str, str | int | float]:
    """The values of all settings by name, in the form of flags."""
    values: dict[str, str | int | float] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            values |= flatten(value)
        else:
            values[field.name] = _to_flag(field, value)
    return values


def build(cls: type, values: dict[str, Any]) -> Any:
    """A settings object from values by name, in the form of flags; others take their default.

    Raises:
      ValueError: A value is not accepted.
    """
    arguments = {}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            arguments[field.name] = build(field.type, values)
        elif field.name in values:
            arguments[field.name] = _from_flag(field, values[field.name])
    return cls(**arguments)


def _from_flag(field: dataclasses.Field, value: Any) -> Any:
    kind = field.metadata["kind"]
    if kind is None:
        return value
    if not isinstance(value, str):
        raise ValueError(f"{field.name} must be of type str, got {value!r}")
    return kind.parse(field.name, value)


def leaf_fields_of(config: Any) -> Iterator[dataclasses.Field]:
    """The settings of an object and of the objects in its fields, in order."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaf_fields_of(value)
        else:
            yield field
