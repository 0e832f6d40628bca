"""The content of training.json beside the weights of a checkpoint: how it was produced.

It has the settings of the run (flags, seed), its data with licences, the machine, and the weights
that it started from. Each checkpoint adds its number of steps. `moss-tok convert` copies the file.
"""

import collections
import hashlib
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from moss_tok import checkpoint, settings, storage
from moss_tok.data import sources
from moss_tok.json_files import format_json, parse_json_object, read_lines
from moss_tok.training.config import TrainConfig

_OWN_ENTRIES = ("seed", "train_data", "init_from")  # flags with entries outside "flags"


def describe(config: TrainConfig) -> dict[str, Any]:
    """The fields of training.json in the checkpoints of a run."""
    fields = {
        "flags": _changed_flags(config),
        "seed": config.run.seed,
        "train_data": _describe_data(config.data.train_data),
        "machine": _describe_machine(),
        "versions": {name: version(name) for name in ("jax", "flax", "optax")},
    }
    if config.run.init_from:
        fields["init_from"] = _describe_start(config.run.init_from)
    return fields


def _changed_flags(config: TrainConfig) -> dict[str, Any]:
    """The flags that change the result and do not have their default value."""
    values = settings.flatten(config)
    flags = {}
    for field in settings.leaf_fields_of(config):
        value = values[field.name]
        is_default = value == settings.flag_default(field)
        if not field.metadata["free"] and not is_default and field.name not in _OWN_ENTRIES:
            flags[field.name] = checkpoint.short_name(value)
    return flags


def _describe_data(train_data: str) -> list[dict[str, Any]]:
    if not train_data:
        return [{"name": "synthetic sounds"}]
    descriptions = []
    for name, weight in sources.parse(train_data):
        descriptions.append(_describe_source(name, weight))
    return descriptions


def _describe_source(name: str, weight: float | None) -> dict[str, Any]:
    fields: dict[str, Any] = {"name": os.path.basename(name.rstrip("/"))}
    if weight is not None:
        fields["weight"] = weight
    path = storage.to_path(name)
    if path.is_file() and path.suffix == ".jsonl":
        fields["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        fields |= _summarize_manifest(read_lines(path))
    return fields


def _summarize_manifest(lines: list[str]) -> dict[str, Any]:
    """Number, minutes and licences (with the minutes of each) of the recordings for training."""
    num_recordings = 0
    minutes: dict[str, float] = collections.Counter()  # by licence
    for line in lines:
        if not line.strip():
            continue
        row = parse_json_object(line)
        if (row.get("split") or "train") == "train":
            num_recordings += 1
            licence = row.get("licence") or row.get("license") or "not stated"
            minutes[str(licence)] += (row.get("duration_s") or 0) / 60
    return {
        "recordings": num_recordings,
        "minutes": round(sum(minutes.values()), 1),
        "licences": {licence: round(minutes[licence], 1) for licence in sorted(minutes)},
    }


def _describe_machine() -> dict[str, Any]:
    return {
        "device": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
        "num_cores": os.cpu_count(),
        "processor": _processor(),
    }


def _processor() -> str:
    """The name of the processor where Linux tells it, otherwise its architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _describe_start(init_from: str) -> dict[str, Any]:
    """The name of the weights that a run starts from, and their training.json if there is one."""
    fields = {"name": os.path.basename(init_from.rstrip("/"))}
    try:
        folder = checkpoint.find_checkpoint(init_from)
        return fields | checkpoint.read_training(folder)
    except (ValueError, OSError):  # a resumed run does not need the weights any more
        return fields


def to_text(fields: dict[str, Any], steps: int) -> str:
    """The text of training.json in the checkpoint after some steps."""
    return format_json({"steps": steps} | fields)
