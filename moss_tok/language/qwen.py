"""Reads Qwen2.5 weights from a local directory in the Hugging Face layout.

Source: names and shapes of the tensors of Qwen2ForCausalLM and Qwen3Model of Hugging Face
Transformers.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moss_tok import tensors
from moss_tok.json_files import read_json_object
from moss_tok.language.config import LanguageConfig
from moss_tok.nn.blocks import BlockConfig
from moss_tok.tensors import Tensor

_OUTPUT = "lm_head.weight"  # some files store the tied embedding a second time


def is_qwen(path: Path) -> bool:
    """Whether `path` is a directory with a config.json and weights."""
    return (path / "config.json").is_file() and tensors.is_official(path)


def read_config(path: Path, latents_dim: int, end_id: int, audio: str) -> LanguageConfig:
    """Reads a directory's config.json.

    Args:
      path: The directory.
      latents_dim: Width of the codec's latents.
      end_id: Token before and after each text.
      audio: "codes" or "latents", see `LanguageConfig`.

    Raises:
      ValueError: It is another kind of model, or a variant that computes something else.
    """
    name = path / "config.json"
    fields = read_json_object(name)
    rope = fields.get("rope_parameters") or {}
    rope = rope if isinstance(rope, dict) else {}
    required = {
        "model_type": ("qwen2", fields.get("model_type")),
        "tie_word_embeddings": (True, fields.get("tie_word_embeddings", False)),
        "hidden_act": ("silu", fields.get("hidden_act", "silu")),
        "use_sliding_window": (False, fields.get("use_sliding_window", False)),
        "rope_scaling": (None, fields.get("rope_scaling")),
        "rope_type": ("default", rope.get("rope_type", "default")),
    }
    for key, (accepted, value) in required.items():
        if value != accepted:
            raise ValueError(f"{name}: {key} must be {accepted!r}, got {value!r}")
    try:
        heads = fields["num_attention_heads"]
        return LanguageConfig(
            latents_dim=latents_dim,
            vocab_size=fields["vocab_size"],
            end_id=end_id,
            model_dim=fields["hidden_size"],
            num_layers=fields["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=fields["num_key_value_heads"],
            mlp_dim=fields["intermediate_size"],
            head_dim=fields.get("head_dim") or fields["hidden_size"] // heads,
            rope_theta=float(fields.get("rope_theta") or rope.get("rope_theta", 10000.0)),
            norm_epsilon=float(fields.get("rms_norm_eps", 1e-6)),
            audio=audio,
        )
    except KeyError as error:
        raise ValueError(f"{name}: missing key {error.args[0]!r}") from error
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{name}: {error}") from error


def read_params(path: Path, config: LanguageConfig) -> dict[str, Any]:
    """Reads the parameters of `LanguageModel` as float32 numpy arrays.

    Raises:
      ValueError: Tensors are missing, unknown, misshapen or corrupt; all of them are named.
    """
    files = tensors.tensor_files(path)
    table = list(_table(config))
    if _OUTPUT in files:
        table.append(dataclasses.replace(table[0], name=_OUTPUT, path=(_OUTPUT,)))
    names = {tensor.name for tensor in table}
    params = tensors.read_tensors(path, files, table, names)
    output = params.pop(_OUTPUT, params["embedding"])
    if not np.array_equal(output, params["embedding"]):
        raise ValueError(f"{path}: {_OUTPUT} is not the embedding; it must be tied to it")
    return params


def _table(c: LanguageConfig) -> Iterator[Tensor]:
    shape = (c.vocab_size, c.model_dim)
    yield _same("model.embed_tokens.weight", shape, ("embedding",))
    yield _same("model.norm.weight", (c.model_dim,), ("norm", "scale"))
    yield from block_rows(c.block, c.num_layers, "model.layers.", ("layers",))


def block_rows(
    c: BlockConfig,
    num_layers: int,
    prefix: str,
    path: tuple[str, ...],
) -> Iterator[Tensor]:
    """Rows of the tensors of blocks, whose names begin with `prefix`, for both directions.

    Args:
      c: The blocks: of Qwen2.5, with biases, or of Qwen3, with norms of heads.
      num_layers: Number of blocks.
      prefix: Beginning of the names, before the number of the block.
      path: Path of the stacked blocks in our tree.
    """
    d = c.model_dim
    for layer in range(num_layers):
        block = f"{prefix}{layer}."
        for official, norm in (("input", "attention_norm"), ("post_attention", "mlp_norm")):
            yield _same(f"{block}{official}_layernorm.weight", (d,), (*path, norm, "scale"), layer)
        yield from _attention_rows(c, f"{block}self_attn.", (*path, "attention"), layer)
        yield from mlp_rows((d, c.mlp_dim, d), f"{block}mlp.", (*path, "mlp"), layer)


def _attention_rows(c: BlockConfig, prefix: str, path, layer: int) -> Iterator[Tensor]:
    d = c.model_dim
    n = c.num_heads
    h = c.head_dim

    def split_heads(x: np.ndarray) -> np.ndarray:
        return x.T.reshape(d, -1, h)

    def join_heads(x: np.ndarray) -> np.ndarray:
        return x.reshape(d, -1).T

    for name, num_heads in (("q", n), ("k", c.num_kv_heads), ("v", c.num_kv_heads)):
        weight = f"{prefix}{name}_proj.weight"
        yield Tensor(weight, (num_heads * h, d), (*path, name), layer, split_heads, join_heads)
        if c.qkv_bias:
            yield Tensor(
                name=f"{prefix}{name}_proj.bias",
                shape=(num_heads * h,),
                path=(*path, f"{name}_bias"),
                row=layer,
                to_ours=lambda x: x.reshape(-1, h),
                to_official=np.ravel,
            )
    if c.head_norm:
        for name in ("q_norm", "k_norm"):
            yield _same(f"{prefix}{name}.weight", (h,), (*path, name, "scale"), layer)
    yield Tensor(
        name=f"{prefix}o_proj.weight",
        shape=(d, n * h),
        path=(*path, "out"),
        row=layer,
        to_ours=lambda x: x.T.reshape(n, h, d),
        to_official=lambda x: x.reshape(n * h, d).T,
    )


def mlp_rows(
    dims: tuple[int, int, int],
    prefix: str,
    path: tuple[str, ...],
    row: int | None = None,
) -> Iterator[Tensor]:
    """Rows of a SwiGLU layer of widths `dims`: input, inner, output; for both directions."""
    input_dim, inner_dim, output_dim = dims
    shapes = {
        "gate": (inner_dim, input_dim),
        "up": (inner_dim, input_dim),
        "down": (output_dim, inner_dim),
    }
    for name, shape in shapes.items():
        weight = f"{prefix}{name}_proj.weight"
        yield Tensor(weight, shape, (*path, name), row, np.transpose, np.transpose)


def _same(name, shape, path, row=None) -> Tensor:
    return Tensor(name, shape, path, row, lambda x: x, lambda x: x)
