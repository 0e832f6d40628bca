"""Products of activations with weights, at a chosen precision."""

import functools

import jax
import jax.numpy as jnp

from moss_tok.nn.compute import BF16_PRODUCTS


def einsum(
    spec: str,
    x: jax.Array,
    weights: jax.Array,
    precision: str,
    out_dtype: str | None = None,
) -> jax.Array:
    """`jnp.einsum` of two operands. Each axis must occur in exactly two of the terms of `spec`.

    Args:
      spec: Such as "btd,df->btf".
      x: Activations.
      weights: Weights.
      precision: Matmul precision of jax.lax. With "BF16_BF16_F32", the operands of this product and
        of the two products of the backward pass are rounded to bfloat16.
      out_dtype: Type of the result; None: that of the operands.

    Returns:
      The product.
    """
    if precision == BF16_PRODUCTS:
        dtype = out_dtype or jnp.result_type(x, weights)
        return _bf16_einsum(spec, x, weights).astype(dtype)
    return jnp.einsum(spec, x, weights, precision=precision, preferred_element_type=out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _bf16_einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    # The casts are explicit because XLA for CPUs computes a dot with this algorithm in float32, but
    # uses the matrix unit (AMX) for bfloat16 operands with a float32 result.
    a = a.astype(jnp.bfloat16)
    b = b.astype(jnp.bfloat16)
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _bf16_einsum_fwd(spec, a, b):
    return _bf16_einsum(spec, a, b), (a, b)


def _bf16_einsum_bwd(spec, operands, gradient):
    a, b = operands
    terms, out = spec.split("->")
    a_term, b_term = terms.split(",")
    a_gradient = _bf16_einsum(f"{out},{b_term}->{a_term}", gradient, b)
    b_gradient = _bf16_einsum(f"{out},{a_term}->{b_term}", gradient, a)
    return a_gradient.astype(a.dtype), b_gradient.astype(b.dtype)


_bf16_einsum.defvjp(_bf16_einsum_fwd, _bf16_einsum_bwd)
