"""Qwen2.5 weights from a local directory in the Hugging Face layout.

Source: Qwen2ForCausalLM of Hugging Face Transformers; names and shapes of its tensors.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moss_tok import tensors
from moss_tok.json_files import read_json_object
from moss_tok.language.config import LanguageConfig
from moss_tok.tensors import Tensor

_OUTPUT = "lm_head.weight"  # some files repeat the tied embedding


def is_qwen(path: Path) -> bool:
    """Whether `path` is a directory with a config.json and weights."""
    return (path / "config.json").is_file() and tensors.is_official(path)


def read_config(path: Path, latents_dim: int, end_id: int, audio: str) -> LanguageConfig:
    """The model of a directory's config.json, over frames of `latents_dim`.

    Raises:
      ValueError: Another kind of model, or a variant whose maths differ.
    """
    name, fields = path / "config.json", read_json_object(path / "config.json")
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
    for key, (want, got) in required.items():
        if got != want:
            raise ValueError(f"{name}: {key} must be {want!r}, got {got!r}")
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
    """Parameters of `LanguageModel` as float32 numpy arrays.

    Raises:
      ValueError: Tensors that are missing, unknown, misshapen or corrupt, all of them named.
    """
    files = tensors.tensor_files(path)
    table = list(_table(config))
    if _OUTPUT in files:
        table.append(dataclasses.replace(table[0], name=_OUTPUT, path=(_OUTPUT,)))
    params = tensors.read_tensors(path, files, table, {t.name for t in table})
    output = params.pop(_OUTPUT, params["embedding"])
    if not np.array_equal(output, params["embedding"]):
        raise ValueError(f"{path}: {_OUTPUT} is not the embedding, to which it must be tied")
    return params


def _table(c: LanguageConfig) -> Iterator[Tensor]:
    d, n, h = c.model_dim, c.num_heads, c.head_dim

    def row(name, shape, path, layer=None, to_ours=lambda x: x):
        return Tensor(name, shape, path, layer, to_ours, lambda x: x)

    def heads(x: np.ndarray) -> np.ndarray:
        return x.T.reshape(d, -1, h)

    yield row("model.embed_tokens.weight", (c.vocab_size, d), ("embedding",))
    yield row("model.norm.weight", (d,), ("norm", "scale"))
    for layer in range(c.num_layers):
        block, path = f"model.layers.{layer}.", ("layers",)
        for name, ours in (("input", "attention_norm"), ("post_attention", "mlp_norm")):
            yield row(f"{block}{name}_layernorm.weight", (d,), (*path, ours, "scale"), layer)
        for name, count in (("q", n), ("k", c.num_kv_heads), ("v", c.num_kv_heads)):
            where, attention = f"{block}self_attn.{name}_proj", (*path, "attention")
            yield row(f"{where}.weight", (count * h, d), (*attention, name), layer, heads)
            yield row(f"{where}.bias", (count * h,), (*attention, f"{name}_bias"), layer,
                      lambda x: x.reshape(-1, h))  # fmt: skip
        yield row(f"{block}self_attn.o_proj.weight", (d, n * h), (*path, "attention", "out"), layer,
                  lambda x: x.T.reshape(n, h, d))  # fmt: skip
        for name, shape in (("gate", (c.mlp_dim, d)), ("up", (c.mlp_dim, d)),
                            ("down", (d, c.mlp_dim))):  # fmt: skip
            where = f"{block}mlp.{name}_proj.weight"
            yield row(where, shape, (*path, "mlp", name), layer, np.transpose)
