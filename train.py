"""Trains a codec: python train.py --flagfile=experiments/quickstart.flags [--train_data=...]."""

import dataclasses
import signal
import sys

from absl import app, flags, logging

from moss_tok.config import TrainConfig

_DEFINE = {str: flags.DEFINE_string, int: flags.DEFINE_integer, float: flags.DEFINE_float}

for _field in dataclasses.fields(TrainConfig):
    _DEFINE[_field.type](_field.name, _field.default, _field.metadata["help"])


def _fail(error: Exception) -> None:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags; a bad one ends with one line and exit code 2."""
    try:
        rest = flags.FLAGS(argv)
    except (flags.Error, OSError, ValueError) as error:
        _fail(error)
    if len(rest) > 1:
        _fail(ValueError(f"unexpected argument {rest[1]!r}; settings are given as --name=value"))
    return rest


def main(argv: list[str]) -> None:
    """Builds the config from the flags and trains."""
    del argv
    logging.set_verbosity(logging.ERROR)
    try:
        names = [field.name for field in dataclasses.fields(TrainConfig)]
        config = TrainConfig(**{name: flags.FLAGS[name].value for name in names})
        from moss_tok.training import loop  # imports jax; a bad flag should not wait for it

        if not loop.train(config):
            sys.exit(128 + signal.SIGTERM)  # so that schedulers start it again
    except (ValueError, OSError) as error:
        _fail(error)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
