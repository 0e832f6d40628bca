"""moss_tok: a causal Transformer audio codec (CAT) in JAX.

Shape legend, the same letters everywhere:

  B batch, C channels, S samples, T frames, P patch, D model width, N heads, H head width,
  F feed-forward width, Q quantizers, K codebook size, V text vocabulary, L layers, R residual width

  wav      [B, C, S]  float32 in [-1, 1]
  latents  [B, T, D]  float32, 12.5 Hz in the published models
  codes    [B, Q, T]  int32 in [0, K)

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
    "DecoderStream": "moss_tok.codec.streaming",
    "EncoderStream": "moss_tok.codec.streaming",
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
