"""Codec configs by name: the published architectures, and a small one for experiments."""

import dataclasses
from pathlib import Path
from typing import Any

from moss_tok import summary
from moss_tok.codec.config import (
    CodecConfig,
    ModuleConfig,
    PatchConfig,
    QuantizerConfig,
    TransformerConfig,
    read_codec_config,
)
from moss_tok.errors import check_choice


def _stack(
    patches: tuple[int, ...],
    rows: list[tuple[int, int, int, int, int, int, float]],
    layout: str,
    layer_scale: float = 0.01,
) -> tuple[ModuleConfig, ...]:
    """An encoder: a patch module before each stage; remaining patch sizes follow the last stage.

    Rows are (input_dim, output_dim, model_dim, num_heads, num_layers, mlp_dim, context_seconds).
    """
    modules: list[ModuleConfig] = []
    for patch_size, row in zip(patches, rows, strict=False):
        modules.append(PatchConfig(patch_size))
        stage = TransformerConfig(*row, layer_scale=layer_scale)
        # The v1 classes have a projection only if it changes the width.
        if layout == "v1":
            stage = dataclasses.replace(
                stage,
                input_projection=stage.input_dim != stage.model_dim,
                output_projection=stage.output_dim != stage.model_dim,
            )
        modules.append(stage)
    for patch_size in patches[len(rows) :]:
        modules.append(PatchConfig(patch_size))
    return tuple(modules)


def mirror(modules: tuple[ModuleConfig, ...]) -> tuple[ModuleConfig, ...]:
    """The decoder of an encoder: its modules in reverse order, with inputs and outputs swapped."""
    mirrored: list[ModuleConfig] = []
    for module in reversed(modules):
        if isinstance(module, TransformerConfig):
            module = dataclasses.replace(
                module,
                input_dim=module.output_dim,
                output_dim=module.input_dim,
                input_projection=module.output_projection,
                output_projection=module.input_projection,
            )
        mirrored.append(module)
    return tuple(mirrored)


def _quantizer(latents_dim: int, rvq_dim: int, num_quantizers: int) -> QuantizerConfig:
    return QuantizerConfig(
        input_dim=latents_dim,
        rvq_dim=rvq_dim,
        output_dim=latents_dim,
        num_quantizers=num_quantizers,
        codebook_size=1024,
        codebook_dim=8,
    )


def _v1() -> CodecConfig:
    rows = [
        (240, 384, 768, 12, 12, 3072, 10.0),
        (768, 384, 768, 12, 12, 3072, 10.0),
        (768, 640, 768, 12, 12, 3072, 10.0),
        (1280, 768, 1280, 20, 32, 5120, 10.0),
    ]
    encoder = _stack((240, 2, 2, 2), rows, "v1")
    return CodecConfig(
        sample_rate=24000,
        num_channels=1,
        encoder=encoder,
        quantizer=_quantizer(latents_dim=768, rvq_dim=512, num_quantizers=32),
        decoder=mirror(encoder),
        layout="v1",
    )


def _v2() -> CodecConfig:
    rows = [
        (240, 384, 768, 12, 12, 3072, 1.0),
        (768, 384, 768, 12, 12, 3072, 2.0),
        (768, 384, 768, 12, 12, 3072, 4.0),
        (768, 384, 768, 12, 12, 3072, 8.0),
        (768, 640, 768, 12, 12, 3072, 10.0),
        (1280, 768, 1280, 20, 32, 5120, 10.0),
    ]
    encoder = _stack((240, 2, 2, 2, 2, 2), rows, "v2")
    return CodecConfig(
        sample_rate=48000,
        num_channels=2,
        encoder=encoder,
        quantizer=_quantizer(latents_dim=768, rvq_dim=512, num_quantizers=32),
        decoder=mirror(encoder),
        layout="v2",
    )


def _nano() -> CodecConfig:
    rows = [
        (240, 384, 256, 4, 4, 1024, 4.0),
        (768, 384, 256, 4, 2, 1024, 6.0),
        (768, 384, 256, 4, 2, 1024, 8.0),
        (768, 192, 256, 4, 4, 1024, 10.0),
    ]
    encoder = _stack((240, 2, 2, 2, 4), rows, "v2")
    return CodecConfig(
        sample_rate=48000,
        num_channels=2,
        encoder=encoder,
        quantizer=_quantizer(latents_dim=768, rvq_dim=512, num_quantizers=16),
        decoder=mirror(encoder),
        layout="v2",
    )


def _tiny() -> CodecConfig:
    # 50 Hz, because at 12.5 Hz a model this small cannot represent phase, and therefore pitch.
    rows = [
        (240, 160, 128, 2, 2, 384, 1.0),
        (320, 256, 192, 3, 2, 512, 1.0),
    ]
    encoder = _stack((240, 2), rows, "v1", layer_scale=0.1)
    return CodecConfig(
        sample_rate=24000,
        num_channels=1,
        encoder=encoder,
        quantizer=_quantizer(latents_dim=256, rvq_dim=96, num_quantizers=16),
        decoder=mirror(encoder),
        layout="v1",
    )


_PRESETS = {"v1": _v1, "v2": _v2, "nano": _nano, "tiny": _tiny}
PRESETS = tuple(_PRESETS)


def preset(name: str) -> CodecConfig:
    """Returns the config of a codec by name.

    Args:
      name: "v1" (24 kHz mono), "v2" or "nano" (48 kHz stereo) as published, or "tiny" (24 kHz mono,
        small enough to train on a CPU).

    Raises:
      ValueError: There is no preset of that name.
    """
    check_choice("preset", name, PRESETS)
    return _PRESETS[name]()


def load_codec_config(model: str) -> CodecConfig:
    """Returns the codec config of `--model`: a preset, or the path of a config.json of moss_tok.

    Raises:
      ValueError: `model` is neither, or the file is broken.
    """
    if model in PRESETS:
        return preset(model)
    path = Path(model)
    if not path.is_file():
        raise ValueError(
            f"model must be one of {', '.join(PRESETS)} or a config.json, got {model!r}"
        )
    return read_codec_config(path)


def describe(config: Any) -> str:
    """A line that describes a codec: its preset, or else its encoder's stages, and its rates."""
    if not isinstance(config, CodecConfig):  # JAX builds pytrees with placeholders
        return type(config).__name__
    quantizer = config.quantizer
    levels = summary.count(quantizer.num_quantizers, "quantizer")
    parts = [
        _preset_name(config) or _stages(config),
        f"{config.sample_rate} Hz",
        summary.count(config.num_channels, "channel"),
        f"{config.frame_rate:g} frames/s",
        f"{levels} of {quantizer.codebook_size} codes",
    ]
    return ", ".join(parts)


def _preset_name(config: CodecConfig) -> str:
    """The preset that `config` equals; "" if none. Fields for conversion only are ignored."""
    for name in PRESETS:
        candidate = preset(name)
        if dataclasses.replace(config, layout=candidate.layout, official_json="") == candidate:
            return name
    return ""


def _stages(config: CodecConfig) -> str:
    parts = []
    for module in config.encoder:
        if isinstance(module, PatchConfig):
            parts.append(f"patch {module.patch_size}")
        else:
            parts.append(f"{summary.count(module.num_layers, 'layer')} of {module.model_dim}")
    return " - ".join(parts)
