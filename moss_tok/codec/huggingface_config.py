"""Reads and writes the official config.json.

Source: config.json and configuration_moss_audio_tokenizer.py of OpenMOSS-Team/MOSS-Audio-Tokenizer.
The class defaults there are wrong: the decoder would upsample by twice the right factor. So every
key must be present.
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
from moss_tok.json_files import format_json, parse_json_object

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
# A key that only moss_tok writes. It lists tensors that are identity matrices, because the classes
# of layout v2 have projections in every stage, and this codec has not.
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
    num_channels = fields.get("number_channels", 1)
    for key in ("sampling_rate", "downsample_rate", "number_channels"):
        value = fields.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            _raise_unsupported("", key, value, ["a positive integer"])
    is_interleaved = fields.get("enable_channel_interleave")
    if num_channels != 1 and is_interleaved is not True:
        _raise_unsupported("", "enable_channel_interleave", is_interleaved, [True])
    if tensor_names is None:
        names = None
        layout = _layout_of_fields(fields)
    else:
        names = set(tensor_names) - set(fields.get(IDENTITIES, []))
        layout = _layout_of_tensors(names)
    encoder = _read_modules(fields, "encoder", layout, names, num_channels)
    decoder = _read_modules(fields, "decoder", layout, names, num_channels)
    quantizer = _read_quantizer(fields)
    try:
        config = CodecConfig(
            sample_rate=fields["sampling_rate"],
            num_channels=num_channels,
            encoder=encoder,
            quantizer=quantizer,
            decoder=decoder,
            layout=layout,
            official_json=text,
        )
    except ValueError as error:
        raise ValueError(f"config.json: {error}") from error
    if config.hop_length != fields["downsample_rate"]:
        _raise_unsupported("", "downsample_rate", fields["downsample_rate"], [config.hop_length])
    for key in sorted(fields.keys() - _TOP_KEYS):
        logging.warning("config.json: unknown key %r is ignored", key)
    return config


def _raise_unsupported(prefix: str, key: str, value: Any, accepted: Iterable[Any]) -> None:
    listing = ", ".join(map(json.dumps, accepted))
    raise ValueError(
        f"config.json: {prefix}{key} = {json.dumps(value)} is not supported; accepted: {listing}"
    )


def _check_keys(fields: dict[str, Any], known: set[str], prefix: str) -> None:
    for key in sorted(fields.keys() - known):
        raise ValueError(
            f"config.json: {prefix}{key} = {json.dumps(fields[key])} is not supported; "
            f"accepted keys: {', '.join(sorted(known))}"
        )


def _layout_of_fields(fields: dict[str, Any]) -> str:
    if fields.get("number_channels", 1) != 1:
        return "v2"
    for module in [*fields["encoder_kwargs"], *fields["decoder_kwargs"]]:
        if isinstance(module, dict) and "context_duration" in module:
            return "v2"
    return "v1"


def _layout_of_tensors(names: set[str]) -> str:
    return "v1" if any(".in_projs.0." in name for name in names) else "v2"


def _read_modules(
    fields: dict[str, Any],
    side: str,
    layout: str,
    names: set[str] | None,
    num_channels: int,
) -> tuple[ModuleConfig, ...]:
    """The modules of one side, "encoder" or "decoder"."""
    modules = fields[f"{side}_kwargs"]
    if not isinstance(modules, list) or not all(isinstance(m, dict) for m in modules):
        raise ValueError(f"config.json: {side}_kwargs must be a list of modules")
    rate = float(fields["sampling_rate"] * num_channels)  # Hz, at the current module
    if side == "decoder":
        rate = fields["sampling_rate"] / fields["downsample_rate"]
    configs: list[ModuleConfig] = []
    for number, module in enumerate(modules):
        prefix = f"{side}_kwargs[{number}]."
        kind = module.get("module_type")
        if kind == "PatchedPretransform":
            patch = _read_patch(module, prefix)
            configs.append(patch)
            rate = rate / patch.patch_size if side == "encoder" else rate * patch.patch_size
        elif kind == "Transformer":
            stage = _read_transformer(module, prefix, rate, fields)
            configs.append(_with_projections(stage, f"{side}.{number}.", layout, names))
        else:
            _raise_unsupported(prefix, "module_type", kind, ["PatchedPretransform", "Transformer"])
    return tuple(configs)


def _read_patch(module: dict[str, Any], prefix: str) -> PatchConfig:
    _check_keys(module, {"module_type", "patch_size"}, prefix)
    return _build(PatchConfig, prefix, patch_size=module.get("patch_size"))


def _read_transformer(
    module: dict[str, Any],
    prefix: str,
    rate: float,
    fields: dict[str, Any],
) -> TransformerConfig:
    """One stage, whose frame rate is `rate` Hz; `fields` are those of the whole config.json."""
    known = {"module_type", "context_duration"} | _FIXED.keys() | _SIZES.keys() | _OPTIONAL.keys()
    _check_keys(module, known, prefix)
    for key in _SIZES:
        if key not in module:
            raise ValueError(f"config.json: {prefix}{key} is missing")
    for key, accepted in _FIXED.items():
        if module.get(key, accepted[0]) not in accepted:
            _raise_unsupported(prefix, key, module[key], accepted)
    values = {}
    for key, name in (_SIZES | _OPTIONAL).items():
        if key in module:
            values[name] = module[key]
    context_seconds = module.get("context_duration")
    if context_seconds is None:
        key = "causal_transformer_context_duration"
        context_seconds = fields.get(key)
        if not is_number(context_seconds) or not 0 < context_seconds < 1e6:
            _raise_unsupported("", key, context_seconds, ["a positive number"])
        num_frames = int(rate * context_seconds)  # the v1 classes round down
        context_seconds = num_frames / rate
    return _build(TransformerConfig, prefix, **values, context_seconds=float(context_seconds))


def _build(cls: type, prefix: str, **values: Any) -> Any:
    """An instance of a config class; errors name the module, `prefix` without its dot."""
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config.json: {prefix[:-1]}: {error}") from error


def _with_projections(
    stage: TransformerConfig,
    prefix: str,
    layout: str,
    names: set[str] | None,
) -> TransformerConfig:
    """The stage with its projections, which its tensors determine, or without them its layout."""
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
    values = {}
    for name in names:
        if name not in kwargs:
            raise ValueError(f"config.json: quantizer_kwargs.{name} is missing")
        values[name] = kwargs[name]
    return _build(QuantizerConfig, "quantizer_kwargs.", **values)


def with_expressible_layout(config: CodecConfig) -> CodecConfig:
    """The codec with layout "v2" if "v1" cannot express it.

    v1 has one channel, one context for all stages, and projections only where they change the
    width. The layout affects the names of tensors and the keys of config.json only, not the
    computation.
    """
    is_expressible = config.num_channels == 1 and len(_contexts(config)) <= 1
    for stage in (*config.encoder, *config.decoder):
        if not isinstance(stage, PatchConfig):
            is_expressible &= not (stage.input_projection and stage.input_dim == stage.model_dim)
            is_expressible &= not (stage.output_projection and stage.output_dim == stage.model_dim)
    return config if is_expressible else dataclasses.replace(config, layout="v2")


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
    fields["auto_map"] = _auto_map(config, fields.get("auto_map") or {})
    identities = identity_sizes(config)
    if identities:
        fields[IDENTITIES] = list(identities)
    fields["dtype"] = dtype
    return format_json(fields)


def _auto_map(config: CodecConfig, original: dict[str, str]) -> dict[str, str]:
    """The classes of the codec, each with its official repository: "REPOSITORY--FILE.CLASS"."""
    repository = _REPOSITORY
    if config.layout == "v2":
        ends_in_patch = isinstance(config.encoder[-1], PatchConfig)
        repository += "-Nano" if ends_in_patch else "-v2"
    auto_map = dict(original)
    for key, default in _CLASSES.items():
        name = original.get(key, default)
        auto_map[key] = name if "--" in name else f"{repository}--{name}"
    return auto_map


def identity_sizes(config: CodecConfig) -> dict[str, int]:
    """Names and sizes of the projections that layout v2 has in every stage and this codec lacks."""
    if config.layout != "v2":
        return {}
    sizes = {}
    for side in ("encoder", "decoder"):
        for number, module in enumerate(getattr(config, side)):
            if isinstance(module, PatchConfig):
                continue
            if not module.input_projection:
                sizes[f"{side}.{number}.input_proj.weight"] = module.model_dim
            if not module.output_projection:
                sizes[f"{side}.{number}.output_proj.weight"] = module.model_dim
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
    for key, name in (_SIZES | _OPTIONAL).items():
        fields[key] = getattr(module, name)
    for key, accepted in _FIXED.items():
        fields[key] = accepted[0]
    if layout == "v2":
        fields["context_duration"] = module.context_seconds
    return fields
