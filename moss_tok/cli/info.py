"""Prints the modules, parameters, rates, bitrates and windows of a checkpoint or preset."""

import argparse
import math
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("checkpoint", metavar="C", help="checkpoint, official directory or preset")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from pathlib import Path

    from moss_tok.codec import presets, pretrained

    if args.checkpoint in presets.PRESETS and not Path(args.checkpoint).exists():
        config = presets.preset(args.checkpoint)
    else:
        config = pretrained.load_config(args.checkpoint)
    print("\n".join(describe(config, pretrained.param_shapes(config))))


def describe(config: Any, shapes: dict[str, Any]) -> list[str]:
    """Lines about a codec whose parameters have `shapes`."""
    quantizer = config.quantizer
    bits = math.log2(quantizer.codebook_size)
    lines = [
        f"sample rate   {config.sample_rate} Hz, {config.num_channels} channel(s)",
        f"frame rate    {config.frame_rate:g} Hz, hop_length {config.hop_length} samples",
        f"bitrate       {config.bitrate(1):g} to {config.bitrate():g} bit/s, "
        f"{config.bitrate(1):g} per quantizer",
        f"parameters    {_count(shapes):,}",
    ]
    for side in ("encoder", "decoder"):
        lines.append(f"{side:<13} {_count(shapes[side]):,} parameters")
        rows = zip(getattr(config, side), config.windows(side), config.stage_rates(side),
                   strict=True)  # fmt: skip
        for i, (module, window, rate) in enumerate(rows):
            lines.append(f"  {i}  {_module(module, window, rate)}")
        if side == "encoder":
            lines.append(f"quantizer     {_count(shapes['quantizer']):,} parameters")
            lines.append(
                f"  {quantizer.num_quantizers} codebooks of {quantizer.codebook_size} x "
                f"{quantizer.codebook_dim} ({bits:g} bits), width {quantizer.input_dim} -> "
                f"{quantizer.rvq_dim} -> {quantizer.output_dim}"
            )
    return lines


def _count(shapes: Any) -> int:
    if isinstance(shapes, dict):
        return sum(map(_count, shapes.values()))
    return math.prod(shapes.shape)


def _module(module: Any, window: int | None, rate: float) -> str:
    if window is None:
        return f"patch {module.patch_size}"
    return (
        f"transformer {module.input_dim} -> {module.model_dim} -> {module.output_dim}, "
        f"{module.num_layers} layers, {module.num_heads} heads, mlp {module.mlp_dim}, "
        f"{rate:g} Hz, window {window} frames ({window / rate:g} s)"
    )
