"""Trains a codec, a recogniser or a speech model; the same command resumes an interrupted run.

    python train.py --flagfile=experiments/quickstart.flags --train_data=DIR --workdir=runs/mine

A flag of train.py is the name of a setting, as in train_config.json, so it has underscores:
--batch_size=16. The options of moss-tok have hyphens: --num-quantizers 8. Later flags win, so those
after --flagfile change its values.
"""

import signal
import sys

from absl import flags

from moss_tok.objectives import flags as train_flags

train_flags.define()
flags.adopt_module_key_flags(train_flags)  # so that --help lists them
flags.DEFINE_string(
    "coordinator_address",
    "",
    "HOST:PORT of process 0 in a run of several processes; empty: one process, or processes that "
    "TPU pods, Slurm or GKE connect",
)
flags.DEFINE_integer("num_processes", 1, "number of processes, with coordinator_address")
flags.DEFINE_integer("process_id", 0, "number of this process, from 0, with coordinator_address")
flags.DEFINE_string(
    "compilation_cache_dir",
    "",
    "folder for compiled programs, so that the next start need not compile them; empty: none",
)

_CONNECTION = ("coordinator_address", "num_processes", "process_id")


def main() -> None:
    """Builds the settings from the flags and trains."""
    config = train_flags.config()
    import jax  # takes a second to import; a bad flag should fail before that

    from moss_tok import sharding, storage
    from moss_tok.objectives.config import build_objective
    from moss_tok.training import loop

    if flags.FLAGS.compilation_cache_dir:
        cache = storage.to_path(flags.FLAGS.compilation_cache_dir)
        jax.config.update("jax_compilation_cache_dir", str(cache))
    connection = [flags.FLAGS[name].value for name in _CONNECTION]
    sharding.connect(*connection)
    if not loop.train(config, build_objective(config)):
        sys.exit(128 + signal.SIGTERM)  # tells schedulers to start it again


if __name__ == "__main__":
    train_flags.run(main)
