"""Shared fixtures: eight fake CPU devices, the golden models and a tiny one of our own."""

import os

import xla_flags

os.environ["JAX_PLATFORMS"] = os.environ.get("MOSS_TOK_TEST_PLATFORM", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ.setdefault("XLA_FLAGS", xla_flags.for_cpus())
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # processes share a GPU

# Equal programs are compiled once, by all workers and the processes that tests start.
os.environ["JAX_COMPILATION_CACHE_DIR"] = xla_flags.cache_folder()
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"

import gc
import shutil
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile
from absl import logging
from helpers import (
    GOLDEN,
    ROOT,
    code_noise,
    forget_programs,
    init_params,
    micro_config,
    sgd_for_adam,
    write_wav,
)

import moss_tok
from moss_tok.cli import main as command_line
from moss_tok.codec import presets
from moss_tok.codec.config import CodecConfig, QuantizerConfig
from moss_tok.language import config as language_config

for folder in ("tpu_scripts", "experiments", "experiments/scaling", "experiments/examples"):
    sys.path.append(str(ROOT / folder))
gc.set_threshold(100_000, 50, 50)  # tracing makes objects by the million, few of them in cycles


def pytest_configure(config):
    """Starts jax while output is not captured: an unknown flag in XLA_FLAGS ends the process."""
    distributes = getattr(config.option, "numprocesses", None)
    if distributes and os.environ["JAX_PLATFORMS"] != "cpu":
        return  # a TPU belongs to one process, here the worker
    with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        jax.devices()


# The files that take longest begin first, so that both workers end together.
LONGEST = (
    "training_test.py", "run_test.py", "processes_test.py", "speech_training_test.py",
    "semantic_test.py", "streaming_test.py", "sharding_test.py", "storage_test.py",
    "code_training_test.py", "tokenize_test.py", "evaluate_test.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


@pytest.fixture
def sgd():
    """Trains by SGD in place of Adam; what was traced with it is forgotten."""
    with sgd_for_adam():
        yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def golden_dir():
    return GOLDEN


@pytest.fixture(scope="session")
def v1_tiny():
    return moss_tok.load(GOLDEN / "v1_tiny")


@pytest.fixture(scope="session")
def nano_tiny():
    return moss_tok.load(GOLDEN / "nano_tiny")


@pytest.fixture(scope="session")
def micro():
    """A codec of `micro_config` with random weights."""
    config = micro_config()
    return moss_tok.Codec(init_params(config), config)


@pytest.fixture(scope="session")
def v2_micro():
    """The six stages and windows of v2, a hundredth as long, in stereo; random weights."""
    windows = (0.01, 0.02, 0.04, 0.08, 0.1, 0.1)
    rows = [(6 if i == 0 else 8, 8 if i == 5 else 4, 16, 2, 1, 32, windows[i]) for i in range(6)]
    encoder = presets._stack((6, 2, 2, 2, 2, 2), rows, "v2", layer_scale=0.5)
    quantizer = QuantizerConfig(8, 6, 8, 4, 16, 3)
    config = CodecConfig(9600, 2, encoder, quantizer, presets.mirror(encoder), "v2")
    return moss_tok.Codec(init_params(config), config)


@pytest.fixture(scope="module", params=["v1_tiny", "nano_tiny", "v2_micro"])
def whole(request):
    """A codec, audio of two streams, and what encode and decode make of all of it."""
    return code_noise(request.getfixturevalue(request.param))


@pytest.fixture(scope="session")
def _coded_recording(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coded")
    wav = 0.1 * np.random.default_rng(0).standard_normal(30000)
    soundfile.write(folder / "in.wav", wav, 24000)
    paths = [str(folder / name) for name in ("in.wav", "in.npz")]
    assert command_line.main(["encode", *paths, "--checkpoint", str(GOLDEN / "v1_tiny")]) == 0
    return folder


@pytest.fixture
def coded_folder(_coded_recording, tmp_path, monkeypatch):
    """A working directory with a recording `in.wav` and its codes `in.npz`."""
    shutil.copytree(_coded_recording, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def recordings(tmp_path):
    """A folder with a/one.wav, b/one.wav and c.wav."""
    for name in ("a/one.wav", "b/one.wav", "c.wav"):
        write_wav(tmp_path / name)
    return tmp_path


@pytest.fixture(scope="module")
def small_language_model():
    """Makes `language_model=tiny` a hundredth as large."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(language_config._SHAPES, "tiny", (16, 1, 2, 1, 24))
        yield


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    yield
    forget_programs()


@pytest.fixture(autouse=True)
def _restore_verbosity():
    """train.py shows errors only, also when a test runs it in its own process."""
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)


@pytest.fixture(autouse=True)
def _forget_programs_in_time():
    """A compiled training step takes 4,600 memory maps; a process may have 65,530."""
    began = time.process_time()
    yield
    if time.process_time() - began < 0.1:
        return  # it compiled next to nothing, and reading the maps takes several milliseconds
    if Path("/proc/self/maps").read_bytes().count(b"\n") > 30_000:
        forget_programs()


@pytest.fixture
def rng():
    return np.random.default_rng(0)
