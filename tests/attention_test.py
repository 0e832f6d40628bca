"""Attention against brute force, RoPE against float64, memory linear in the length."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moss_tok import sharding
from moss_tok.nn import attention, kernels, rope


def brute_force(q, k, v, window, out_grad=None):
    """Frame by frame in float64: what comes out; or, given its gradient, those of q, k, v."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scale, out = q.shape[-1] ** -0.5, np.zeros_like(q)
    grads = np.zeros((3, *q.shape))
    for t in range(q.shape[2]):
        seen = slice(max(0, t - window + 1), t + 1)
        scores = np.einsum("bnh,bnsh->bns", q[:, :, t], k[:, :, seen]) * scale
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[:, :, t] = np.einsum("bns,bnsh->bnh", weights, v[:, :, seen])
        if out_grad is not None:
            g = np.asarray(out_grad, np.float64)[:, :, t]
            grads[2][:, :, seen] += np.einsum("bns,bnh->bnsh", weights, g)
            change = np.einsum("bnsh,bnh->bns", v[:, :, seen], g)
            change = weights * (change - (weights * change).sum(-1, keepdims=True)) * scale
            grads[0][:, :, t] += np.einsum("bns,bnsh->bnh", change, k[:, :, seen])
            grads[1][:, :, seen] += np.einsum("bns,bnh->bnsh", change, q[:, :, t])
    return out if out_grad is None else grads


def random_qkv(num_frames, seed=0, batch=2, heads=2, dim=8):
    return jax.random.normal(jax.random.key(seed), (3, batch, heads, num_frames, dim))


@pytest.mark.parametrize("implementation", ["dense", "blocked", "splash"])
@pytest.mark.parametrize(
    ("num_frames", "window"),
    [(1, 1), (5, 1), (7, 100), (64, 64), (200, 1), (200, 30), (333, 129), (130, 64)],
)
def test_agrees_with_brute_force(implementation, num_frames, window):
    q, k, v = random_qkv(num_frames)
    out = attention.attend(q, k, v, window, implementation, "highest")
    np.testing.assert_allclose(out, brute_force(q, k, v, window), atol=2e-6)


def check_gradients(attend, num_frames, window, dtype, tolerance):
    """At v1's head size, against brute force; relative to the largest value."""
    qkv = random_qkv(num_frames, dim=64, batch=1).astype(dtype)
    grad = random_qkv(num_frames, seed=1, dim=64, batch=1)[0].astype(dtype)
    out, backward = jax.vjp(attend, *qkv)
    exact = [brute_force(*qkv, window), *brute_force(*qkv, window, grad)]
    for found, expected in zip((out, *backward(grad)), exact, strict=True):
        assert found.dtype == dtype
        found = np.asarray(found, np.float64)
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * abs(expected).max())


@pytest.mark.parametrize("implementation", ["dense", "blocked", "splash"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_agrees_with_brute_force_forward_and_backward(implementation, dtype, tolerance):
    def attend(q, k, v):
        return attention.attend(q, k, v, 70, implementation, "highest")

    check_gradients(attend, 300, 70, dtype, tolerance)


@pytest.mark.skipif(not kernels.devices_are("nvidia"), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("mesh", ["", "data:1"])
@pytest.mark.parametrize(("num_frames", "window"), [(300, 70), (300, 300), (257, 60), (2, 1)])
def test_cudnn_agrees_with_brute_force(num_frames, window, mesh):
    def attend(q, k, v):
        return attention.attend(q, k, v, window)

    assert attention.choose(num_frames, 64, jnp.bfloat16) == "cudnn"
    with jax.set_mesh(sharding.make_mesh(mesh)) if mesh else contextlib.nullcontext():
        check_gradients(jax.jit(attend), num_frames, window, "bfloat16", 2e-2)


def test_tpus_use_their_kernel_unless_it_pads_much(monkeypatch):
    monkeypatch.setattr(kernels, "devices_are", lambda kind: kind == "tpu")
    assert attention.choose(33, 128, jnp.bfloat16) == "dense"
    assert attention.choose(65, 128, jnp.bfloat16) == "splash"


@pytest.mark.parametrize(("num_frames", "window"), [(300, 70), (65, 65), (65, 20), (1, 1)])
def test_cudnn_is_asked_for_the_window(num_frames, window, monkeypatch):
    """What cuDNN is given, computed by XLA."""
    compute = jax.nn.dot_product_attention

    def by_xla(q, *args, implementation, **kwargs):
        assert implementation == "cudnn" and q.shape[1] % 2 == 0
        return compute(q, *args, **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    monkeypatch.setattr(kernels, "missing_for_cudnn", lambda head_dim, dtype: "")
    qkv = random_qkv(num_frames).astype("bfloat16")
    out = attention.attend(*qkv, window)
    np.testing.assert_allclose(np.float64(out), brute_force(*qkv, window), atol=3e-2)


@pytest.mark.skipif(kernels.devices_are("nvidia"), reason="of machines without an NVIDIA GPU")
def test_cudnn_says_what_it_needs():
    q, k, v = random_qkv(8)
    with pytest.raises(ValueError, match="attention=cudnn needs an NVIDIA GPU"):
        attention.attend(q, k, v, 4, "cudnn")


@pytest.mark.parametrize("batch", [4, 3])
def test_splash_on_a_mesh(batch):
    """Also where the items do not divide by the devices."""

    def loss(qkv, implementation):
        return jnp.sum(jnp.sin(attention.attend(*qkv, 70, implementation, "highest")))

    qkv = random_qkv(100, batch=batch)
    expected = jax.grad(loss)(qkv, "dense")
    with jax.set_mesh(sharding.make_mesh("data:2,fsdp:2,tensor:2")):
        found = jax.jit(jax.grad(loss), static_argnums=1)(qkv, "splash")
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("backward", [False, True])
def test_blocked_needs_linear_memory(backward):
    def temporary_bytes(num_frames):
        def function(q, k, v):
            return attention.attend(q, k, v, 128, "blocked").sum()

        shape = jax.ShapeDtypeStruct((1, 2, num_frames, 16), jnp.float32)
        function = jax.grad(function, argnums=(0, 1, 2)) if backward else function
        compiled = jax.jit(function).lower(shape, shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(8192) <= 4.5 * temporary_bytes(2048)


def test_window_counts_the_query_itself():
    q, k, v = random_qkv(40, batch=1)
    grad = jax.grad(lambda v: attention.attend(q, k, v, 10, "blocked")[0, :, 30].sum())(v)
    touched = np.flatnonzero(np.abs(grad[0]).sum((0, 2)))
    assert touched.tolist() == list(range(21, 31))


@pytest.mark.parametrize("start", [0, 6_000, 34_560_000, 2**31 - 100])
def test_rope_phases_are_exact_far_out(start):
    """34,560,000 is a day at 400 Hz."""
    positions = start + np.arange(50)
    cos, sin = rope.rope_table(jnp.asarray(positions, jnp.uint32), 64, 10000.0)
    frequencies = 10000.0 ** (-np.arange(32) / 32)
    phases = positions[:, None].astype(np.longdouble) * frequencies.astype(np.longdouble)
    tolerance = 1e-6 if start < 2**30 else 2e-5  # float64 frequencies err by 1e-16 of 2e9 radians
    np.testing.assert_allclose(cos, np.cos(phases).astype(float), atol=tolerance)
    np.testing.assert_allclose(sin, np.sin(phases).astype(float), atol=tolerance)


def test_rope_depends_on_distance_alone():
    x, y = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))

    def product(a, b):
        tables = [rope.rope_table(jnp.array([p]), 16, 100.0) for p in (a, b)]
        rotated = [rope.apply_rope(z, t) for z, t in zip((x, y), tables, strict=True)]
        return float((rotated[0] * rotated[1]).sum())

    assert product(5, 2) == pytest.approx(product(10_000_005, 10_000_002), abs=1e-5)
