"""Reads and writes the official config.json.

Source: config.json and configuration_moss_audio_tokenizer.py of OpenMOSS-Team/MOSS-Audio-Tokenizer.
The class defaults there are wrong (they upsample by a factor of two too much), so every key must be
present.
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

# Accepted values of the keys of a module that are not sizes; others mean another architecture.
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
# Our own key: tensors that are identity matrices, because the classes of layout v2 have projections
# in every stage and this codec has not.
IDENTITIES = "identity_projections"
_QUANTIZER_TYPES = ("rlfq", "random_prefix_rlfq")
_TOP_KEYS = {
    "sampling_rate", "downsample_rate", "causal_transformer_context_duration", "encoder_kwargs",
    "decoder_kwargs", "quantizer_kwargs", "quantizer_type", "number_channels",
    "enable_channel_interleave",
    # Keys that do not affect the model:
    "reversed_decoder_kwargs", "code_dim", "version", "sample_rate", "dtype", "torch_dtype",
    "architectures", "auto_map", "model_type", "transformers_version", "attention_implementation",
    "compute_dtype", "codec_weight_dtype", "_name_or_path", "return_dict", IDENTITIES,
}  # fmt: skip


def read_config(text: str, tensor_names: Iterable[str] | None = None) -> CodecConfig:
    """Reads an official config.json.

    Args:
      text: The file's content.
      tensor_names: Names of the tensors beside it. They determine the layout and which stages have
        projections; without them, a stereo codec or a context per module means "v2".

    Raises:
      ValueError: A key is missing or, inside a module, unknown; or a value is not supported.
    """
    fields = parse_json_object(text)
    if str(fields.get("model_type")).startswith("moss_tts"):
        raise ValueError("config.json: this is a speech model, not a codec")
    required = ("sampling_rate", "downsample_rate", "encoder_kwargs", "decoder_kwargs")
    for key in (*required, "quantizer_kwargs"):
        if key not in fields:
            raise ValueError(f"config.json: missing key {key!r}")
    channels = fields.get("number_channels", 1)
    for key in ("sampling_rate", "downsample_rate", "number_channels"):
        value = fields.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            _raise_unsupported("", key, value, ["a positive integer"])
    interleaved = fields.get("enable_channel_interleave")
    if channels != 1 and interleaved is not True:
        _raise_unsupported("", "enable_channel_interleave", interleaved, [True])
    names = None if tensor_names is None else set(tensor_names) - set(fields.get(IDENTITIES, []))
    layout = _layout_of_fields(fields) if names is None else _layout_of_tensors(names)
    encoder = _read_modules(fields, "encoder", layout, names, channels)
    decoder = _read_modules(fields, "decoder", layout, names, channels)
    quantizer = _read_quantizer(fields)
    try:
        config = CodecConfig(
            fields["sampling_rate"], channels, encoder, quantizer, decoder, layout, text
        )
    except ValueError as error:
        raise ValueError(f"config.json: {error}") from error
    if config.hop_length != fields["downsample_rate"]:
        _raise_unsupported("", "downsample_rate", fields["downsample_rate"], [config.hop_length])
    for key in sorted(fields.keys() - _TOP_KEYS):
        logging.warning("config.json: unknown key %r is ignored", key)
    return config


def _raise_unsupported(prefix: str, key: str, value: Any, accepted: Iterable[Any]) -> None:
    accepted = ", ".join(json.dumps(a) for a in accepted)
    raise ValueError(
        f"config.json: {prefix}{key} = {json.dumps(value)} is not supported; accepted: {accepted}"
    )


def _check_keys(fields: dict[str, Any], known: set[str], prefix: str) -> None:
    for key in sorted(fields.keys() - known):
        raise ValueError(
            f"config.json: {prefix}{key} = {json.dumps(fields[key])} is not supported; "
            f"accepted keys: {', '.join(sorted(known))}"
        )


def _layout_of_fields(fields: dict[str, Any]) -> str:
    modules = [*fields["encoder_kwargs"], *fields["decoder_kwargs"]]
    own_context = any(isinstance(m, dict) and "context_duration" in m for m in modules)
    return "v2" if own_context or fields.get("number_channels", 1) != 1 else "v1"


def _layout_of_tensors(names: set[str]) -> str:
    return "v1" if any(".in_projs.0." in name for name in names) else "v2"


def _read_modules(fields, side, layout, names, channels) -> tuple[ModuleConfig, ...]:
    """The modules of one side; `rate` is the frame rate (Hz) at the current module."""
    modules = fields[f"{side}_kwargs"]
    if not isinstance(modules, list) or not all(isinstance(m, dict) for m in modules):
        raise ValueError(f"config.json: {side}_kwargs must be a list of modules")
    rate = float(fields["sampling_rate"] * channels)
    if side == "decoder":
        rate = fields["sampling_rate"] / fields["downsample_rate"]
    configs: list[ModuleConfig] = []
    for i, module in enumerate(modules):
        prefix = f"{side}_kwargs[{i}]."
        kind = module.get("module_type")
        if kind == "PatchedPretransform":
            patch = _read_patch(module, prefix)
            configs.append(patch)
            rate = rate / patch.patch_size if side == "encoder" else rate * patch.patch_size
        elif kind == "Transformer":
            stage = _read_transformer(module, prefix, rate, fields)
            configs.append(_with_projections(stage, f"{side}.{i}.", layout, names))
        else:
            _raise_unsupported(prefix, "module_type", kind, ["PatchedPretransform", "Transformer"])
    return tuple(configs)


def _read_patch(module: dict[str, Any], prefix: str) -> PatchConfig:
    _check_keys(module, {"module_type", "patch_size"}, prefix)
    return _build(PatchConfig, prefix, patch_size=module.get("patch_size"))


def _read_transformer(module, prefix, rate, fields) -> TransformerConfig:
    known = {"module_type", "context_duration"} | _FIXED.keys() | _SIZES.keys() | _OPTIONAL.keys()
    _check_keys(module, known, prefix)
    for key in _SIZES:
        if key not in module:
            raise ValueError(f"config.json: {prefix}{key} is missing")
    for key, accepted in _FIXED.items():
        if module.get(key, accepted[0]) not in accepted:
            _raise_unsupported(prefix, key, module[key], accepted)
    values = {}
    for key, ours in (_SIZES | _OPTIONAL).items():
        if key in module:
            values[ours] = module[key]
    context = module.get("context_duration")
    if context is None:
        key = "causal_transformer_context_duration"
        context = fields.get(key)
        if not is_number(context) or not 0 < context < 1e6:
            _raise_unsupported("", key, context, ["a positive number"])
        context = int(rate * context) / rate  # the v1 classes round down to whole frames
    return _build(TransformerConfig, prefix, **values, context_seconds=float(context))


def _build(cls: type, prefix: str, **values: Any) -> Any:
    """An instance of a config class; errors name the module, `prefix` without its dot."""
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config.json: {prefix[:-1]}: {error}") from error


def _with_projections(stage, prefix, layout, names) -> TransformerConfig:
    """The stage with the projections that its tensors, or else its layout, say it has."""
    projections = {}
    for side in ("input", "output"):
        has_model_dim = getattr(stage, f"{side}_dim") == stage.model_dim
        if names is not None and has_model_dim:
            has_projection = f"{prefix}{side}_proj.weight" in names
        else:
            has_projection = layout == "v2" or not has_model_dim
        projections[f"{side}_projection"] = has_projection
    return dataclasses.replace(stage, **projections)


def _read_quantizer(fields: dict[str, Any]) -> QuantizerConfig:
    kwargs = fields["quantizer_kwargs"]
    if not isinstance(kwargs, dict):
        raise ValueError("config.json: quantizer_kwargs must be an object")
    kind = kwargs.get("quantizer_type", fields.get("quantizer_type"))
    if kind not in _QUANTIZER_TYPES:
        _raise_unsupported("", "quantizer_type", kind, _QUANTIZER_TYPES)
    names = [field.name for field in dataclasses.fields(QuantizerConfig)]
    _check_keys(kwargs, {*names, "quantizer_type"}, "quantizer_kwargs.")
    for key in names:
        if key not in kwargs:
            raise ValueError(f"config.json: quantizer_kwargs.{key} is missing")
    return _build(QuantizerConfig, "quantizer_kwargs.", **{name: kwargs[name] for name in names})


def with_expressible_layout(config: CodecConfig) -> CodecConfig:
    """The codec with layout "v2" if "v1", which has one context for all stages, cannot express it.

    The layout affects the names of tensors and the keys of config.json only, not the computation.
    """
    return dataclasses.replace(config, layout="v2") if len(_contexts(config)) > 1 else config


def write_config(config: CodecConfig, dtype: str) -> str:
    """Returns the text of an official config.json for a codec.

    A codec that was read from the official layout keeps every key of its original config.json.
    `auto_map` names the official repository, so that
    `AutoModel.from_pretrained(path, trust_remote_code=True)` finds the classes online.

    Args:
      config: The codec; its layout must be able to express it.
      dtype: Type of the tensors beside it, "float32", "float16" or "bfloat16".
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
    if sizes := identity_sizes(config):
        fields[IDENTITIES] = list(sizes)
    fields["dtype"] = dtype
    return json.dumps(fields, indent=2) + "\n"


def identity_sizes(config: CodecConfig) -> dict[str, int]:
    """Names and sizes of the projections that layout v2 has in every stage and this codec lacks."""
    sizes = {}
    for side in ("encoder", "decoder"):
        for i, module in enumerate(getattr(config, side)):
            if config.layout == "v2" and isinstance(module, TransformerConfig):
                if not module.input_projection:
                    sizes[f"{side}.{i}.input_proj.weight"] = module.model_dim
                if not module.output_projection:
                    sizes[f"{side}.{i}.output_proj.weight"] = module.model_dim
    return sizes


def _contexts(config: CodecConfig) -> set[float]:
    """The attention contexts of all stages, in seconds."""
    contexts = set()
    for module in (*config.encoder, *config.decoder):
        if isinstance(module, TransformerConfig):
            contexts.add(module.context_seconds)
    return contexts


def _fields(config: CodecConfig) -> dict[str, Any]:
    quantizer = dataclasses.asdict(config.quantizer) | {"quantizer_type": "rlfq"}
    fields = {
        "architectures": ["MossAudioTokenizerModel"],
        "model_type": "moss-audio-tokenizer",
        "sampling_rate": config.sample_rate,
        "sample_rate": config.sample_rate,
        "downsample_rate": config.hop_length,
        "causal_transformer_context_duration": max(_contexts(config), default=10.0),
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
