"""Trains a codec: python train.py --flagfile=experiments/quickstart.flags [--train_data=...]."""

import signal
import sys

from absl import flags

from moss_tok.training import flags as train_flags

train_flags.define()
flags.DEFINE_string("coordinator_address", "", "HOST:PORT of process 0, where there are several")
flags.DEFINE_integer("num_processes", 1, "how many processes train together")
flags.DEFINE_integer("process_id", 0, "which of them this is, from 0")

_CONNECTION = ("coordinator_address", "num_processes", "process_id")


def main() -> None:
    """Builds the config from the flags and trains."""
    config = train_flags.config()
    from moss_tok import sharding  # imports jax; a bad flag should not wait for it
    from moss_tok.training import loop

    sharding.connect(*(flags.FLAGS[name].value for name in _CONNECTION))
    if not loop.train(config):
        sys.exit(128 + signal.SIGTERM)  # so that schedulers start it again


if __name__ == "__main__":
    train_flags.run(main)
