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

Names are imported on first use, so `import moss_tok` is fast. `__init__.pyi` lists them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
