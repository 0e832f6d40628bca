"""Attention kernels of accelerators: splash on TPUs, cuDNN on NVIDIA GPUs.

Shapes: q, k, v are [B, N, T, H]; see the legend in `moss_tok/__init__.py`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from moss_tok import sharding

_RESIDUALS = "attention"  # what the splash kernel keeps for its backward pass
_LANES = 128  # the splash kernel's blocks are multiples of this,
_LARGEST_BLOCK = 8  # at most so many
_CUDNN_CAPABILITY = 8.0  # of GPUs from Ampere on
_CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"  # jax's primitive


def saveable(primitive: Any, *shapes: Any, **params: Any) -> bool:
    """Policy of `jax.checkpoint`: what the kernels keep for their backward passes."""
    named = jax.checkpoint_policies.save_only_these_names(_RESIDUALS)
    return primitive.name == _CUDNN_FORWARD or named(primitive, *shapes, **params)


def on(kind: str) -> bool:
    """Whether the devices' kind begins so: "tpu" or "nvidia"."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    found = device.device_kind if device is not None else jax.devices()[0].device_kind
    return found.lower().startswith(kind)


def cudnn_lacks(head_dim: int, dtype: Any) -> str:
    """What the cuDNN kernel would need and has not; nothing: it can be used."""
    if not on("nvidia"):
        return "an NVIDIA GPU"
    if float(jax.devices()[0].compute_capability) < _CUDNN_CAPABILITY:
        return f"compute capability {_CUDNN_CAPABILITY}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"bfloat16 or float16, not {jnp.dtype(dtype)}"
    if head_dim % 8 or head_dim > 128:
        return f"a multiple of 8 up to 128 as head size, not {head_dim}"
    return ""


def per_device(kernel, q, k, v):
    """A kernel of the accelerator's, on each device of the mesh for its items and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(q, k, v)
    batch, heads = (
        sharding.dividing_axes(mesh, "batch", q.shape[0]),
        sharding.dividing_axes(mesh, "heads", q.shape[1]),
    )
    spec = PartitionSpec(batch, heads)
    # Without the check of varying axes: kernels do not tell theirs.
    kernel = jax.shard_map(kernel, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    return kernel(q, k, v)


def splash(q, k, v, *, window, precision):
    """TPU kernel that skips what the window hides; see `attention.attend`."""
    from jax.experimental.pallas.ops.tpu import splash_attention  # slow to import, for TPUs only

    heads, num_frames, dim = q.shape[1:]
    block = splash_block(num_frames, window)
    padding = -num_frames % block
    size = num_frames + padding
    mask = splash_attention.LocalMask((size, size), (window - 1, 0), offset=0)
    layout = splash_attention.QKVLayout.SEQ_MINOR  # 64 lanes of a head would be padded to 128
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    kernel = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention.BlockSizes(
            **{f"block_{n}": block for n in names}, **{f"{n}_layout": layout for n in "qkv"}
        ),
        residual_checkpoint_name=_RESIDUALS,
        interpret=not on("tpu"),
    )
    precision = "highest" if precision == "high" else precision or "default"  # Pallas has no high
    with jax.default_matmul_precision(precision):
        out = jax.vmap(kernel)(*(pad_frames(x, padding) for x in (q * dim**-0.5, k, v)))
    return out[:, :, :num_frames]


def cudnn(q, k, v, *, window, precision):
    """Kernel of NVIDIA GPUs, in 16 bits; see `attention.attend`."""
    del precision  # products of 16 bits, sums of 32
    if lacks := cudnn_lacks(q.shape[-1], q.dtype):
        raise ValueError(f"attention=cudnn needs {lacks}; attention=auto takes what there is")
    num_frames = q.shape[2]
    seen = (window - 1, 0) if window < num_frames else None
    # Its backward pass wants an even number.
    q, k, v = (pad_frames(x, num_frames % 2).swapaxes(1, 2) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=seen, implementation="cudnn"
    )
    return out[:, :num_frames].swapaxes(1, 2)


def pad_frames(x, number):
    """Zeros behind the frames of [B, N, T, H], where no query of ours looks."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, number), (0, 0)))


def splash_block(num_frames: int, window: int) -> int:
    """Frames in a block of the splash kernel: few large blocks, with little padding."""
    largest = int(np.clip(-(-window // _LANES), 2, _LARGEST_BLOCK)) * _LANES
    num_blocks = -(-num_frames // largest)
    return -(-num_frames // (num_blocks * _LANES)) * _LANES
