"""Prints versions, devices and missing extras, and tests encode and decode on this machine.

Paste all of its output into a bug report. The test encodes and decodes with a tiny codec whose
codes and audio are known. It fails, with exit code 1, if this machine gives other codes or other
audio, if a stream gives other codes than encoding all at once, or if the weights of the codec in
the package are damaged.
"""

import argparse
import importlib.metadata
from collections.abc import Iterator
from typing import Any

EXAMPLE = "moss-tok doctor"

_PACKAGES = ("jax", "jaxlib", "flax", "orbax-checkpoint", "numpy", "scipy", "librosa", "soundfile",
             "soxr", "safetensors", "grain", "optax")  # fmt: skip
_VARIABLES = ("JAX_", "XLA_", "TPU_", "LIBTPU_", "CUDA_VISIBLE", "MOSS_TOK_")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments: none."""
    del parser


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    del args
    for lines in (_describe_system(), _describe_packages(), _describe_extras()):
        _print(lines)
    plugins = _plugins()
    try:
        import jax

        devices = jax.devices()
    except Exception as error:  # of a plugin, of any class
        _print([("devices", f"jax cannot start: {' '.join(str(error).split())[:500]}")])
        _print(_describe_plugins(plugins))
        _print([("self-test", "FAILED: there is no device to run on")])
        return 1
    _print(_describe_devices(devices))
    _print(_describe_plugins(plugins))
    if all(device.platform == "cpu" for device in devices):
        _print(_explain_cpus(plugins))
    return _run_self_test()


def _print(lines: Any) -> None:
    """Prints (name, text) pairs, now, because the next part may take long or end the process."""
    for name, text in lines:
        print(f"{name:<11} {text}", flush=True)


def _describe_system() -> Iterator[tuple[str, str]]:
    import os
    import platform
    from pathlib import Path

    from moss_tok import version

    folder = str(Path(version.__file__).parent)
    home = str(Path.home())
    if folder.startswith(home + os.sep):  # hides the name of the user
        folder = "~" + folder.removeprefix(home)
    yield "moss_tok", f"{version.__version__} in {folder}"
    python = platform.python_version()
    yield "Python", f"{python} ({platform.python_implementation()}), {platform.platform()}"
    yield "machine", f"{platform.machine()}, {os.cpu_count()} cores{_memory()}"
    for name in sorted(os.environ):
        if name.startswith(_VARIABLES):
            yield "environment", f"{name}={os.environ[name]}"


def _memory() -> str:
    import os

    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on this system
        return ""
    return f", {size / 2**30:.0f} GiB of memory"


def _describe_packages() -> Iterator[tuple[str, str]]:
    installed = []
    for name in _PACKAGES:
        version = _version(name)
        if version:
            installed.append(f"{name} {version}")
    yield "packages", ", ".join(installed)


def _version(package: str) -> str:
    """The version of an installed package; "" if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _describe_extras() -> Iterator[tuple[str, str]]:
    from moss_tok import extras

    complete = [name for name in extras.EXTRAS if not extras.missing(name)]
    yield "extras", f"installed: {', '.join(complete) or 'none'}"
    for name, extra in extras.EXTRAS.items():
        if name not in complete:
            yield "", f"for {extra.purpose}: {extras.install(name)}"


def _describe_devices(devices: list[Any]) -> Iterator[tuple[str, str]]:
    kinds = sorted({device.device_kind for device in devices})
    number = len(devices)
    yield "devices", f"{number} x {', '.join(kinds)}, platform {devices[0].platform}"


def _plugins() -> dict[str, str]:
    """The versions of the installed plugins of accelerators, by package."""
    import re

    pattern = re.compile(r"libtpu|jax[-_](cuda|rocm)\d*[-_](plugin|pjrt)")
    versions = {}
    for distribution in importlib.metadata.distributions():
        name = (distribution.name or "").lower()
        if pattern.fullmatch(name):
            versions[name] = distribution.version
    return versions


def _describe_plugins(plugins: dict[str, str]) -> Iterator[tuple[str, str]]:
    names = [f"{name} {plugins[name]}" for name in sorted(plugins)]
    yield "plugins", ", ".join(names) or "none"


def _explain_cpus(plugins: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Why jax may see CPUs only."""
    import glob

    from moss_tok import sharding

    has_gpu_plugin = any("cuda" in name for name in plugins)
    if glob.glob("/dev/nvidia[0-9]*") and not has_gpu_plugin:
        yield "", "this machine has an NVIDIA GPU, but jax cannot use it: pip install 'jax[cuda13]'"
    if sharding.has_tpu_chips() and "libtpu" not in plugins:
        yield "", "this machine has a TPU, but jax cannot use it: pip install 'jax[tpu]'"
    if plugins:
        yield "", "a plugin is installed, but jax sees only CPUs: is JAX_PLATFORMS set, is the"
        yield "", "accelerator used by another process, or is its driver too old?"


def _run_self_test() -> int:
    """Tests the codec of the package; returns the exit code."""
    import time

    from moss_tok.cli import selftest

    start = time.perf_counter()
    failed = False
    try:
        for passed, text in selftest.run():
            _print([("self-test", f"{'ok' if passed else 'FAILED'}: {text}")])
            failed |= not passed
    except Exception as error:
        reason = " ".join(str(error).split())[:500]
        _print([("self-test", f"FAILED: {type(error).__name__}: {reason}")])
        failed = True
    _print([("", f"took {time.perf_counter() - start:.1f} s; most of it is compilation")])
    return 1 if failed else 0
