"""Causal sliding-window attention and rotary position embedding in fixed point.

Shapes: q, k, v are [B, N, T, H]; see the legend in `moss_tok/__init__.py`.
"""

import functools
import math
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from moss_tok import summary

# Below this many keys per query the whole score matrix is cheaper than a loop over blocks.
_DENSE_FRAMES = 1024
_BLOCK_FRAMES = (64, 256)
_RESIDUALS = "attention"  # what the splash kernel keeps for its backward pass
_LANES = 128  # the splash kernel's blocks are multiples of this,
_LARGEST_BLOCK = 8  # at most so many
_CUDNN_CAPABILITY = 8.0  # of GPUs from Ampere on
_CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"  # jax's primitive


def rope_table(positions: jax.Array, head_dim: int, max_period: float) -> jax.Array:
    """Sines and cosines of the rotary phases.

    The phase is (position * frequency) modulo one turn, computed in fixed point: the frequency, in
    turns per frame, is a 64-bit fraction in two uint32 words, so the product wraps exactly and a
    stream of days is as precise as its first second. Float32 phases err by 0.2 rad after a day.

    Args:
      positions: [..., T] integers >= 0.
      head_dim: H.
      max_period: Longest period in frames over 2 pi.

    Returns:
      [2, ..., T, H / 2] float32: cosines, sines.
    """
    exponents = np.arange(head_dim // 2, dtype=np.float64) * 2 / head_dim
    turns = np.float64(max_period) ** -exponents / (2 * np.pi)
    words = [int(t * 2.0**64) for t in turns]
    high = jnp.asarray(np.array([w >> 32 for w in words], np.uint32))
    low = np.array([w & 0xFFFFFFFF for w in words], np.uint32)
    p = positions.astype(jnp.uint32)[..., None]
    # Wraps modulo 2^32, that is modulo one turn. int32 centres the phase on zero.
    phase = (p * high + _multiply_high(p, low)).astype(jnp.int32)
    radians = phase.astype(jnp.float32) * np.float32(2 * np.pi / 2**32)
    return jnp.stack([jnp.cos(radians), jnp.sin(radians)])


def _multiply_high(a: jax.Array, b: np.ndarray) -> jax.Array:
    """Upper 32 bits of the 64-bit product of uint32 values, by halves of 16 bits."""
    a_high, a_low = a >> 16, a & 0xFFFF
    b_high, b_low = jnp.asarray(b >> 16), jnp.asarray(b & 0xFFFF)
    middle = a_high * b_low + (a_low * b_low >> 16)
    carry = a_low * b_high + (middle & 0xFFFF)
    return a_high * b_high + (middle >> 16) + (carry >> 16)


def apply_rope(x: jax.Array, table: jax.Array) -> jax.Array:
    """Rotates the halves of each head of `x` [B, N, T, H] in float32; result in x's dtype."""
    cos, sin = table
    a, b = (half.astype(jnp.float32) for half in jnp.split(x, 2, axis=-1))
    rotated = [half.astype(x.dtype) for half in (a * cos - b * sin, a * sin + b * cos)]
    return jnp.concatenate(rotated, axis=-1)


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
    kernel = {"splash": _splash_kernel, "cudnn": _cudnn_kernel}[implementation]
    return _per_device(functools.partial(kernel, window=window, precision=precision), q, k, v)


def saveable(primitive: Any, *shapes: Any, **params: Any) -> bool:
    """Policy of `jax.checkpoint`: what the kernels keep for their backward passes."""
    named = jax.checkpoint_policies.save_only_these_names(_RESIDUALS)
    return primitive.name == _CUDNN_FORWARD or named(primitive, *shapes, **params)


def choose(num_frames: int, head_dim: int, dtype: Any) -> str:
    """The implementation of "auto": the accelerator's kernel, elsewhere dense for short sequences.

    The devices are those of the mesh that is set (`jax.set_mesh`), else jax's default ones.
    """
    if _on("tpu"):
        return "splash"
    if not _cudnn_lacks(head_dim, dtype):
        return "cudnn"
    return "dense" if num_frames <= _DENSE_FRAMES else "blocked"


def _on(kind: str) -> bool:
    """Whether the devices' kind begins so: "tpu" or "nvidia"."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    found = device.device_kind if device is not None else jax.devices()[0].device_kind
    return found.lower().startswith(kind)


def _cudnn_lacks(head_dim: int, dtype: Any) -> str:
    """What the cuDNN kernel would need and has not; nothing: it can be used."""
    if not _on("nvidia"):
        return "an NVIDIA GPU"
    if float(jax.devices()[0].compute_capability) < _CUDNN_CAPABILITY:
        return f"compute capability {_CUDNN_CAPABILITY}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"bfloat16 or float16, not {jnp.dtype(dtype)}"
    if head_dim % 8 or head_dim > 128:
        return f"a multiple of 8 up to 128 as head size, not {head_dim}"
    return ""


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


class Span(NamedTuple):
    """Which frames of each stream a chunk holds: the first is `start` [B], `count` [B] are real."""

    start: jax.Array
    count: jax.Array


@flax.struct.dataclass
class Cache:
    """Keys and values of the last R = window - 1 frames of streams, for all layers of a stage.

    Both are [L, B, N, R, H], rings: frame t lies at t mod R.
    """

    keys: jax.Array
    values: jax.Array

    def __repr__(self) -> str:
        return summary.describe_arrays("Cache", keys=self.keys, values=self.values)

    @property
    def num_frames(self) -> int:
        """R."""
        return self.keys.shape[-2]

    def layer(self, index: jax.Array) -> "Cache":
        """One layer: [B, N, R, H]."""
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), self)

    def replace_layer(self, index: jax.Array, layer: "Cache") -> "Cache":
        """With another layer [B, N, R, H] at `index`."""
        put = jax.lax.dynamic_update_index_in_dim
        return jax.tree.map(lambda x, new: put(x, new, index, 0), self, layer)

    def fresh(self, span: Span, k: jax.Array, v: jax.Array) -> "Cache":
        """What is kept of a chunk's k, v [B, N, T, H] for `write`; this is one layer.

        The chunk itself, or, if it has more than R frames, the layer as it is next.
        """
        num_frames, size = k.shape[2], self.num_frames
        if num_frames <= size:
            return Cache(k, v)
        first = span.count[:, None] - size  # of the last R frames, in the chunk
        i = first + (jnp.arange(size) - span.start[:, None] - first) % max(size, 1)
        i = i[:, None, :, None]  # [B, 1, R, 1]: what comes to each place, below 0: nothing

        def put(ring, new):
            new = jnp.take_along_axis(new, jnp.maximum(i, 0), axis=2)
            return jnp.where(i >= 0, new.astype(ring.dtype), ring)

        return Cache(put(self.keys, k), put(self.values, v))

    def write(self, span: Span, fresh: "Cache") -> "Cache":
        """Puts in what `fresh` kept of a chunk of at most R frames, of all layers."""
        batch, size, num_frames = self.keys.shape[1], self.num_frames, fresh.num_frames
        i = jnp.arange(num_frames)
        place = (span.start[:, None] + i) % size  # [B, T]
        place = jnp.where(i < span.count[:, None], place, size)  # nowhere

        def put(ring, new):
            rows = ring.at[:, jnp.arange(batch)[:, None], :, place]
            return rows.set(jnp.moveaxis(new, (1, 3), (0, 1)).astype(ring.dtype), mode="drop")

        return Cache(put(self.keys, fresh.keys), put(self.values, fresh.values))


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
        x = _pad_frames(x, num_blocks * size - num_frames)
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


def _pad_frames(x, number):
    """Zeros behind the frames of [B, N, T, H], where no query of ours looks."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, number), (0, 0)))


def _per_device(kernel, q, k, v):
    """A kernel of the accelerator's, on each device of the mesh for its items and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(q, k, v)
    batch, heads = _split(mesh, ("data", "fsdp"), q.shape[0]), _split(mesh, ("tensor",), q.shape[1])
    spec = PartitionSpec(batch, heads)
    # Without the check of varying axes: kernels do not tell theirs.
    kernel = jax.shard_map(kernel, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    return kernel(q, k, v)


def split_items(x: jax.Array) -> jax.Array:
    """[B, ...] as it is; on a mesh, its items go where the batch's are.

    Without being told, XLA also splits the width of activations, as that of parameters is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    told = any(kind != jax.sharding.AxisType.Auto for kind in mesh.axis_types)
    batch = None if mesh.empty or told else _split(mesh, ("data", "fsdp"), x.shape[0])
    if batch is None:
        return x
    others = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(batch, *others))


def _split(mesh, names, size):
    """Those axes of the mesh, if they divide `size`; else None: not split."""
    names = tuple(name for name in names if name in mesh.shape)
    return names if names and size % math.prod(mesh.shape[n] for n in names) == 0 else None


def _splash_kernel(q, k, v, *, window, precision):
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
        interpret=not _on("tpu"),
    )
    precision = "highest" if precision == "high" else precision or "default"  # Pallas has no high
    with jax.default_matmul_precision(precision):
        out = jax.vmap(kernel)(*(_pad_frames(x, padding) for x in (q * dim**-0.5, k, v)))
    return out[:, :, :num_frames]


def _cudnn_kernel(q, k, v, *, window, precision):
    del precision  # products of 16 bits, sums of 32
    if lacks := _cudnn_lacks(q.shape[-1], q.dtype):
        raise ValueError(f"attention=cudnn needs {lacks}; attention=auto takes what there is")
    num_frames = q.shape[2]
    seen = (window - 1, 0) if window < num_frames else None
    # Its backward pass wants an even number.
    q, k, v = (_pad_frames(x, num_frames % 2).swapaxes(1, 2) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=seen, implementation="cudnn"
    )
    return out[:, :num_frames].swapaxes(1, 2)


def splash_block(num_frames: int, window: int) -> int:
    """Frames in a block of the splash kernel: few large blocks, with little padding."""
    largest = int(np.clip(-(-window // _LANES), 2, _LARGEST_BLOCK)) * _LANES
    num_blocks = -(-num_frames // largest)
    return -(-num_frames // (num_blocks * _LANES)) * _LANES
