"""Prints the modules, parameters and rates of a codec or a speech model, and its training."""

import argparse
import math
from typing import Any

EXAMPLE = "moss-tok info nano"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "source",
        nargs="?",
        metavar="C",
        help="checkpoint, training workdir, official directory, Hugging Face Hub id or the name of "
        "a preset: v1, v2, nano, tiny, tts-1.7b (default: the small codec of the package)",
    )
    parser.add_argument("--checkpoint", metavar="C", help="the same, as other commands take it")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    if args.source and args.checkpoint:
        raise ValueError(
            f"give one checkpoint, got {args.source} and --checkpoint={args.checkpoint}"
        )
    print("\n".join(_describe(args.source or args.checkpoint)))


def _describe(name: str | None) -> list[str]:
    """Lines that describe a checkpoint, a preset, or by default the codec of the package."""
    from pathlib import Path

    from flax.linen import meta

    from moss_tok import assets, checkpoint
    from moss_tok.codec import presets, pretrained
    from moss_tok.speech import config as speech_configs
    from moss_tok.speech import pretrained as speech_pretrained

    def describe_speech_model(config: Any) -> list[str]:
        return describe_speech(config, meta.unbox(speech_pretrained.boxed_shapes(config)))

    if name is not None and not Path(name).exists():
        if name in presets.PRESETS:
            config = presets.preset(name)
            return describe(config, pretrained.param_shapes(config))
        if name in speech_configs.PUBLISHED:
            return describe_speech_model(speech_configs.published(name))
    folder = checkpoint.find_checkpoint(name)
    if speech_pretrained.is_speech(folder):
        lines = describe_speech_model(speech_pretrained.read_config(folder))
    else:
        config = pretrained.load_config(folder)
        lines = describe(config, pretrained.param_shapes(config))
    lines += _describe_training_of(folder)
    if name is None:
        lines.append(f"{'note':<13} {assets.NOTE}")
    return lines


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


def describe_speech(config: Any, shapes: dict[str, Any]) -> list[str]:
    """Lines that describe a speech model whose parameters have `shapes`."""
    bits = math.log2(config.codebook_size)
    bitrate = config.frame_rate * config.num_quantizers * bits
    in_adapters = _count(shapes["into_depth"]) + _count(shapes["out"])
    return [
        f"speech model  {config.layout} layout, {config.vocab_size} tokens, "
        f"{config.max_positions} positions",
        f"codes         {config.frame_rate:g} Hz, {config.num_quantizers} codebooks of "
        f"{config.codebook_size} ({bits:g} bits), up to {bitrate:g} bit/s",
        f"codec         {config.codec or 'not known'}",
        f"parameters    {_count(shapes):,}",
        _describe_stack("temporal", config.temporal, shapes),
        _describe_stack("depth", config.depth, shapes),
        f"adapters      {in_adapters:,} parameters with heads, mlp {config.adapter_dim}",
    ]


def _describe_stack(name: str, stack: Any, shapes: dict[str, Any]) -> str:
    return (
        f"{name:<13} {_count(shapes[name]):,} parameters, {stack.num_layers} layers of "
        f"{stack.model_dim}, {stack.num_heads} heads of {stack.head_dim} "
        f"({stack.num_kv_heads} of keys and values), mlp {stack.mlp_dim}"
    )


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


def _describe_training_of(folder: Any) -> list[str]:
    from moss_tok import checkpoint

    training = checkpoint.read_training(folder)
    try:
        return describe_training(training)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        path = folder / checkpoint.TRAINING_NAME
        raise ValueError(f"{path}: not as train.py writes it ({error!r})") from error


def describe_training(training: dict[str, Any]) -> list[str]:
    """Lines about what produced a checkpoint: the fields of training.json, all optional."""
    if not training:
        return []
    lines = [f"trained       {training.get('steps')} steps, seed {training.get('seed')}"]
    if machine := training.get("machine"):
        lines.append(
            f"  machine     {machine.get('num_devices')} x {machine.get('device')}, "
            f"{machine.get('num_cores')} cores, {machine.get('processor')}"
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
