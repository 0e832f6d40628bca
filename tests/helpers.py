"""What several test files share: tiny models, batches, runs."""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import absl.flags
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import soundfile

import moss_tok
from moss_tok.codec import init as codec_init
from moss_tok.codec.config import CodecConfig, PatchConfig, QuantizerConfig, TransformerConfig
from moss_tok.codec.presets import mirror
from moss_tok.data import prepare
from moss_tok.json_files import read_json_lines
from moss_tok.language.config import LanguageConfig
from moss_tok.objectives import flags as train_flags
from moss_tok.objectives.config import build_objective, configure
from moss_tok.training import loop, optimizer, writer
from moss_tok.training import state as states
from moss_tok.training import step as steps
from moss_tok.training.state import Recipe

GOLDEN = Path(__file__).parent / "golden"
CORPUS = Path(__file__).parents[2] / "shared" / "corpus"
ROOT = Path(__file__).parents[1]
RATE = 8000  # Hz, of the tiny models and recordings
MOST_FRAMES = 108  # more than three of the longest window, in code frames, of the golden models


def micro_config(**changes) -> CodecConfig:
    """A few thousand parameters at 8 kHz, 16 samples per frame, windows of 6 and 3 frames."""
    encoder = (
        PatchConfig(8),
        TransformerConfig(8, 6, 16, 2, 2, 32, 0.006, layer_scale=0.5),
        PatchConfig(2),
        TransformerConfig(12, 8, 16, 2, 1, 32, 0.006, layer_scale=0.5),
    )
    quantizer = QuantizerConfig(8, 6, 8, 4, 16, 3)
    config = CodecConfig(RATE, 1, encoder, quantizer, mirror(encoder), "v1")
    return dataclasses.replace(config, **changes)


CODEC = micro_config()
_STAGE = (PatchConfig(16), TransformerConfig(16, 8, 16, 2, 2, 32, 0.006, layer_scale=0.5))
# With one Transformer on each side, for what does not depend on their number: it compiles faster.
SHALLOW = micro_config(encoder=_STAGE, decoder=mirror(_STAGE))

# Flags of runs with it.
PRETRAIN = {
    "learning_rate": 3e-3,
    "warmup_steps": 2,
    "batch_size": 4,
    "segment_seconds": 0.256,
    "reseed_every": 5,
    "mel_windows": "64,512",  # seven take twice as long to compile; losses_test.py has them
    "mesh": "data:1",
}
ADVERSARIAL = PRETRAIN | {
    "stage": "adversarial",
    "discriminator_learning_rate": 1e-3,
    "discriminator_channels": 2,
    "discriminator_periods": "3",  # compiling all of them takes minutes
    "discriminator_windows": "512",
}
# Its spectra discriminators have 26 convolutions, which take most of the time to compile.
SECOND_STAGE = ADVERSARIAL | {"discriminator_windows": ""}
LANGUAGE = LanguageConfig(8, 257, 256, 16, 1, 2, 1, 24, head_dim=8)
SEMANTIC = PRETRAIN | {"language_model": "tiny", "max_text_tokens": 4}


@functools.partial(jax.jit, static_argnums=0)
def init_params(config):
    """Fresh parameters of a codec; op by op it takes longer."""
    return codec_init.init_params(config, jax.random.key(0))


_init_state = jax.jit(states.init_state, static_argnums=0)


def init_state(recipe, params=None):
    """A new state; its trace is that of `states.state_shapes`."""
    return _init_state(recipe, params or {}, {})


def make_recipe(flags, codec=CODEC, language=None) -> Recipe:
    """What a step computes with these flags; `language` is a smaller one than the flags say."""
    config = configure(**flags)
    objective = build_objective(config, codec=codec)
    if language is not None:
        objective = dataclasses.replace(objective, language=language)
    return Recipe(objective, config.optimizer, config.run.seed, config.devices.num_microbatches)


@functools.cache
def _jitted_step(recipe, mesh, batch_size):
    return steps.sharded_train_step(recipe, states.state_shapes(recipe, mesh), batch_size)


def train(flags, draws_curves=False) -> bool:
    """A whole run; equal runs in a file share their step, which is traced once.

    Drawing curves takes a third of the time of a short run.
    """

    def shared_step(recipe, shapes, batch_size):
        return _jitted_step(recipe, shapes.step.sharding.mesh, batch_size)

    config = configure(**flags)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(loop, "sharded_train_step", shared_step))
        if not draws_curves:
            stack.enter_context(mock.patch.object(writer.MetricsWriter, "save_curves"))
        return loop.train(config, build_objective(config))


def forget_programs():
    """Drops what was traced and compiled."""
    _jitted_step.cache_clear()
    jax.clear_caches()


@contextlib.contextmanager
def sgd_for_adam():
    """Trains by SGD: Adam makes rounding errors of small gradients large."""
    sgd = optax.sgd(2e-5, momentum=0.8)
    with mock.patch.object(optimizer, "adamw", lambda config, peak, decayed: sgd):
        yield


def random_batch(seed=0, batch_size=4, scale=0.1):
    """A batch of noise."""
    wav = scale * np.random.default_rng(seed).standard_normal((batch_size, 1, 2048))
    return make_batch(wav)


def make_batch(wav, length=2048):
    """A batch of audio [B, C, S]."""
    batch_size = wav.shape[0]
    return {
        "wav": jnp.asarray(wav, jnp.float32),
        "length": jnp.broadcast_to(jnp.asarray(length), (batch_size,)),
        "domain": jnp.arange(batch_size) % 4,
        "position": jnp.arange(batch_size),
        "failed_reads": jnp.zeros(batch_size, jnp.int32),
        "stop": jnp.zeros(batch_size, bool),
    }


def text_batch(seed=0, batch_size=4, lengths=(3, 0, 1, 4)):
    """`random_batch`, of which some have texts."""
    tokens = np.random.default_rng(seed + 1).integers(0, 256, (batch_size, 4))
    extra = {
        "text": jnp.asarray(tokens, jnp.int32),
        "text_length": jnp.resize(jnp.array(lengths), batch_size),
        "task": jnp.arange(batch_size) % 3,
    }
    return random_batch(seed, batch_size) | extra


def run_steps(recipe, num_steps, state=None, batch=random_batch):
    """The state and the metrics after some steps."""
    state = init_state(recipe) if state is None else state
    for _ in range(num_steps):
        state, metrics = steps.train_step(recipe, state, batch(int(state.step)))
    return state, metrics


def make_clips(folder, lengths=(1.0, 0.7, 0.1, 2.0, 0.6, 0.6)):
    """Recordings of noise with a manifest; the last two are held out."""
    generator = np.random.default_rng(0)
    rows = []
    for i, seconds in enumerate(lengths):
        wav = 0.1 * generator.standard_normal(int(seconds * RATE))
        soundfile.write(folder / f"{i}.flac", wav, RATE)
        split, domain = ("test", "speech") if i > 3 else ("train", "music")
        rows.append({"path": f"{i}.flac", "split": split, "domain": domain, "transcript": f"T{i}"})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def write_wav(path, seconds=0.3):
    """A recording of noise; its folder is created if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wav = 0.1 * np.random.default_rng(0).standard_normal(int(seconds * RATE))
    soundfile.write(os.fspath(path), wav, RATE)


def prepare_folder(source, folder):
    """Prepares a data set in this process; its records and what was rejected."""
    plan = prepare.make_plan(source, folder, prepare.Settings(num_shards=1))
    for shard in plan.shards:
        prepare.write_shard(plan, shard)
    prepare.finish(plan)
    rows, rejected = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("manifest.jsonl", "rejected.jsonl")
    )
    return rows, rejected


def small_run(flags, clips, folder, **changes):
    """Flags of a run of SHALLOW on the clips, with a new workdir."""
    (folder / "shallow.json").write_text(SHALLOW.to_json())
    paths = {
        "model": str(folder / "shallow.json"),
        "train_data": str(clips / "manifest.jsonl"),
        "workdir": str(folder / "run"),
    }
    return flags | paths | {"log_every": 1} | changes


def code_noise(codec):
    """A codec, audio of two streams, and what encode and decode make of all of it."""
    shape = (2, codec.config.num_channels, MOST_FRAMES * codec.config.hop_length)
    wav = 0.1 * np.random.default_rng(3).standard_normal(shape, np.float32)
    codes = moss_tok.encode(codec, wav).codes
    return codec, wav, np.asarray(codes), np.asarray(moss_tok.decode(codec, codes).wav)


def leaves_equal(a, b) -> bool:
    """Whether two trees hold the same values, bit for bit."""
    same = jax.tree.map(lambda x, y: np.array_equal(x, y), a, b)
    return all(jax.tree.leaves(same))


def assert_near(found, expected):
    """1e-5 of full scale; the golden models' random weights reach an amplitude of 27."""
    np.testing.assert_allclose(found, expected, atol=1e-5 * max(1, np.abs(expected).max()))


def rows_without_timing(workdir):
    """Lines of metrics.jsonl without what differs from run to run."""
    rows = writer.read_rows(Path(workdir) / writer.METRICS)
    for row in rows:
        for name in ("steps_per_second", "audio_seconds_per_second", "data_wait_share"):
            row.pop(name, None)
    return rows


def as_flags(flags):
    """As train.py takes them."""
    return [f"--{name}={value}" for name, value in flags.items()]


@functools.cache
def train_script():
    """train.py as a module; a process can define its flags only once."""
    spec = importlib.util.spec_from_file_location("train_script", ROOT / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train_py(*flags, main=None) -> int:
    """Runs train.py in this process, which saves the imports; returns the exit code.

    `main` replaces the function `main` of train.py.
    """
    main = main or train_script().main
    absl.flags.FLAGS.unparse_flags()
    with mock.patch.object(sys, "argv", ["train.py", *flags]):
        with pytest.raises(SystemExit) as ended:
            train_flags.run(main)
    return ended.value.code


def start(config, *flags, num_devices=8, environment=(), python=()):
    """train.py in a process group of its own; what it compiles is kept, for the next one.

    With as many devices as here, it takes what was compiled here.
    """
    xla_flags = os.environ["XLA_FLAGS"].replace("count=8", f"count={num_devices}")
    added = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "XLA_FLAGS": xla_flags}
    cache = f"--compilation_cache_dir={jax.config.jax_compilation_cache_dir}"
    return subprocess.Popen(
        [sys.executable, *python, str(ROOT / "train.py"), *as_flags(config), cache, *flags],
        env=os.environ | added | dict(environment),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition, process, seconds=240):
    """Waits for a condition while a process runs."""
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    raise TimeoutError


def processes_of(session):
    """Numbers of the processes of a session that are not zombies."""
    numbers = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            numbers.append(int(stat.parent.name))
    return numbers


def wait_until_gone(session, seconds=10):
    """multiprocessing's own helper ends a moment after the process that it served."""
    deadline = time.monotonic() + seconds
    while left := processes_of(session):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def free_port(low=0, high=0):
    """A port that no process listens on, of low, ..., high if they are given."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):  # in use, or was just now
            probe.bind(("127.0.0.1", random.randint(low, high)))
            return probe.getsockname()[1]


def finish(processes, code=0):
    """What the processes printed, when all have ended with `code`."""
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), outputs
    return outputs


def slurm_environments():
    """What Slurm says to each of two processes; jax takes its port from the job's number."""
    port = free_port(61_440, 65_535)
    common = {"SLURM_JOB_ID": str(port - 61_440), "SLURM_STEP_NODELIST": "127.0.0.1",
              "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "1"}  # fmt: skip
    return [common | {"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)} for n in range(2)]


def manifest_rows(folder):
    """The rows of its manifest.jsonl."""
    return [row for _, row in read_json_lines(folder / "manifest.jsonl")]
