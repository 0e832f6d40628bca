"""Fresh parameters of a codec, from which a small one learns pitch within minutes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft
from flax import linen as nn

from moss_tok.codec.config import CodecConfig, ModuleConfig, TransformerConfig
from moss_tok.codec.model import CodecModel

# Brings speech (RMS about 0.05) to the size of what the first blocks add to it.
_INPUT_GAIN = 2.0


def init_params(codec: CodecConfig, key: jax.Array) -> Any:
    """Fresh float32 parameters; see `_low_pass` and `_paired` for what they start as."""
    return nn.meta.unbox(init_boxed(codec, key))


def init_boxed(codec: CodecConfig, key: jax.Array) -> Any:
    """`init_params` in boxes that carry logical axis names."""
    wav = jnp.zeros((1, codec.num_channels, codec.hop_length))
    boxed = CodecModel(codec).init(key, wav)["params"]
    params = nn.meta.unbox(boxed)
    for side in ("encoder", "decoder"):
        params[side] = _low_pass(getattr(codec, side), params[side], side)
    params |= {"quantizer": _paired(params["quantizer"])}
    return nn.meta.replace_boxed(boxed, params)


def _low_pass(modules: tuple[ModuleConfig, ...], stages: Any, side: str) -> Any:
    """Makes the projections of a side those of a linear codec that keeps low frequencies.

    The first projection is the DCT of a patch, the others keep what comes first, and the decoder's
    are their transposes: what the blocks then learn is added to a waveform that is right already.
    From random projections a small model does not find even the principal components within
    hours; its audio is noise of the right colour, without pitch (experiments/README.md).
    """
    stages = dict(stages)
    for i, module in enumerate(modules):
        if not isinstance(module, TransformerConfig):
            continue
        sizes = {
            "input_projection": (module.input_dim, module.model_dim),
            "output_projection": (module.model_dim, module.output_dim),
        }
        kernels = {name: np.eye(*size) for name, size in sizes.items()}
        if side == "encoder" and i == 1:
            kernels["input_projection"] = _INPUT_GAIN * _dct(*sizes["input_projection"])
        if side == "decoder" and i == len(modules) - 2:
            kernels["output_projection"] = _dct(*sizes["output_projection"][::-1]).T / _INPUT_GAIN
        for name, kernel in kernels.items():
            if name in stages[f"stage_{i}"]:
                kernel = {"kernel": jnp.asarray(kernel, jnp.float32)}
                stages[f"stage_{i}"] = stages[f"stage_{i}"] | {name: kernel}
    return stages


def _dct(num_samples: int, num_coefficients: int) -> np.ndarray:
    """Orthonormal DCT-II [samples, coefficients], cut or padded with zeros."""
    kernel = np.zeros((num_samples, num_coefficients))
    kept = min(kernel.shape)
    kernel[:, :kept] = scipy.fft.dct(np.eye(num_samples), norm="ortho")[:, :kept]
    return kernel


def _paired(quantizer: dict[str, Any]) -> dict[str, Any]:
    """Makes every projection orthonormal and the one that undoes it its transpose.

    With unrelated projections a code's value does not resemble the residual it stands for, and the
    losses grow instead of falling; so they do with large codebooks. The outer projections keep the
    first of the latents' dimensions, see `_low_pass`; for the quantizers' see `_seen_first`.

    The last of a quantizer's dimensions starts as the constant 1 in residuals and codes. Codes are
    chosen by angle, which says nothing of a residual's size: quiet frames would get codes of any
    size. Among vectors that end in the same 1, the nearest in angle is the nearest in distance.
    """
    quantizer = quantizer | {"codebooks": 0.1 * quantizer["codebooks"]}
    if "input_projection" in quantizer:
        kernel = jnp.eye(*quantizer["input_projection"]["direction"].shape)
        quantizer = _set_pair(quantizer, ("input_projection", "output_projection"), kernel)
    if "in_projections" in quantizer:
        kernel = _seen_first(*quantizer["in_projections"]["direction"].shape)
        quantizer = _set_pair(quantizer, ("in_projections", "out_projections"), kernel)
        bias = quantizer["in_projections"]["bias"].at[..., -1].set(1)
        quantizer["in_projections"] = quantizer["in_projections"] | {"bias": bias}
        quantizer["codebooks"] = quantizer["codebooks"].at[..., -1].set(1)
    return quantizer


def _seen_first(num_quantizers: int, rvq_dim: int, codebook_dim: int) -> jax.Array:
    """Kernels [Q, rvq_dim, codebook_dim] that pick dimensions; the last column is left zero.

    A quarter of the quantizers at a time share a block of dimensions, dealt out like cards: first
    one block, then the next, and the same two again for what is left of them. With directions
    drawn at random, each quantizer sees a random tenth of the residual's energy, and the last ones
    hardly anything that the ones before had not seen.
    """
    seen = min(codebook_dim - 1, rvq_dim)
    group = max(1, num_quantizers // 4)
    stride = min(group, rvq_dim // max(1, seen))  # where they are few, blocks overlap
    columns = np.arange(seen)
    kernel = np.zeros((num_quantizers, rvq_dim, codebook_dim), np.float32)
    for n in range(num_quantizers):
        start = n // group % 2 * group * seen + n % group
        kernel[n, (start + columns * stride) % rvq_dim, columns] = 1
    return jnp.asarray(kernel)


def _set_pair(quantizer: dict[str, Any], names: tuple[str, str], kernel: jax.Array) -> Any:
    """Sets a projection to `kernel` and, where the shapes allow, the second to its transpose."""
    quantizer = dict(quantizer)
    for name, value in zip(names, (kernel, kernel.swapaxes(-1, -2)), strict=True):
        if name in quantizer and quantizer[name]["direction"].shape == value.shape:
            quantizer[name] = quantizer[name] | _weight_norm(value, quantizer[name]["direction"])
    return quantizer


def _weight_norm(kernel: jax.Array, random: jax.Array) -> dict[str, jax.Array]:
    """Directions and gains of a kernel; a column of zeros keeps its random direction."""
    gain = jnp.linalg.norm(kernel, axis=-2)
    return {"direction": jnp.where(gain[..., None, :] > 0, kernel, random), "gain": gain}
