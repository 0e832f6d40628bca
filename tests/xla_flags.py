"""Flags of XLA for tests on CPUs, and the folder of compiled programs; imported before jax."""

import atexit
import os
import shutil
import tempfile
from importlib.metadata import version


def for_cpus() -> str:
    """Eight devices; and most of the time goes into compiling, so it is told not to try hard."""
    flags = [
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
    jaxlib = version("jaxlib")
    if jaxlib < "0.11.1":  # later versions do not know them
        flags.append("--xla_cpu_use_fusion_emitters=false")
        flags.append("--xla_cpu_parallel_codegen_split_count=1")
    elif jaxlib < "0.12":  # for steps that are jitted without `sharding.compiler_options`
        flags.append("--xla_cpu_multi_thread_eigen=false")
    return " ".join(flags)


def cache_folder() -> str:
    """A folder that this process removes; in a worker of pytest-xdist, that of its main process."""
    inherited = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if inherited and "PYTEST_XDIST_WORKER" in os.environ:
        return inherited
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
