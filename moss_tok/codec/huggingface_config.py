"""The official config.json, read and written.

Source: config.json and configuration_moss_audio_tokenizer.py of OpenMOSS-Team/MOSS-Audio-Tokenizer.
The class defaults there are wrong (they upsample twice too far), so every key has to be present.
"""

import dataclasses
import json
import logging
from collections.abc import Iterable
from typing import Any

from moss_tok.codec.config import (
    CodecConfig,
    ModuleConfig,
    PatchConfig,
    QuantizerConfig,
    TransformerConfig,
)
from moss_tok.errors import is_number
from moss_tok.json_files import parse_json_object

_CLASSES = {
    "AutoConfig": "configuration_moss_audio_tokenizer.MossAudioTokenizerConfig",
    "AutoModel": "modeling_moss_audio_tokenizer.MossAudioTokenizerModel",
}
_REPOSITORY = "OpenMOSS-Team/MOSS-Audio-Tokenizer"

# Values a module may have besides its sizes; anything else is another architecture.
_FIXED = {
    "causal": (True,),
    "norm": ("layer_norm",),
    "positional_embedding": ("rope",),
    "gating": ("none",),
    "conv_layout": (True, False),
}
_SIZES = {
    "input_dimension": "input_dim",
    "output_dimension": "output_dim",
    "d_model": "model_dim",
    "num_heads": "num_heads",
    "num_layers": "num_layers",
    "dim_feedforward": "mlp_dim",
}
_OPTIONAL = {"layer_scale": "layer_scale", "max_period": "max_period"}
_QUANTIZER_TYPES = ("rlfq", "random_prefix_rlfq")
_TOP_KEYS = {
    "sampling_rate", "downsample_rate", "causal_transformer_context_duration", "encoder_kwargs",
    "decoder_kwargs", "quantizer_kwargs", "quantizer_type", "number_channels",
    "enable_channel_interleave",
    # Without effect on the model:
    "reversed_decoder_kwargs", "code_dim", "version", "sample_rate", "dtype", "torch_dtype",
    "architectures", "auto_map", "model_type", "transformers_version", "attention_implementation",
    "compute_dtype", "codec_weight_dtype", "_name_or_path", "return_dict",
}  # fmt: skip


def read_config(text: str, tensor_names: Iterable[str] | None = None) -> CodecConfig:
    """Reads an official config.json.

    Args:
      text: The file's content.
      tensor_names: Names of the tensors beside it. They tell the family and which stages have
        projections; without them, stereo configs or contexts per module mean "v2".

    Raises:
      ValueError: A key or value that is missing, unknown inside a module, or not supported.
    """
    fields = parse_json_object(text)
    required = ("sampling_rate", "downsample_rate", "encoder_kwargs", "decoder_kwargs")
    for key in (*required, "quantizer_kwargs"):
        if key not in fields:
            raise ValueError(f"config.json: missing key {key!r}")
    channels = fields.get("number_channels", 1)
    for key in ("sampling_rate", "downsample_rate", "number_channels"):
        value = fields.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            _unsupported("", key, value, ["a positive integer"])
    if channels != 1 and fields.get("enable_channel_interleave") is not True:
        _unsupported(
            "", "enable_channel_interleave", fields.get("enable_channel_interleave"), [True]
        )
    names = None if tensor_names is None else set(tensor_names)
    layout = _guess_layout(fields) if names is None else _layout_of(names)
    modules = [
        _read_modules(fields, side, layout, names, channels) for side in ("encoder", "decoder")
    ]
    quantizer = _read_quantizer(fields)
    try:
        config = CodecConfig(
            fields["sampling_rate"], channels, modules[0], quantizer, modules[1], layout, text
        )
    except ValueError as error:
        raise ValueError(f"config.json: {error}") from error
    if config.hop_length != fields["downsample_rate"]:
        _unsupported("", "downsample_rate", fields["downsample_rate"], [config.hop_length])
    for key in sorted(fields.keys() - _TOP_KEYS):
        logging.warning("config.json: key %r is not known and has no effect", key)
    return config


def _unsupported(where: str, key: str, value: Any, accepted: Iterable[Any]) -> None:
    accepted = ", ".join(json.dumps(a) for a in accepted)
    raise ValueError(
        f"config.json: {where}{key} = {json.dumps(value)} is not supported; accepted: {accepted}"
    )


def _check_keys(fields: dict[str, Any], known: set[str], where: str) -> None:
    for key in sorted(fields.keys() - known):
        raise ValueError(
            f"config.json: {where}{key} = {json.dumps(fields[key])} is not supported; "
            f"accepted keys: {', '.join(sorted(known))}"
        )


def _guess_layout(fields: dict[str, Any]) -> str:
    modules = [*fields["encoder_kwargs"], *fields["decoder_kwargs"]]
    own_context = any(isinstance(m, dict) and "context_duration" in m for m in modules)
    return "v2" if own_context or fields.get("number_channels", 1) != 1 else "v1"


def _layout_of(names: set[str]) -> str:
    return "v1" if any(".in_projs.0." in name for name in names) else "v2"


def _read_modules(fields, side, layout, names, channels) -> tuple[ModuleConfig, ...]:
    modules, stream_rate = fields[f"{side}_kwargs"], float(fields["sampling_rate"] * channels)
    if not isinstance(modules, list) or not all(isinstance(m, dict) for m in modules):
        raise ValueError(f"config.json: {side}_kwargs must be a list of modules")
    rate = stream_rate
    if side == "decoder":
        rate = fields["sampling_rate"] / fields["downsample_rate"]
    result = []
    for i, module in enumerate(modules):
        where = f"{side}_kwargs[{i}]."
        kind = module.get("module_type")
        if kind == "PatchedPretransform":
            result.append(_read_patch(module, where))
            factor = result[-1].patch_size
            rate = rate / factor if side == "encoder" else rate * factor
        elif kind == "Transformer":
            stage = _read_transformer(module, where, rate, fields)
            result.append(_with_projections(stage, f"{side}.{i}.", layout, names))
        else:
            _unsupported(where, "module_type", kind, ["PatchedPretransform", "Transformer"])
    return tuple(result)


def _read_patch(module: dict[str, Any], where: str) -> PatchConfig:
    _check_keys(module, {"module_type", "patch_size"}, where)
    return _build(PatchConfig, where, patch_size=module.get("patch_size"))


def _read_transformer(module, where, rate, fields) -> TransformerConfig:
    known = {"module_type", "context_duration"} | _FIXED.keys() | _SIZES.keys() | _OPTIONAL.keys()
    _check_keys(module, known, where)
    for key in _SIZES:
        if key not in module:
            raise ValueError(f"config.json: {where}{key} is missing")
    for key, accepted in _FIXED.items():
        if module.get(key, accepted[0]) not in accepted:
            _unsupported(where, key, module[key], accepted)
    sizes = {ours: module[key] for key, ours in _SIZES.items()}
    sizes |= {ours: module[key] for key, ours in _OPTIONAL.items() if key in module}
    context = module.get("context_duration")
    if context is None:
        context = fields.get("causal_transformer_context_duration")
        if not is_number(context) or not 0 < context < 1e6:
            _unsupported("", "causal_transformer_context_duration", context, ["a positive number"])
        context = int(rate * context) / rate  # the v1 classes round down
    return _build(TransformerConfig, where, **sizes, context_seconds=float(context))


def _build(cls: type, where: str, **sizes: Any) -> Any:
    try:
        return cls(**sizes)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config.json: {where[:-1]}: {error}") from error


def _with_projections(stage, prefix, layout, names) -> TransformerConfig:
    square = {s: getattr(stage, f"{s}_dim") == stage.model_dim for s in ("input", "output")}
    has = {}
    for side, name in (("input", "input_proj"), ("output", "output_proj")):
        if names is not None and square[side]:
            has[f"{side}_projection"] = f"{prefix}{name}.weight" in names
        else:
            has[f"{side}_projection"] = layout == "v2" or not square[side]
    return dataclasses.replace(stage, **has)


def _read_quantizer(fields: dict[str, Any]) -> QuantizerConfig:
    kwargs = fields["quantizer_kwargs"]
    if not isinstance(kwargs, dict):
        raise ValueError("config.json: quantizer_kwargs must be an object")
    kind = kwargs.get("quantizer_type", fields.get("quantizer_type"))
    if kind not in _QUANTIZER_TYPES:
        _unsupported("", "quantizer_type", kind, _QUANTIZER_TYPES)
    names = [f.name for f in dataclasses.fields(QuantizerConfig)]
    _check_keys(kwargs, {*names, "quantizer_type"}, "quantizer_kwargs.")
    for key in names:
        if key not in kwargs:
            raise ValueError(f"config.json: quantizer_kwargs.{key} is missing")
    return _build(QuantizerConfig, "quantizer_kwargs.", **{k: kwargs[k] for k in names})


def write_config(config: CodecConfig, dtype: str) -> str:
    """The official config.json of a codec: every key of the original, or made from the config.

    `auto_map` names the official repository, so that
    `AutoModel.from_pretrained(path, trust_remote_code=True)` finds the classes online.
    """
    fields = parse_json_object(config.official_json) if config.official_json else _fields(config)
    auto_map = fields.get("auto_map") or {}
    repository = _REPOSITORY
    if config.layout == "v2":
        ends_in_patch = isinstance(config.encoder[-1], PatchConfig)
        repository += "-Nano" if ends_in_patch else "-v2"
    for key, name in _CLASSES.items():
        name = auto_map.get(key, name)
        auto_map[key] = name if "--" in name else f"{repository}--{name}"
    fields["auto_map"] = auto_map
    fields["dtype"] = dtype
    return json.dumps(fields, indent=2) + "\n"


def _fields(config: CodecConfig) -> dict[str, Any]:
    quantizer = dataclasses.asdict(config.quantizer) | {"quantizer_type": "rlfq"}
    contexts = {
        m.context_seconds
        for m in (*config.encoder, *config.decoder)
        if isinstance(m, TransformerConfig)
    }
    if config.layout == "v1" and len(contexts) > 1:
        raise ValueError(
            "the official v1 layout has one context for all stages, this codec has "
            f"{', '.join(f'{c:g}' for c in sorted(contexts))} s; train it with layout v2"
        )
    fields = {
        "architectures": ["MossAudioTokenizerModel"],
        "model_type": "moss-audio-tokenizer",
        "sampling_rate": config.sample_rate,
        "sample_rate": config.sample_rate,
        "downsample_rate": config.hop_length,
        "causal_transformer_context_duration": max(contexts, default=10.0),
        "code_dim": config.quantizer.output_dim,
        "encoder_kwargs": [_module_fields(m, config.layout) for m in config.encoder],
        "decoder_kwargs": [_module_fields(m, config.layout) for m in config.decoder],
        "quantizer_type": "rlfq",
        "quantizer_kwargs": quantizer,
    }
    if config.layout == "v2":
        fields["number_channels"] = config.num_channels
        fields["enable_channel_interleave"] = True
    return fields


def _module_fields(module: ModuleConfig, layout: str) -> dict[str, Any]:
    if isinstance(module, PatchConfig):
        return {"module_type": "PatchedPretransform", "patch_size": module.patch_size}
    fields = {"module_type": "Transformer"}
    fields |= {key: getattr(module, ours) for key, ours in (_SIZES | _OPTIONAL).items()}
    fields |= {key: accepted[0] for key, accepted in _FIXED.items()}
    if layout == "v2":
        fields["context_duration"] = module.context_seconds
    return fields
