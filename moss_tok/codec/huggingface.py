"""The official Hugging Face layout: its config.json and one table of its tensors.

The table serves both directions: each row says how an official tensor is called and shaped, which
parameter (or row of a stacked one) it is, and how the two layouts differ. Names come in two
families, "v1" and "v2" (Nano too). Inside a head, official RoPE rotates neighbouring channels; ours
rotates the halves, which is the same with the rows of q and k permuted.

Source: config.json and modeling_moss_audio_tokenizer.py of OpenMOSS-Team/MOSS-Audio-Tokenizer.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors looks up by name
import numpy as np
import safetensors
import safetensors.numpy

from moss_tok.config import (
    CodecConfig,
    ModuleConfig,
    PatchConfig,
    QuantizerConfig,
    TransformerConfig,
    parse_json_object,
)

INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"
MAX_SHARD_BYTES = 5 * 10**9

_CLASSES = {
    "AutoConfig": "configuration_moss_audio_tokenizer.MossAudioTokenizerConfig",
    "AutoModel": "modeling_moss_audio_tokenizer.MossAudioTokenizerModel",
}
_REPOSITORY = "OpenMOSS-Team/MOSS-Audio-Tokenizer"


# ------------------------------------------------------------------------------------ config.json

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
    for key in sorted(fields.keys() - _TOP_KEYS):
        logging.warning("config.json: key %r is not known and has no effect", key)
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
    if "layer_scale" in module and not isinstance(module["layer_scale"], (int, float)):
        _unsupported(where, "layer_scale", module["layer_scale"], ["a number"])
    context = module.get("context_duration")
    if context is None:
        context = fields.get("causal_transformer_context_duration")
        if not isinstance(context, (int, float)) or not context > 0:
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


# ------------------------------------------------------------------------------------ the table


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One official tensor and the parameter it is.

    Attributes:
      name: Official name.
      shape: Official shape.
      path: Where the parameter is in our tree.
      row: Row of a parameter stacked over layers or quantizers; None for the whole one.
      to_ours: Official array -> our layout.
      to_official: The inverse.
    """

    name: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    row: int | None
    to_ours: Callable[[np.ndarray], np.ndarray]
    to_official: Callable[[np.ndarray], np.ndarray]


_BLOCK_NAMES = {
    "v1": ("self_attn.in_projs.0", "self_attn.out_projs.0", "linear1", "linear2"),
    "v2": ("self_attn.in_proj", "self_attn.out_proj", "ffn.0", "ffn.2"),
}


def tensor_table(config: CodecConfig, component: str = "all") -> list[Tensor]:
    """All official tensors of a codec, or of one side ("encoder", "decoder") and the quantizer."""
    rows: list[Tensor] = []
    for side in ("encoder", "decoder"):
        if component not in ("all", side):
            continue
        for i, module in enumerate(getattr(config, side)):
            if isinstance(module, TransformerConfig):
                rows += _stage_rows(module, f"{side}.{i}.", (side, f"stage_{i}"), config.layout)
    return rows + list(_quantizer_rows(config.quantizer))


def _same(name, shape, path, row=None) -> Tensor:
    return Tensor(name, shape, path, row, lambda x: x, lambda x: x)


def _linear(name, shape, path, row=None) -> Tensor:
    return Tensor(name, shape, path, row, np.transpose, np.transpose)


def _stage_rows(m: TransformerConfig, prefix, path, layout) -> Iterator[Tensor]:
    d, n, h = m.model_dim, m.num_heads, m.head_dim
    qkv_name, out_name, up_name, down_name = _BLOCK_NAMES[layout]
    if m.input_projection:
        where = (*path, "input_projection", "kernel")
        yield _linear(f"{prefix}input_proj.weight", (d, m.input_dim), where)
    if m.output_projection:
        where = (*path, "output_projection", "kernel")
        yield _linear(f"{prefix}output_proj.weight", (m.output_dim, d), where)
    for row in range(m.num_layers):
        block, where = f"{prefix}transformer.layers.{row}.", (*path, "layers")
        for ours, norm, scale in (("attention", "norm1", "1"), ("mlp", "norm2", "2")):
            yield _same(f"{block}{norm}.weight", (d,), (*where, f"{ours}_norm", "scale"), row)
            yield _same(f"{block}{norm}.bias", (d,), (*where, f"{ours}_norm", "bias"), row)
            yield _same(f"{block}layer_scale_{scale}.scale", (d,), (*where, f"{ours}_scale"), row)
        yield Tensor(
            f"{block}{qkv_name}.weight", (3 * d, d), (*where, "attention", "qkv"), row,
            lambda x: _split_qkv(x, n, h), _join_qkv,
        )  # fmt: skip
        yield Tensor(
            f"{block}{out_name}.weight", (d, d), (*where, "attention", "out"), row,
            lambda x: x.T.reshape(n, h, -1), lambda x: x.reshape(n * h, -1).T,
        )  # fmt: skip
        yield _linear(f"{block}{up_name}.weight", (m.mlp_dim, d), (*where, "mlp", "up"), row)
        yield _linear(f"{block}{down_name}.weight", (d, m.mlp_dim), (*where, "mlp", "down"), row)


def _split_qkv(x: np.ndarray, heads: int, dim: int) -> np.ndarray:
    """[3 * N * H, D] -> [D, 3, N, H], q and k from neighbouring pairs to halves."""
    x = x.reshape(3, heads, dim, -1)
    pairs = x[:2].reshape(2, heads, dim // 2, 2, -1).swapaxes(2, 3).reshape(x[:2].shape)
    return np.concatenate([pairs, x[2:]]).transpose(3, 0, 1, 2)


def _join_qkv(x: np.ndarray) -> np.ndarray:
    """The inverse of `_split_qkv`."""
    _, _, heads, dim = x.shape
    x = x.transpose(1, 2, 3, 0)
    pairs = x[:2].reshape(2, heads, 2, dim // 2, -1).swapaxes(2, 3).reshape(x[:2].shape)
    return np.concatenate([pairs, x[2:]]).reshape(3 * heads * dim, -1)


def _quantizer_rows(c: QuantizerConfig) -> Iterator[Tensor]:
    if c.input_dim != c.rvq_dim:
        path = ("quantizer", "input_projection")
        yield from _conv("quantizer.input_proj", c.input_dim, c.rvq_dim, path)
    if c.output_dim != c.rvq_dim:
        path = ("quantizer", "output_projection")
        yield from _conv("quantizer.output_proj", c.rvq_dim, c.output_dim, path)
    for row in range(c.num_quantizers):
        prefix = f"quantizer.quantizers.{row}."
        if c.codebook_dim != c.rvq_dim:
            path = ("quantizer", "in_projections")
            yield from _conv(f"{prefix}in_proj", c.rvq_dim, c.codebook_dim, path, row)
            path = ("quantizer", "out_projections")
            yield from _conv(f"{prefix}out_proj", c.codebook_dim, c.rvq_dim, path, row)
        shape = (c.codebook_size, c.codebook_dim)
        yield _same(f"{prefix}codebook.weight", shape, ("quantizer", "codebooks"), row)


def _conv(name, size_in, size_out, path, row=None) -> Iterator[Tensor]:
    """A weight-normalised 1x1 convolution: gain, direction and bias."""
    yield Tensor(
        f"{name}.parametrizations.weight.original0", (size_out, 1, 1), (*path, "gain"), row,
        np.ravel, lambda x: x.reshape(-1, 1, 1),
    )  # fmt: skip
    yield Tensor(
        f"{name}.parametrizations.weight.original1", (size_out, size_in, 1),
        (*path, "direction"), row, lambda x: x[..., 0].T, lambda x: x.T[..., None],
    )  # fmt: skip
    yield _same(f"{name}.bias", (size_out,), (*path, "bias"), row)


# ------------------------------------------------------------------------------------ files


def is_official(path: Path) -> bool:
    """Whether `path` holds official weights: one safetensors file or an index of several."""
    return (path / WEIGHTS_NAME).exists() or (path / INDEX_NAME).exists()


def _tensor_files(path: Path) -> dict[str, Path]:
    """Tensor name -> file that holds it."""
    if (path / INDEX_NAME).exists():
        index = parse_json_object((path / INDEX_NAME).read_text())
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{path / INDEX_NAME}: no weight_map")
        files = {name: path / Path(file).name for name, file in weight_map.items()}
        for file in sorted(set(files.values())):
            found = set(_names(file))
            if gone := sorted(n for n, f in files.items() if f == file and n not in found):
                raise ValueError(f"{file}: lacks {len(gone)} tensors of the index: {gone[0]} ...")
        return files
    return dict.fromkeys(_names(path / WEIGHTS_NAME), path / WEIGHTS_NAME)


def _names(file: Path) -> list[str]:
    with _open(file) as tensors:
        return list(tensors.keys())


def _open(file: Path):
    try:
        return safetensors.safe_open(file, framework="numpy")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file}: corrupt safetensors file: {error}") from error
    except FileNotFoundError as error:
        raise ValueError(f"{file}: no such file") from error


def read_folder_config(path: Path) -> CodecConfig:
    """The config of an official directory."""
    return _read_folder_config(path, _tensor_files(path))


def _read_folder_config(path: Path, files: Iterable[str]) -> CodecConfig:
    try:
        return read_config((path / "config.json").read_text(), files)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path / 'config.json'}: no text file") from error


def read_official(path: Path, component: str = "all") -> tuple[CodecConfig, dict[str, Any]]:
    """Reads an official directory.

    Args:
      path: Directory with config.json and safetensors.
      component: "all", "encoder" or "decoder": a side comes with the quantizer, and only its
        tensors are read.

    Returns:
      The config, and the parameters as a tree of float32 numpy arrays.

    Raises:
      ValueError: Anything missing, unknown, misshapen or corrupt; tensors are named, all of them.
    """
    files = _tensor_files(path)
    config = _read_folder_config(path, files)
    table = {t.name: t for t in tensor_table(config)}
    wanted = {t.name for t in tensor_table(config, component)}
    problems = [f"missing {name}" for name in table.keys() - files.keys()]
    problems += [f"unknown {name}" for name in files.keys() - table.keys()]
    params: dict[str, Any] = {}
    stacked = _stacked_rows(table.values())
    for file, names in _batches([n for n in table if n in files], files):
        with _open(file) as tensors:
            for name in names:
                tensor, shape = table[name], tuple(tensors.get_slice(name).get_shape())
                if shape != tensor.shape:
                    problems.append(f"{name} has shape {shape}, not {tensor.shape}")
                elif name in wanted and not problems:
                    array = tensor.to_ours(tensors.get_tensor(name).astype(np.float32))
                    _put(params, tensor, array, stacked)
    if problems:
        raise ValueError(f"{path}: {len(problems)} bad tensors: {'; '.join(sorted(problems))}")
    return config, params


def _batches(names: list[str], files: dict[str, Path]) -> Iterator[tuple[Path, list[str]]]:
    """Groups of tensors of one file.

    An open file stays mapped as far as it was read. It is opened again for each group, so that
    the peak of memory holds the weights once.
    """
    for file in sorted({files[name] for name in names}):
        here = [name for name in names if files[name] == file]
        for start in range(0, len(here), _GROUP_SIZE):
            yield file, here[start : start + _GROUP_SIZE]


_GROUP_SIZE = 64


def _stacked_rows(table: Iterable[Tensor]) -> dict[tuple[str, ...], int]:
    rows: dict[tuple[str, ...], int] = {}
    for tensor in table:
        if tensor.row is not None:
            rows[tensor.path] = max(rows.get(tensor.path, 0), tensor.row + 1)
    return rows


def _put(params, tensor: Tensor, array: np.ndarray, stacked) -> None:
    *parents, leaf = tensor.path
    for name in parents:
        params = params.setdefault(name, {})
    if tensor.row is None:
        params[leaf] = np.ascontiguousarray(array)
    else:
        if leaf not in params:
            params[leaf] = np.empty((stacked[tensor.path], *array.shape), np.float32)
        params[leaf][tensor.row] = array


def write_official(path: Path, config: CodecConfig, params: dict[str, Any], dtype: str) -> None:
    """Writes a complete official directory into the existing folder `path`.

    Args:
      path: An empty folder.
      config: The codec.
      params: All its parameters, arrays of any float type.
      dtype: "float32" or "bfloat16", of the written tensors.
    """
    (path / "config.json").write_text(write_config(config, dtype))
    shards = _shards(tensor_table(config), np.dtype(dtype).itemsize)
    weight_map, total = {}, 0
    for i, shard in enumerate(shards):
        name = WEIGHTS_NAME
        if len(shards) > 1:
            name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        arrays = {t.name: _get(params, t, dtype) for t in shard}
        safetensors.numpy.save_file(arrays, path / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(arrays, name)
        total += sum(a.nbytes for a in arrays.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _shards(table: list[Tensor], itemsize: int) -> list[list[Tensor]]:
    shards, size = [[]], 0
    for tensor in table:
        size_bytes = math.prod(tensor.shape) * itemsize
        if shards[-1] and size + size_bytes > MAX_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += size_bytes
    return shards


def _get(params, tensor: Tensor, dtype: str) -> np.ndarray:
    for name in tensor.path:
        params = params[name]
    array = params if tensor.row is None else params[tensor.row]
    return np.ascontiguousarray(tensor.to_official(np.asarray(array)), dtype=dtype)
