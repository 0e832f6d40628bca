"""Attention kernels of accelerators: splash on TPUs, cuDNN on NVIDIA GPUs.

Shapes: q, k, v are [B, N, T, H]; see the legend in `moss_tok/__init__.py`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from moss_tok import sharding
from moss_tok.nn.compute import BF16_PRODUCTS

_RESIDUALS = "attention"  # name of the residuals of the splash kernel's backward pass
_LANES = 128  # block sizes of the splash kernel are multiples of this
_MAX_BLOCK_LANES = 8  # largest block size, in multiples of _LANES
_CUDNN_CAPABILITY = 8.0  # compute capability of Ampere GPUs
_CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"  # name of jax's primitive


def saveable(primitive: Any, *shapes: Any, **params: Any) -> bool:
    """Policy for `jax.checkpoint` that saves the residuals of the kernels' backward passes."""
    is_residual = jax.checkpoint_policies.save_only_these_names(_RESIDUALS)
    return primitive.name == _CUDNN_FORWARD or is_residual(primitive, *shapes, **params)


def devices_are(kind: str) -> bool:
    """Whether the name of the device kind starts with `kind`, "tpu" or "nvidia"."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is None:
        device = jax.devices()[0]
    return device.device_kind.lower().startswith(kind)


def missing_for_cudnn(head_dim: int, dtype: Any) -> str:
    """The requirement of the cuDNN kernel that is not met here; "" if it can be used."""
    if not devices_are("nvidia"):
        return "an NVIDIA GPU"
    if float(jax.devices()[0].compute_capability) < _CUDNN_CAPABILITY:
        return f"compute capability {_CUDNN_CAPABILITY}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"bfloat16 or float16, not {jnp.dtype(dtype)}"
    if head_dim % 8 or head_dim > 128:
        return f"a head size that is a multiple of 8 up to 128, not {head_dim}"
    return ""


def per_device(kernel, q, k, v):
    """Runs a kernel on each device of the mesh, for the device's items and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(q, k, v)
    batch_axes = sharding.dividing_axes(mesh, "batch", q.shape[0])
    head_axes = sharding.dividing_axes(mesh, "heads", q.shape[1])
    spec = PartitionSpec(batch_axes, head_axes)
    # check_vma is off because kernels do not declare their varying axes.
    kernel = jax.shard_map(kernel, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    return kernel(q, k, v)


def splash(q, k, v, *, window, precision):
    """TPU kernel that skips blocks outside the window; see `attention.attend`."""
    from jax.experimental.pallas.ops.tpu import splash_attention  # slow to import, for TPUs only

    heads, num_frames, dim = q.shape[1:]
    block = splash_block(num_frames, window)
    padding = -num_frames % block
    size = num_frames + padding
    mask = splash_attention.LocalMask((size, size), (window - 1, 0), offset=0)
    # In the default layout, the 64 lanes of a head would be padded to 128.
    layout = splash_attention.QKVLayout.SEQ_MINOR
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks = {f"block_{name}": block for name in names}
    layouts = {f"{name}_layout": layout for name in "qkv"}
    kernel = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention.BlockSizes(**blocks, **layouts),
        residual_checkpoint_name=_RESIDUALS,
        interpret=not devices_are("tpu"),
    )
    # Pallas supports "default" and "highest" only; bfloat16 products are the default on TPUs.
    if precision in (None, BF16_PRODUCTS):
        precision = "default"
    elif precision == "high":
        precision = "highest"
    q = pad_frames(q * dim**-0.5, padding)
    k = pad_frames(k, padding)
    v = pad_frames(v, padding)
    with jax.default_matmul_precision(precision):
        out = jax.vmap(kernel)(q, k, v)
    return out[:, :, :num_frames]


def cudnn(q, k, v, *, window, precision):
    """Kernel for NVIDIA GPUs in bfloat16 or float16; see `attention.attend`."""
    del precision  # always 16-bit products, 32-bit sums
    missing = missing_for_cudnn(q.shape[-1], q.dtype)
    if missing:
        raise ValueError(f"attention=cudnn needs {missing}; attention=auto uses what is available")
    num_frames = q.shape[2]
    local_window = (window - 1, 0) if window < num_frames else None

    def prepare(x):
        # The backward pass needs an even number of frames.
        return pad_frames(x, num_frames % 2).swapaxes(1, 2)

    out = jax.nn.dot_product_attention(
        prepare(q),
        prepare(k),
        prepare(v),
        is_causal=True,
        local_window_size=local_window,
        implementation="cudnn",
    )
    return out[:, :num_frames].swapaxes(1, 2)


def pad_frames(x, number):
    """Appends `number` zero frames to [B, N, T, H]; causal queries do not attend to them."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, number), (0, 0)))


def splash_block(num_frames: int, window: int) -> int:
    """Frames per block of the splash kernel: few large blocks, with little padding."""
    window_lanes = math.ceil(window / _LANES)
    max_frames = int(np.clip(window_lanes, 2, _MAX_BLOCK_LANES)) * _LANES
    num_blocks = math.ceil(num_frames / max_frames)
    return math.ceil(num_frames / (num_blocks * _LANES)) * _LANES
