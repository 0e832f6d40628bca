"""Reads Qwen2.5 weights from a local directory in the Hugging Face layout.

Source: names and shapes of the tensors of Qwen2ForCausalLM of Hugging Face Transformers.
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
    params = tensors.read_tensors(path, files, table, {t.name for t in table})
    output = params.pop(_OUTPUT, params["embedding"])
    if not np.array_equal(output, params["embedding"]):
        raise ValueError(f"{path}: {_OUTPUT} is not the embedding; it must be tied to it")
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
        block = f"model.layers.{layer}."
        for name, ours in (("input", "attention_norm"), ("post_attention", "mlp_norm")):
            yield row(f"{block}{name}_layernorm.weight", (d,), ("layers", ours, "scale"), layer)
        attention = ("layers", "attention")
        for name, count in (("q", n), ("k", c.num_kv_heads), ("v", c.num_kv_heads)):
            prefix = f"{block}self_attn.{name}_proj"
            yield row(f"{prefix}.weight", (count * h, d), (*attention, name), layer, heads)
            yield row(f"{prefix}.bias", (count * h,), (*attention, f"{name}_bias"), layer,
                      lambda x: x.reshape(-1, h))  # fmt: skip
        yield row(f"{block}self_attn.o_proj.weight", (d, n * h), (*attention, "out"), layer,
                  lambda x: x.T.reshape(n, h, d))  # fmt: skip
        shapes = {"gate": (c.mlp_dim, d), "up": (c.mlp_dim, d), "down": (d, c.mlp_dim)}
        for name, shape in shapes.items():
            weight = f"{block}mlp.{name}_proj.weight"
            yield row(weight, shape, ("layers", "mlp", name), layer, np.transpose)
