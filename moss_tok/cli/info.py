"""Prints the modules, parameters, rates and bitrates of a codec, and what it was trained on."""

import argparse
import math
from typing import Any

EXAMPLE = "moss-tok info nano"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "checkpoint",
        nargs="?",
        metavar="C",
        help="checkpoint, training workdir, official directory, Hugging Face Hub id or preset name "
        "(default: the small codec that comes with moss_tok)",
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from pathlib import Path

    from moss_tok import assets, checkpoint
    from moss_tok.codec import presets, pretrained

    if args.checkpoint in presets.PRESETS and not Path(args.checkpoint).exists():
        config = presets.preset(args.checkpoint)
        training = {}
    else:
        folder = checkpoint.find_checkpoint(args.checkpoint)
        config = pretrained.load_config(folder)
        training = checkpoint.read_training(folder)
    lines = describe(config, pretrained.param_shapes(config)) + describe_training(training)
    if args.checkpoint is None:
        lines.append(f"{'note':<13} {assets.NOTE}")
    print("\n".join(lines))


def describe(config: Any, shapes: dict[str, Any]) -> list[str]:
    """Lines that describe a codec whose parameters have `shapes`."""
    lines = [
        f"sample rate   {config.sample_rate} Hz, {config.num_channels} channel(s)",
        f"frame rate    {config.frame_rate:g} Hz, hop_length {config.hop_length} samples",
        f"bitrate       {config.bitrate(1):g} to {config.bitrate():g} bit/s, "
        f"{config.bitrate(1):g} per quantizer",
        f"parameters    {_count(shapes):,}",
    ]
    lines += _describe_side(config, "encoder", shapes["encoder"])
    lines += _describe_quantizer(config.quantizer, shapes["quantizer"])
    lines += _describe_side(config, "decoder", shapes["decoder"])
    return lines


def _describe_side(config: Any, side: str, shapes: dict[str, Any]) -> list[str]:
    lines = [f"{side:<13} {_count(shapes):,} parameters"]
    modules = getattr(config, side)
    rows = zip(modules, config.windows(side), config.stage_rates(side), strict=True)
    for i, (module, window, rate) in enumerate(rows):
        lines.append(f"  {i}  {_describe_module(module, window, rate)}")
    return lines


def _describe_quantizer(quantizer: Any, shapes: dict[str, Any]) -> list[str]:
    bits = math.log2(quantizer.codebook_size)
    return [
        f"quantizer     {_count(shapes):,} parameters",
        f"  {quantizer.num_quantizers} codebooks of {quantizer.codebook_size} x "
        f"{quantizer.codebook_dim} ({bits:g} bits), width {quantizer.input_dim} -> "
        f"{quantizer.rvq_dim} -> {quantizer.output_dim}",
    ]


def _describe_module(module: Any, window: int | None, rate: float) -> str:
    if window is None:
        return f"patch {module.patch_size}"
    return (
        f"transformer {module.input_dim} -> {module.model_dim} -> {module.output_dim}, "
        f"{module.num_layers} layers, {module.num_heads} heads, mlp {module.mlp_dim}, "
        f"{rate:g} Hz, window {window} frames ({window / rate:g} s)"
    )


def describe_training(training: dict[str, Any]) -> list[str]:
    """Lines about what produced a checkpoint: the fields of training.json, all optional."""
    if not training:
        return []
    lines = [f"trained       {training.get('steps')} steps, seed {training.get('seed')}"]
    if machine := training.get("machine"):
        lines.append(
            f"  machine     {machine['num_devices']} x {machine['device']}, "
            f"{machine['num_cores']} cores, {machine['processor']}"
        )
    for source in training.get("train_data", []):
        lines.append(f"  data        {_describe_source(source)}")
        for licence, minutes in source.get("licences", {}).items():
            lines.append(f"              {minutes:g} minutes: {licence}")
    for name, value in training.get("flags", {}).items():
        lines.append(f"  --{name}={value}")
    if start := training.get("init_from"):
        lines.append(f"started from  {start['name']}")
        lines += describe_training({key: value for key, value in start.items() if key != "name"})
    return lines


def _describe_source(source: dict[str, Any]) -> str:
    parts = [source["name"]]
    if "weight" in source:
        parts.append(f"weight {source['weight']:g}")
    if "minutes" in source:
        parts.append(f"{source['recordings']} recordings, {source['minutes']:g} minutes")
    if "sha256" in source:
        parts.append(f"sha256 {source['sha256']}")
    return ", ".join(parts)


def _count(shapes: Any) -> int:
    """Number of parameters."""
    if isinstance(shapes, dict):
        return sum(map(_count, shapes.values()))
    return math.prod(shapes.shape)
