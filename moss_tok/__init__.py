"""moss_tok: a causal Transformer audio codec (CAT) in JAX.

Shape legend, the same letters everywhere:

  B batch, C channels, S samples, T frames, P patch, D model width, N heads, H head width,
  F feed-forward width, Q quantizers, K codebook size, V text vocabulary, L layers, R residual width

  wav      [B, C, S]  float32 in [-1, 1]
  latents  [B, T, D]  float32, 12.5 Hz in the published models
  codes    [B, Q, T]  int32 in [0, K)

Every function checks its arguments and raises a ValueError that says what is accepted. Shapes and
types are always checked. Values are checked where this does not wait for an accelerator: lengths
must lie within the array, codes in [0, K), and samples must be finite. The checked values are

  lengths      unless they are traced; lengths on an accelerator are copied to the host
  wav, codes   the part before the lengths, if it is in host memory: numpy arrays, lists, torch
               tensors, and JAX arrays on CPU devices

Values are not checked for wav and codes on an accelerator, for arrays that several processes share,
and for anything traced by `jax.jit`, `jax.vmap` or another transformation. There, lengths and codes
are clamped to the accepted range, and NaN in one item does not affect the others.

Names are imported on first use, so `import moss_tok` is fast.
"""

import importlib
from collections.abc import Callable
from typing import Any

_MODULES = {
    "Codec": "moss_tok.codec.inference",
    "CodecConfig": "moss_tok.codec.config",
    "ComputeConfig": "moss_tok.nn.compute",
    "Decoded": "moss_tok.codec.inference",
    "DecoderStream": "moss_tok.codec.live",
    "Encoded": "moss_tok.codec.inference",
    "EncoderStream": "moss_tok.codec.live",
    "StreamState": "moss_tok.codec.streaming",
    "decode": "moss_tok.codec.inference",
    "decode_step": "moss_tok.codec.streaming",
    "encode": "moss_tok.codec.inference",
    "encode_step": "moss_tok.codec.streaming",
    "init_decoder_stream": "moss_tok.codec.streaming",
    "init_encoder_stream": "moss_tok.codec.streaming",
    "load": "moss_tok.codec.pretrained",
    "preset": "moss_tok.codec.presets",
    "reset_streams": "moss_tok.codec.streaming",
}

__all__ = sorted(_MODULES)


def import_on_use(package: str, modules: dict[str, str]) -> Callable[[str], Any]:
    """Returns a module `__getattr__` that imports each name from its module on first use.

    Args:
      package: Name of the package, for the AttributeError.
      modules: Full name of the module that defines each public name.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(modules[name]), name)

    return get


__getattr__ = import_on_use(__name__, _MODULES)
