"""The extras of the package: what each one adds, and the command that installs it.

`setup.py` lists the same packages with their versions. The commands work in a clone, too: pip finds
moss_tok installed and adds only the packages of the extra.
"""

import dataclasses
import importlib.util


@dataclasses.dataclass(frozen=True)
class Extra:
    """An extra of the package.

    Attributes:
      purpose: What it is for.
      modules: The modules that it installs, without those of `train`, which most extras include.
    """

    purpose: str
    modules: tuple[str, ...]


EXTRAS = {
    "train": Extra(
        "train.py, and moss-tok compare, evaluate, prepare, report and tokenize",
        ("array_record", "grain", "jinja2", "jiwer", "matplotlib", "msgpack", "optax",
         "tensorboardX"),
    ),
    "demo": Extra("moss-tok demo", ("aiohttp", "matplotlib")),
    "eval": Extra("PESQ and SDR in moss-tok evaluate", ("mir_eval", "pesq")),
    "export": Extra("moss-tok export", ("flatbuffers",)),
    "ffmpeg": Extra("m4a, mp4, aac, webm, mka, wma and other audio formats", ("av",)),
    "language": Extra("language and speech models with a tokenizer.json", ("tokenizers",)),
    "gcs": Extra("data and checkpoints in buckets, gs://", ("gcsfs",)),
    "beam": Extra("moss-tok prepare --runner, on many machines", ("apache_beam",)),
}  # fmt: skip


def install(name: str) -> str:
    """The command that installs an extra."""
    return f"pip install 'moss_tok[{name}]'"


def missing(name: str) -> list[str]:
    """The modules of an extra that are not installed."""
    return [module for module in EXTRAS[name].modules if not is_installed(module)]


def is_installed(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


def install_module(module: str) -> str:
    """The command that installs a module: its extra, or the package of the same name."""
    for name, extra in EXTRAS.items():
        if module in extra.modules:
            return install(name)
    return f"pip install {module}"
