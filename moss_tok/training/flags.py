"""The flags of a training run, one per field of `TrainConfig`; a user's error is one line."""

import dataclasses
import io
import sys
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags, logging

from moss_tok.config import TrainConfig, user_error

_DEFINE = {str: flags.DEFINE_string, int: flags.DEFINE_integer, float: flags.DEFINE_float}


def define() -> None:
    """Defines them."""
    for field in dataclasses.fields(TrainConfig):
        _DEFINE[field.type](field.name, field.default, field.metadata["help"])


def config() -> TrainConfig:
    """The run they describe; ValueError where a value is not accepted."""
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    return TrainConfig(**{name: flags.FLAGS[name].value for name in names})


def run(main: Callable[[], None]) -> NoReturn:
    """Parses the command line and calls `main`; bad input ends with one line and exit code 2."""

    def guarded(argv: list[str]) -> None:
        del argv
        logging.set_verbosity(logging.ERROR)
        if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may be any bytes
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            main()
        except Exception as error:
            less = "take a smaller batch_size, more num_microbatches, remat=full or fsdp of mesh"
            line = user_error(error, less)
            if not line:
                raise
            _fail(line)

    app.run(guarded, flags_parser=_parse)


def _fail(line: str) -> NoReturn:
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def _parse(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
    except (flags.Error, OSError, ValueError) as error:
        _fail(" ".join(str(error).split()))
    if len(rest) > 1:
        _fail(f"unexpected argument {rest[1]!r}; settings are given as --name=value")
    return rest
