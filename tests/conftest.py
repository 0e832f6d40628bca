"""Shared fixtures: eight fake CPU devices, the golden models and a tiny one of our own."""

import os
import tempfile

import xla_flags

os.environ["JAX_PLATFORMS"] = os.environ.get("MOSS_TOK_TEST_PLATFORM", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ.setdefault("XLA_FLAGS", xla_flags.for_cpus())
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # processes share a GPU

# Equal programs are compiled once, also by the processes that tests start.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp()
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import atexit
import gc
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import GOLDEN, init_params, micro_config

import moss_tok
from moss_tok.language import config as language_config

gc.set_threshold(100_000, 50, 50)  # tracing makes objects by the million, few of them in cycles

atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


def pytest_configure(config):
    """Starts jax while output is not captured: an unknown flag in XLA_FLAGS ends the process."""
    distributes = getattr(config.option, "numprocesses", None)
    if distributes and os.environ["JAX_PLATFORMS"] != "cpu":
        return  # a TPU belongs to one process, here the worker
    with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        jax.devices()


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


@pytest.fixture(scope="module")
def small_language_model():
    """Makes `language_model=tiny` a hundredth as large."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(language_config._SHAPES, "tiny", (16, 1, 2, 1, 24))
        yield


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def _forget_programs_in_time():
    """A compiled training step takes 4,600 memory maps; a process may have 65,530."""
    yield
    if Path("/proc/self/maps").read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()


@pytest.fixture
def rng():
    return np.random.default_rng(0)
