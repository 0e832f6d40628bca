"""Initial parameters of a codec, chosen so that a small codec learns pitch within minutes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft
from flax import linen as nn

from moss_tok.codec.config import CodecConfig, ModuleConfig, TransformerConfig
from moss_tok.codec.model import CodecModel

# Scales speech (RMS about 0.05) to the magnitude of the first blocks' outputs.
_INPUT_GAIN = 2.0


def init_params(codec: CodecConfig, key: jax.Array) -> Any:
    """Initial float32 parameters; `_low_pass` and `_paired` describe their values."""
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
    """Initializes the projections of a side as a linear codec that keeps low frequencies.

    The first projection is the DCT of a patch, the later ones keep the first dimensions, and the
    projections of the decoder are the transposes. The blocks then learn to correct a waveform that
    is already roughly right. From random projections a small model does not find even the principal
    components within hours; its audio is noise of the right spectrum, without pitch
    (experiments/notebook.md).
    """
    stages = dict(stages)
    for number, module in enumerate(modules):
        if not isinstance(module, TransformerConfig):
            continue
        kernels = {
            "input_projection": np.eye(module.input_dim, module.model_dim),
            "output_projection": np.eye(module.model_dim, module.output_dim),
        }
        if side == "encoder" and number == 1:
            kernels["input_projection"] = _INPUT_GAIN * _dct(module.input_dim, module.model_dim)
        if side == "decoder" and number == len(modules) - 2:
            dct = _dct(module.output_dim, module.model_dim)
            kernels["output_projection"] = dct.T / _INPUT_GAIN
        stage = dict(stages[f"stage_{number}"])
        for name, kernel in kernels.items():
            if name in stage:
                stage[name] = {"kernel": jnp.asarray(kernel, jnp.float32)}
        stages[f"stage_{number}"] = stage
    return stages


def _dct(num_samples: int, num_coefficients: int) -> np.ndarray:
    """Orthonormal DCT-II [samples, coefficients], truncated or padded with zeros."""
    kernel = np.zeros((num_samples, num_coefficients))
    num_kept = min(kernel.shape)
    dct = scipy.fft.dct(np.eye(num_samples), norm="ortho")
    kernel[:, :num_kept] = dct[:, :num_kept]
    return kernel


def _paired(quantizer: dict[str, Any]) -> dict[str, Any]:
    """Makes every input projection orthonormal, and its output projection the transpose.

    With unrelated projections, the value of a code does not resemble the residual that it replaces,
    and the losses grow instead of falling; large codebook entries have the same effect. The outer
    projections keep the first dimensions of the latents, as in `_low_pass`; for those of the
    quantizers see `_dimension_kernels`.

    The last dimension of each quantizer starts as the constant 1 in both residuals and codes. Codes
    are chosen by angle, which ignores the magnitude of the residual: quiet frames would get codes
    of any magnitude. Among vectors that all end in 1, the nearest in angle is about the nearest in
    distance.
    """
    quantizer = quantizer | {"codebooks": 0.1 * quantizer["codebooks"]}
    if "input_projection" in quantizer:
        kernel = jnp.eye(*quantizer["input_projection"]["direction"].shape)
        quantizer = _set_pair(quantizer, ("input_projection", "output_projection"), kernel)
    if "in_projections" in quantizer:
        kernel = _dimension_kernels(*quantizer["in_projections"]["direction"].shape)
        quantizer = _set_pair(quantizer, ("in_projections", "out_projections"), kernel)
        bias = quantizer["in_projections"]["bias"].at[..., -1].set(1)
        quantizer["in_projections"] = quantizer["in_projections"] | {"bias": bias}
        quantizer["codebooks"] = quantizer["codebooks"].at[..., -1].set(1)
    return quantizer


def _dimension_kernels(num_quantizers: int, rvq_dim: int, codebook_dim: int) -> jax.Array:
    """Kernels [Q, rvq_dim, codebook_dim] that select dimensions; the last column stays zero.

    The quantizers form four groups. Those of a group divide a block of dimensions among themselves
    in turn: the first group takes the first block, the second group the next one, and the third and
    fourth groups take the same two blocks again, to code the remaining residual. With random
    directions, each quantizer would get a random tenth of the residual's energy, and earlier
    quantizers would have coded nearly everything that the last ones get.
    """
    num_dims = min(codebook_dim - 1, rvq_dim)  # per quantizer
    group_size = max(1, num_quantizers // 4)
    stride = min(group_size, rvq_dim // max(1, num_dims))  # blocks overlap if dimensions are few
    columns = np.arange(num_dims)
    kernel = np.zeros((num_quantizers, rvq_dim, codebook_dim), np.float32)
    for quantizer in range(num_quantizers):
        block = quantizer // group_size % 2
        start = block * group_size * num_dims + quantizer % group_size
        rows = (start + columns * stride) % rvq_dim
        kernel[quantizer, rows, columns] = 1
    return jnp.asarray(kernel)


def _set_pair(quantizer: dict[str, Any], names: tuple[str, str], kernel: jax.Array) -> Any:
    """Sets the first projection to `kernel` and the second to its transpose, if the shapes fit."""
    quantizer = dict(quantizer)
    for name, value in zip(names, (kernel, kernel.swapaxes(-1, -2)), strict=True):
        projection = quantizer.get(name)
        if projection is not None and projection["direction"].shape == value.shape:
            quantizer[name] = projection | _weight_norm(value, projection["direction"])
    return quantizer


def _weight_norm(kernel: jax.Array, random: jax.Array) -> dict[str, jax.Array]:
    """Directions and gains of a kernel; zero columns take their directions from `random`."""
    gain = jnp.linalg.norm(kernel, axis=-2)
    direction = jnp.where(gain[..., None, :] > 0, kernel, random)
    return {"direction": direction, "gain": gain}
