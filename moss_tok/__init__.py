"""moss_tok: a causal Transformer audio codec (CAT) in JAX.

Shape legend, the same letters everywhere:

  B batch, C channels, S samples, T frames, P patch, D model width, N heads, H head width,
  F feed-forward width, Q quantizers, K codebook size, V text vocabulary, L layers, R residual width

  wav      [B, C, S]  float32 in [-1, 1]
  latents  [B, T, D]  float32, 12.5 Hz in the published models
  codes    [B, Q, T]  int32 in [0, K)

What is passed is checked: shapes and types always, and where the values can be looked at without
waiting for an accelerator, lengths must be within the array, codes in [0, K), and samples finite
numbers; a ValueError says what is accepted. Looked at are

  lengths      unless they are traced; those on an accelerator are waited for
  wav, codes   what lies before the lengths, in host memory: numpy arrays, lists, tensors of torch,
               and arrays of JAX on CPU devices

Not looked at are wav and codes on an accelerator, arrays that several processes share, and
whatever `jax.jit`, `jax.vmap` or another transformation traces: there lengths and codes are clamped
to what is accepted, and NaN stays in its own item.

The names below are imported when they are first used, so `import moss_tok` costs nothing.
"""

import importlib
from collections.abc import Callable
from typing import Any

_WHERE = {
    "Codec": "moss_tok.codec.inference",
    "CodecConfig": "moss_tok.codec.config",
    "ComputeConfig": "moss_tok.nn.compute",
    "Decoded": "moss_tok.codec.inference",
    "Encoded": "moss_tok.codec.inference",
    "DecoderStream": "moss_tok.codec.live",
    "EncoderStream": "moss_tok.codec.live",
    "StreamState": "moss_tok.codec.streaming",
    "decode": "moss_tok.codec.inference",
    "decode_step": "moss_tok.codec.streaming",
    "encode_step": "moss_tok.codec.streaming",
    "init_decoder_stream": "moss_tok.codec.streaming",
    "init_encoder_stream": "moss_tok.codec.streaming",
    "reset_streams": "moss_tok.codec.streaming",
    "encode": "moss_tok.codec.inference",
    "load": "moss_tok.codec.pretrained",
    "preset": "moss_tok.codec.presets",
}

__all__ = sorted(_WHERE)


def import_on_use(package: str, where: dict[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package whose names are in the modules that `where` says."""

    def get(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(where[name]), name)

    return get


__getattr__ = import_on_use(__name__, _WHERE)
