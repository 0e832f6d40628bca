"""The flags of train.py, one per setting of any objective; user errors are printed as one line."""

import io
import sys
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags, logging

from moss_tok import settings
from moss_tok.errors import user_error
from moss_tok.objectives.config import all_fields, configure
from moss_tok.training.config import TrainConfig

_DEFINE = {str: flags.DEFINE_string, int: flags.DEFINE_integer, float: flags.DEFINE_float}


def define() -> None:
    """Defines the flags."""
    for name, field in all_fields().items():
        default = settings.flag_default(field)
        _DEFINE[type(default)](name, default, field.metadata["help"])


def config() -> TrainConfig:
    """The settings of a run from the flags on the command line.

    Raises:
      ValueError: A value is not accepted, or the objective does not have a flag.
    """
    values = {}
    for name in all_fields():
        flag = flags.FLAGS[name]
        if flag.present:
            values[name] = flag.value
    return configure(**values)


def run(main: Callable[[], None]) -> NoReturn:
    """Parses the command line and calls `main`; bad input ends with one line and exit code 2."""

    def guarded(argv: list[str]) -> None:
        del argv
        logging.set_verbosity(logging.ERROR)
        if isinstance(sys.stdout, io.TextIOWrapper):  # file names may be any bytes
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            main()
        except Exception as error:
            memory_hint = (
                "take a smaller batch_size, more num_microbatches, remat=full or fsdp in mesh"
            )
            line = user_error(error, memory_hint)
            if not line:
                raise
            _fail(line)

    app.run(guarded, flags_parser=_parse)


def _fail(line: str) -> NoReturn:
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def _parse(argv: list[str]) -> list[str]:
    try:
        arguments = flags.FLAGS(argv)  # the program, then arguments that are not flags
    except (flags.Error, OSError, ValueError) as error:
        _fail(" ".join(str(error).split()))
    if len(arguments) > 1:
        _fail(f"unexpected argument {arguments[1]!r}; settings are given as --name=value")
    return arguments
