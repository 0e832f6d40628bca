"""Causal sliding-window attention: dense, blocked, with accelerator kernels, and over caches.

Shapes: q, k, v are [B, N, T, H]; see the legend in `moss_tok/__init__.py`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moss_tok.nn import kernels
from moss_tok.nn.cache import Cache

# Up to this many frames, the full score matrix is cheaper than a loop over blocks.
_DENSE_FRAMES = 1024
# Up to this many frames, it is cheaper than a kernel on TPUs, which pads them to 128.
_SHORT_FRAMES = 64

_BLOCK_FRAMES = (64, 256)  # smallest and largest block of queries


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: int,
    implementation: str = "auto",
    precision: str | None = None,
) -> jax.Array:
    """Attention in which frame t attends to frames max(0, t - window + 1) .. t.

    Args:
      q: Queries [B, N, T, H].
      k: Keys [B, N, T, H].
      v: Values [B, N, T, H].
      window: Number of keys a query attends to, its own included.
      implementation: "dense" computes [T, T] scores; "blocked" loops over blocks of queries and
        needs memory linear in T, also in the backward pass; "splash" is a TPU kernel that skips
        blocks outside the window (on CPUs it is interpreted, which is slow); "cudnn" is a kernel
        for NVIDIA GPUs, in bfloat16 or float16; "auto" chooses one, see `choose`.
      precision: Matmul precision.

    Returns:
      [B, N, T, H] in q's dtype.

    Raises:
      ValueError: "cudnn" does not support the GPU, the dtype or the head size.
    """
    num_frames = q.shape[2]
    if isinstance(num_frames, int):  # symbolic in an export
        window = min(window, num_frames)
    if implementation == "auto":
        implementation = choose(num_frames, q.shape[-1], q.dtype)
    if implementation == "dense":
        frames = jnp.arange(num_frames)
        t = frames[:, None]
        s = frames[None]
        mask = (s <= t) & (s > t - window)
        return _masked_attention(q, k, v, mask, precision)
    if implementation == "blocked":
        return _blocked(q, k, v, window, precision)
    kernel = {"splash": kernels.splash, "cudnn": kernels.cudnn}[implementation]
    return kernels.per_device(
        functools.partial(kernel, window=window, precision=precision), q, k, v
    )


def choose(num_frames: int, head_dim: int, dtype: Any) -> str:
    """The implementation that "auto" uses.

    It is the kernel of the accelerator if there is one, on TPUs for more than 64 frames; else
    "dense" for up to 1024 frames and "blocked" for more. The devices are those of the current mesh
    (`jax.set_mesh`), or without a mesh the default devices of jax.
    """
    if kernels.devices_are("tpu"):
        return "dense" if num_frames <= _SHORT_FRAMES else "splash"
    if not kernels.missing_for_cudnn(head_dim, dtype):
        return "cudnn"
    return "dense" if num_frames <= _DENSE_FRAMES else "blocked"


def _masked_attention(q, k, v, mask, precision):
    """Softmax attention with mask [T, S] or [B, 1, T, S]; scores and softmax in float32."""
    scores = _scores(q, k, mask, precision)
    weights = jax.nn.softmax(scores, axis=-1)
    return _mix(weights.astype(v.dtype), v, precision)


def _scores(q, k, mask, precision):
    scores = jnp.einsum(
        "bnth,bnsh->bnts", q, k, precision=precision, preferred_element_type=jnp.float32
    )
    return jnp.where(mask, scores * q.shape[-1] ** -0.5, -jnp.inf)


def _mix(weights, v, precision):
    return jnp.einsum("bnts,bnsh->bnth", weights, v, precision=precision)


def attend_cached(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    past: Cache,
    start: jax.Array,
    precision: str | None = None,
) -> jax.Array:
    """`attend` for a chunk of streams: over the cached frames before the chunk, and over the chunk.

    Args:
      q: Queries [B, N, T, H] of the frames start .. start + T - 1.
      k: Keys [B, N, T, H] of these frames.
      v: Values [B, N, T, H] of these frames.
      past: Keys and values of the frames before: one layer of a cache, [B, N, window - 1, H].
      start: [B], number of frames of each stream before this chunk.
      precision: Matmul precision.

    Returns:
      [B, N, T, H] in q's dtype.
    """
    num_frames = q.shape[2]
    size = past.num_frames
    start = start[:, None, None, None]  # [B, 1, 1, 1]
    if num_frames > _block_frames(size + 1):
        order = (start[..., 0] + jnp.arange(size)) % max(size, 1)  # oldest first
        order = order[..., None]  # [B, 1, R, 1]
        past_keys = jnp.take_along_axis(past.keys, order, axis=2)
        past_values = jnp.take_along_axis(past.values, order, axis=2)
        return _blocked(q, k, v, size + 1, precision, (past_keys, past_values), start)
    t = jnp.arange(num_frames)[:, None]
    slot = jnp.arange(size)
    age = (start - 1 - slot) % max(size, 1)  # of the frame in each slot; 0: just before the chunk
    past_mask = (age < start) & (age + t + 1 <= size)  # [B, 1, T, R]
    s = jnp.arange(num_frames)
    chunk_mask = (s <= t) & (s >= t - size)
    chunk_mask = jnp.broadcast_to(chunk_mask, (*past_mask.shape[:-1], num_frames))
    past_scores = _scores(q, past.keys, past_mask, precision)
    chunk_scores = _scores(q, k, chunk_mask, precision)
    scores = jnp.concatenate([past_scores, chunk_scores], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    past_weights, chunk_weights = jnp.split(weights, [size], axis=-1)
    return _mix(past_weights, past.values, precision) + _mix(chunk_weights, v, precision)


def _block_frames(window: int) -> int:
    return int(np.clip(window // 4, *_BLOCK_FRAMES))


def _blocked(q, k, v, window, precision, past=None, start=0):
    """Scans over blocks of queries; the carry holds the last window - 1 keys and values.

    `past` holds the keys and values before the first query, oldest first; the last `start` of them
    exist.
    """
    batch, heads, num_frames, dim = q.shape
    size = _block_frames(window)
    num_blocks = -(-num_frames // size)
    history = window - 1

    def split(x):
        x = kernels.pad_frames(x, num_blocks * size - num_frames)
        return jnp.moveaxis(x.reshape(batch, heads, num_blocks, size, dim), 2, 0)

    i = jnp.arange(size)[:, None]
    j = jnp.arange(history + size)[None]
    in_window = (j >= i) & (j <= i + history)

    @jax.checkpoint
    def step(past, block):
        index, q, k, v = block
        k = jnp.concatenate([past[0], k], axis=2)
        v = jnp.concatenate([past[1], v], axis=2)
        exists = j + index * size >= history - start
        out = _masked_attention(q, k, v, in_window & exists, precision)
        return (k[:, :, size:], v[:, :, size:]), out

    if past is None:
        shape = (batch, heads, history, dim)
        past = (jnp.zeros(shape, k.dtype), jnp.zeros(shape, v.dtype))
    blocks = (jnp.arange(num_blocks), split(q), split(k), split(v))
    _, out = jax.lax.scan(step, past, blocks)
    out = jnp.moveaxis(out, 0, 2).reshape(batch, heads, num_blocks * size, dim)
    return out[:, :, :num_frames]
