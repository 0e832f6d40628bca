"""Trains a codec: python train.py --flagfile=experiments/quickstart.flags [--train_data=...]."""

import signal
import sys

from absl import flags

from moss_tok.objectives import flags as train_flags

train_flags.define()
flags.DEFINE_string("coordinator_address", "", "HOST:PORT of process 0, where there are several")
flags.DEFINE_integer("num_processes", 1, "how many processes train together")
flags.DEFINE_integer("process_id", 0, "which of them this is, from 0")
flags.DEFINE_string("compilation_cache_dir", "", "compiled programs are kept here for the next run")

_CONNECTION = ("coordinator_address", "num_processes", "process_id")


def main() -> None:
    """Builds the config from the flags and trains."""
    config = train_flags.config()
    import jax  # takes a second; a bad flag should not wait for it

    from moss_tok import sharding, storage
    from moss_tok.objectives.config import build_objective
    from moss_tok.training import loop

    if flags.FLAGS.compilation_cache_dir:
        cache = storage.to_path(flags.FLAGS.compilation_cache_dir)
        jax.config.update("jax_compilation_cache_dir", str(cache))
    sharding.connect(*(flags.FLAGS[name].value for name in _CONNECTION))
    if not loop.train(config, build_objective(config)):
        sys.exit(128 + signal.SIGTERM)  # so that schedulers start it again


if __name__ == "__main__":
    train_flags.run(main)
