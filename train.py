"""Trains a codec: python train.py --flagfile=experiments/quickstart.flags [--train_data=...]."""

import dataclasses
import signal
import sys

from absl import app, flags, logging

from moss_tok.config import TrainConfig

_DEFINE = {str: flags.DEFINE_string, int: flags.DEFINE_integer, float: flags.DEFINE_float}

for _field in dataclasses.fields(TrainConfig):
    _DEFINE[_field.type](_field.name, _field.default, _field.metadata["help"])

flags.DEFINE_string("coordinator_address", "", "HOST:PORT of process 0, where there are several")
flags.DEFINE_integer("num_processes", 1, "how many processes train together")
flags.DEFINE_integer("process_id", 0, "which of them this is, from 0")

_CONNECTION = ("coordinator_address", "num_processes", "process_id")


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
        from moss_tok import sharding  # imports jax; a bad flag should not wait for it
        from moss_tok.training import loop

        sharding.connect(*(flags.FLAGS[name].value for name in _CONNECTION))
        if not loop.train(config):
            sys.exit(128 + signal.SIGTERM)  # so that schedulers start it again
    except (ValueError, OSError) as error:
        _fail(error)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
