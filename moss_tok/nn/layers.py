"""Parameters with logical axes, linear maps, GELU, and layers under one scan."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from moss_tok.nn import kernels
from moss_tok.nn.compute import ComputeConfig
from moss_tok.nn.products import einsum

_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        kernels.saveable,
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


@flax.struct.dataclass
class Matrix(nn.LogicallyPartitioned):
    """The box of a parameter that is a matrix; only these get weight decay."""


def _boxed_matrix(init: Any, axes: tuple[str, ...]) -> Any:
    def boxed(*args: Any) -> Matrix:
        return Matrix(init(*args), axes)

    return boxed


def parameter(
    module: nn.Module,
    name: str,
    shape,
    axes,
    num_in: int,
    dtype,
    scale: jax.Array | None = None,
    num_stacked: int = 0,
) -> jax.Array:
    """Declares a float32 parameter and returns it in the compute dtype.

    Args:
      module: The module that owns the parameter.
      name: Its name.
      shape: Its shape, input axes first.
      axes: Logical names of its axes.
      num_in: Number of input axes; 0 for a bias, which is initialized to zero.
      dtype: Type of the result.
      scale: float32 factor along the last output axis, applied before the cast.
      num_stacked: Number of leading axes over which matrices are stacked; each matrix is
        initialized separately.
    """
    if num_in:
        first_output = num_stacked + num_in
        lecun = nn.initializers.lecun_normal(
            in_axis=tuple(range(num_stacked, first_output)),
            out_axis=tuple(range(first_output, len(shape))),
            batch_axis=tuple(range(num_stacked)),
        )
        init = _boxed_matrix(lecun, axes)
    else:
        init = nn.with_logical_partitioning(nn.initializers.zeros, axes)
    value = module.param(name, init, shape, jnp.float32)
    if scale is not None:
        value = value * scale
    return value.astype(dtype)


def scan_layers(
    block: type[nn.Module],
    num_layers: int,
    remat: str = "none",
    unroll: int = 1,
) -> type[nn.Module]:
    """Stacks `num_layers` copies of `block` under one scan, so that compile time is constant.

    The scan runs over the blocks' parameters and their second argument. `remat` and `unroll` are as
    in `ComputeConfig`.
    """
    if remat != "none":
        block = nn.remat(block, policy=_REMAT_POLICIES[remat], prevent_cse=False)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast, nn.broadcast),
        length=num_layers,
        unroll=min(unroll, num_layers),
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def rms_norm(epsilon: float, name: str | None = None) -> nn.RMSNorm:
    """RMS norm over the last axis, with a float32 result."""
    ones = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
    return nn.RMSNorm(epsilon, jnp.float32, scale_init=ones, use_fast_variance=False, name=name)


class Projection(nn.Module):
    """Linear map without bias over the last axis."""

    features: int
    axes: tuple[str, str]
    compute: ComputeConfig
    out_dtype: Any = None  # None: the compute dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, in] -> [B, T, features]."""
        shape = (x.shape[-1], self.features)
        kernel = parameter(self, "kernel", shape, self.axes, 1, self.compute.dtype)
        x = x.astype(self.compute.dtype)
        return einsum("bti,io->bto", x, kernel, self.compute.precision, self.out_dtype)


@functools.partial(jax.checkpoint, prevent_cse=False)  # only x is saved for the backward pass
def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, computed in float32; the result has x's dtype.

    `jax.nn.gelu` uses erfc, takes a quarter longer on a CPU, and in bfloat16 rounds sqrt(1/2) to
    0.707.
    """
    y = x.astype(jnp.float32)
    y = 0.5 * y * (1 + jax.lax.erf(y * np.sqrt(0.5)))
    return y.astype(x.dtype)
