"""Reads and writes the config.json of the official speech models (MossTTSLocal 1.0).

Source: configuration_moss_tts.py in moss_tts_local/ of OpenMOSS/MOSS-TTS. Its model_type is that of
the delay pattern, which is another architecture: only local_num_layers tells them apart.
"""

import json
from typing import Any

from moss_tok.json_files import parse_json_object
from moss_tok.speech.config import SpeechConfig, StackConfig

_REPOSITORY = "OpenMOSS-Team/MOSS-TTS-Local-Transformer"
_CLASSES = {
    "AutoConfig": "configuration_moss_tts.MossTTSDelayConfig",
    "AutoModel": "modeling_moss_tts.MossTTSDelayModel",
}
_MODEL_TYPE = "moss_tts_delay"
_OTHERS = {
    "moss_tts_local": "MossTTSLocal 1.5",
    "moss_tts_nano": "MOSS-TTS-Nano",
    "moss_tts_realtime": "MOSS-TTS-Realtime",
}
_SUPPORTED = "another architecture; only MossTTSLocal 1.0 is supported"
# Keys of integers, and the fields of SpeechConfig and of its blocks that they give.
_SIZES = {
    "n_vq": "num_quantizers",
    "audio_vocab_size": "codebook_size",
    "additional_mlp_ffn_hidden_size": "adapter_dim",
    "audio_assistant_gen_slot_token_id": "slot_id",
    "audio_user_slot_token_id": "user_slot_id",
    "audio_start_token_id": "start_id",
    "audio_end_token_id": "end_id",
}
_TEMPORAL_SIZES = {
    "hidden_size": "model_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "mlp_dim",
}
# Those of the depth Transformer; it has the heads of the temporal one.
_DEPTH_SIZES = {
    "local_hidden_size": "model_dim",
    "local_num_layers": "num_layers",
    "local_ffn_hidden_size": "mlp_dim",
}
# Other values mean that the temporal Transformer computes something else.
_FIXED = {
    "model_type": "qwen3",
    "hidden_act": "silu",
    "attention_bias": False,
    "use_sliding_window": False,
    "rope_scaling": None,
}
# What the official config.json has no key for, and the values of the published model. Where ours
# has other values, they are under the key "moss_tok".
_OURS = {"layout": "chat", "frame_rate": 12.5, "codec": ""}
# Tokens of the tokenizer of Qwen that the model itself does not need.
_CHAT_IDS = {
    "pad_token_id": 151643,
    "im_start_token_id": 151644,
    "im_end_token_id": 151645,
    "audio_assistant_delay_slot_token_id": 151662,
}


def is_speech(fields: dict[str, Any]) -> bool:
    """Whether an official config.json is that of a speech model, supported or not."""
    return str(fields.get("model_type")).startswith("moss_tts")


def read_config(text: str) -> SpeechConfig:
    """Reads an official config.json.

    The class defaults are not relied on: every key that the model depends on must be present.

    Raises:
      ValueError: It is another architecture, a key is missing, or a value is not supported.
    """
    fields = parse_json_object(text)
    _check_architecture(fields)
    language = _get(fields, "language_config")
    if not isinstance(language, dict):
        raise ValueError("config.json: language_config must be an object")
    ours = fields.get("moss_tok", {})
    if not isinstance(ours, dict) or ours.keys() - _OURS.keys():
        raise ValueError(f"config.json: moss_tok must be an object of {', '.join(_OURS)}")
    rope = language.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError("config.json: language_config.rope_parameters must be an object")
    _check_values(fields, language, rope)
    rope_fields = rope if "rope_theta" in rope else language
    try:
        temporal = {ours: _get(language, key) for key, ours in _TEMPORAL_SIZES.items()}
        temporal["norm_epsilon"] = _get(language, "rms_norm_eps")
        depth = temporal | {ours: _get(fields, key) for key, ours in _DEPTH_SIZES.items()}
        return SpeechConfig(
            vocab_size=_get(language, "vocab_size"),
            temporal=StackConfig(**temporal),
            depth=StackConfig(**depth),
            rope_theta=float(_get(rope_fields, "rope_theta")),
            max_positions=language.get("max_position_embeddings", 32768),
            official_json=text,
            **(_OURS | ours),
            **{ours: _get(fields, key) for key, ours in _SIZES.items()},
        )
    except (TypeError, ValueError) as error:
        message = str(error)
        prefix = "" if message.startswith("config.json") else "config.json: "
        raise ValueError(f"{prefix}{message}") from error


def _check_architecture(fields: dict[str, Any]) -> None:
    """Raises ValueError unless a config.json is that of MossTTSLocal 1.0."""
    model_type = fields.get("model_type")
    if model_type in _OTHERS:
        raise ValueError(f"config.json: this is {_OTHERS[model_type]}, {_SUPPORTED}")
    if model_type != _MODEL_TYPE:
        raise ValueError(f"config.json: model_type must be {_MODEL_TYPE!r}, got {model_type!r}")
    if "local_num_layers" not in fields:
        raise ValueError(f"config.json: this is MossTTSDelay, the delay pattern, {_SUPPORTED}")


def _check_values(fields: dict[str, Any], language: dict[str, Any], rope: dict[str, Any]) -> None:
    """Raises ValueError where the official class would compute something else."""
    for key, accepted in _FIXED.items():
        if language.get(key, accepted) != accepted:
            value = json.dumps(language[key])
            accepted = json.dumps(accepted)
            raise ValueError(f"config.json: language_config.{key} must be {accepted}, got {value}")
    rope_type = rope.get("rope_type", "default")
    if rope_type != "default":
        raise ValueError(f'config.json: rope_type must be "default", got {json.dumps(rope_type)}')
    expected = {
        "audio_pad_code": _get(fields, "audio_vocab_size"),
        "hidden_size": _get(language, "hidden_size"),
        "vocab_size": _get(language, "vocab_size"),
    }
    for key, value in expected.items():
        if fields.get(key, value) != value:
            raise ValueError(f"config.json: {key} must be {value}, got {fields[key]!r}")


def _get(fields: dict[str, Any], key: str) -> Any:
    if key not in fields:
        raise ValueError(f"config.json: missing key {key!r}")
    return fields[key]


def write_config(config: SpeechConfig, dtype: str) -> str:
    """Returns the text of an official config.json for a speech model.

    A model that was read from the official layout keeps every key of its original config.json.
    `auto_map` names the official repository, so that
    `AutoModel.from_pretrained(path, trust_remote_code=True)` finds the classes online.

    Args:
      config: The model.
      dtype: Type of the tensors beside it, "float32" or "bfloat16".

    Raises:
      ValueError: The official class cannot express this model.
    """
    fields = parse_json_object(config.official_json) if config.official_json else _fields(config)
    auto_map = fields.get("auto_map") or {}
    for key, name in _CLASSES.items():
        name = auto_map.get(key, name)
        auto_map[key] = name if "--" in name else f"{_REPOSITORY}--{name}"
    fields["auto_map"] = auto_map
    ours = {key: getattr(config, key) for key in _OURS}
    if ours != _OURS:
        fields["moss_tok"] = ours
    fields["dtype"] = dtype
    return json.dumps(fields, indent=2) + "\n"


def _fields(config: SpeechConfig) -> dict[str, Any]:
    temporal = config.temporal
    depth = config.depth
    for name in ("num_heads", "num_kv_heads", "head_dim", "norm_epsilon"):
        temporal_value = getattr(temporal, name)
        depth_value = getattr(depth, name)
        if temporal_value != depth_value:
            raise ValueError(
                f"the official class has one {name} for the temporal and the depth Transformer, "
                f"this model has {temporal_value} and {depth_value}"
            )
    if temporal.qkv_bias or depth.qkv_bias or not (temporal.head_norm and depth.head_norm):
        raise ValueError("the official class has Qwen3 blocks only, this model has others")
    has_chat_ids = config.layout == "chat" and config.vocab_size > max(_CHAT_IDS.values())
    language = {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": temporal.norm_epsilon,
        "rope_theta": config.rope_theta,
    }
    return {
        "architectures": ["MossTTSDelayModel"],
        "model_type": _MODEL_TYPE,
        "audio_pad_code": config.codebook_size,
        "hidden_size": temporal.model_dim,
        "vocab_size": config.vocab_size,
        "language_config": _FIXED
        | {key: getattr(temporal, ours) for key, ours in _TEMPORAL_SIZES.items()}
        | language,
        **{key: token if has_chat_ids else None for key, token in _CHAT_IDS.items()},
        **{key: getattr(config, ours) for key, ours in _SIZES.items()},
        **{key: getattr(depth, ours) for key, ours in _DEPTH_SIZES.items()},
    }
