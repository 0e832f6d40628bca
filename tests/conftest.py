"""Shared fixtures: eight fake CPU devices, the golden models and a tiny one of our own."""

import os
import tempfile
from importlib.metadata import version

os.environ["JAX_PLATFORMS"] = os.environ.get("MOSS_TOK_TEST_PLATFORM", "cpu")
# Eight devices; and most of the time goes into compiling, so it is told not to try hard.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
    # jax 0.12 has no such flag.
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib") < "0.12" else ""),
)

# Equal programs are compiled once, also by the processes that tests start.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp()
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import atexit
import dataclasses
import functools
import gc
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import moss_tok
from moss_tok.codec import init as codec_init
from moss_tok.codec.config import CodecConfig, PatchConfig, QuantizerConfig, TransformerConfig
from moss_tok.codec.presets import mirror
from moss_tok.training import state as states

gc.set_threshold(100_000, 50, 50)  # tracing makes objects by the million, few of them in cycles


@functools.partial(jax.jit, static_argnums=0)
def init_params(config):
    """Fresh parameters of a codec; op by op it takes longer."""
    return codec_init.init_params(config, jax.random.key(0))


init_state = jax.jit(states.init_state, static_argnums=(0, 1, 4))  # op by op it takes longer

atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

GOLDEN = Path(__file__).parent / "golden"
CORPUS = Path(__file__).parents[2] / "shared" / "corpus"


@pytest.fixture(scope="session")
def golden_dir():
    return GOLDEN


@pytest.fixture(scope="session")
def v1_tiny():
    return moss_tok.load(GOLDEN / "v1_tiny")


@pytest.fixture(scope="session")
def nano_tiny():
    return moss_tok.load(GOLDEN / "nano_tiny")


def micro_config(**changes) -> CodecConfig:
    """A few thousand parameters at 8 kHz, 16 samples per frame, windows of 6 and 3 frames."""
    encoder = (
        PatchConfig(8),
        TransformerConfig(8, 6, 16, 2, 2, 32, 0.006, layer_scale=0.5),
        PatchConfig(2),
        TransformerConfig(12, 8, 16, 2, 1, 32, 0.006, layer_scale=0.5),
    )
    quantizer = QuantizerConfig(8, 6, 8, 4, 16, 3)
    config = CodecConfig(8000, 1, encoder, quantizer, mirror(encoder), "v1")
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="session")
def micro():
    """A codec of `micro_config` with random weights."""
    config = micro_config()
    return moss_tok.Codec(init_params(config), config)


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


def leaves_equal(a, b) -> bool:
    """Whether two trees hold the same values, bit for bit."""
    same = jax.tree.map(lambda x, y: np.array_equal(x, y), a, b)
    return all(jax.tree.leaves(same))
