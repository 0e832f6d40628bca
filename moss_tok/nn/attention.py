"""Causal sliding-window attention: dense, blocked, by kernels of accelerators, and over caches.

Shapes: q, k, v are [B, N, T, H]; see the legend in `moss_tok/__init__.py`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moss_tok.nn import kernels
from moss_tok.nn.cache import Cache

# Below this many keys per query the whole score matrix is cheaper than a loop over blocks.
_DENSE_FRAMES = 1024


_BLOCK_FRAMES = (64, 256)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: int,
    implementation: str = "auto",
    precision: str | None = None,
) -> jax.Array:
    """Attention in which frame t sees frames max(0, t - window + 1) .. t.

    Args:
      q: Queries [B, N, T, H].
      k: Keys [B, N, T, H].
      v: Values [B, N, T, H].
      window: Number of keys a query sees, its own included.
      implementation: "dense" builds [T, T] scores; "blocked" walks over blocks of queries and
        needs memory linear in T, backward too; "splash" is a TPU kernel that skips what the
        window hides (on CPUs it is interpreted, which is slow); "cudnn" is that of NVIDIA GPUs, in
        bfloat16 or float16; "auto": see `choose`.
      precision: Matmul precision.

    Returns:
      [B, N, T, H] in q's dtype.

    Raises:
      ValueError: "cudnn" without such a GPU, type or head size.
    """
    num_frames = q.shape[2]
    if isinstance(num_frames, int):  # else of an export, of any size
        window = min(window, num_frames)
    if implementation == "auto":
        implementation = choose(num_frames, q.shape[-1], q.dtype)
    if implementation == "dense":
        t = jnp.arange(num_frames)
        mask = (t[None] <= t[:, None]) & (t[None] > t[:, None] - window)
        return _masked_attention(q, k, v, mask, precision)
    if implementation == "blocked":
        return _blocked(q, k, v, window, precision)
    kernel = {"splash": kernels.splash, "cudnn": kernels.cudnn}[implementation]
    return kernels.per_device(
        functools.partial(kernel, window=window, precision=precision), q, k, v
    )


def choose(num_frames: int, head_dim: int, dtype: Any) -> str:
    """The implementation of "auto": the accelerator's kernel, elsewhere dense for short sequences.

    The devices are those of the mesh that is set (`jax.set_mesh`), else jax's default ones.
    """
    if kernels.on("tpu"):
        return "splash"
    if not kernels.cudnn_lacks(head_dim, dtype):
        return "cudnn"
    return "dense" if num_frames <= _DENSE_FRAMES else "blocked"


def _masked_attention(q, k, v, mask, precision):
    """Softmax attention with mask [T, S] or [B, 1, T, S]; scores and softmax in float32."""
    weights = jax.nn.softmax(_scores(q, k, mask, precision), axis=-1)
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
    """`attend` for a chunk of streams: to the frames before it, and to its own.

    Args:
      q: Queries [B, N, T, H] of the frames start .. start + T - 1.
      k: Their keys [B, N, T, H].
      v: Their values [B, N, T, H].
      past: Keys and values before them: one layer of a cache, [B, N, window - 1, H].
      start: [B] frames of each stream before this chunk.
      precision: Matmul precision.

    Returns:
      [B, N, T, H] in q's dtype.
    """
    num_frames, size, past = q.shape[2], past.keys.shape[2], (past.keys, past.values)
    start = start[:, None, None, None]  # [B, 1, 1, 1]
    if num_frames > _block_frames(size + 1):
        order = (start[..., 0] + jnp.arange(size)) % max(size, 1)  # oldest first
        past = tuple(jnp.take_along_axis(x, order[..., None], axis=2) for x in past)
        return _blocked(q, k, v, size + 1, precision, past, start)
    t = jnp.arange(num_frames)[:, None]
    ring, own = jnp.arange(size), jnp.arange(num_frames)
    age = (start - 1 - ring) % max(size, 1)  # of each place, 0: the frame before the chunk
    seen = (age < start) & (age + t + 1 <= size)  # [B, 1, T, R]
    seen_own = jnp.broadcast_to((own <= t) & (own >= t - size), (*seen.shape[:-1], num_frames))
    parts = [(past[0], past[1], seen), (k, v, seen_own)]
    scores = [_scores(q, keys, mask, precision) for keys, _, mask in parts]
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(v.dtype)
    weights = jnp.split(weights, [size], axis=-1)
    outputs = [_mix(w, values, precision) for w, (_, values, _) in zip(weights, parts, strict=True)]
    return outputs[0] + outputs[1]


def _block_frames(window: int) -> int:
    return int(np.clip(window // 4, *_BLOCK_FRAMES))


def _blocked(q, k, v, window, precision, past=None, start=0):
    """Scans over blocks of queries; the carry holds the last window - 1 keys and values.

    `past` are those before the first query, of which the last `start` exist.
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
        k, v = (jnp.concatenate([p, x], axis=2) for p, x in zip(past, (k, v), strict=True))
        exists = j + index * size >= history - start
        out = _masked_attention(q, k, v, in_window & exists, precision)
        return (k[:, :, size:], v[:, :, size:]), out

    if past is None:
        past = (jnp.zeros((batch, heads, history, dim), x.dtype) for x in (k, v))
    blocks = (jnp.arange(num_blocks), split(q), split(k), split(v))
    _, out = jax.lax.scan(step, tuple(past), blocks)
    out = jnp.moveaxis(out, 0, 2).reshape(batch, heads, num_blocks * size, dim)
    return out[:, :, :num_frames]
