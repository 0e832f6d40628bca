"""Patches, interleaving, causality and precision of the whole codec."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moss_tok
from moss_tok.codec.model import CodecModel, deinterleave, interleave, patchify, unpatchify
from moss_tok.nn import products
from moss_tok.nn.compute import BF16_PRODUCTS, ComputeConfig


def test_patches_are_channel_major():
    x = jnp.arange(12).reshape(1, 6, 2)  # frame t has channels 2t, 2t + 1
    folded = patchify(x, 3)
    np.testing.assert_array_equal(folded[0], [[0, 2, 4, 1, 3, 5], [6, 8, 10, 7, 9, 11]])
    np.testing.assert_array_equal(unpatchify(folded, 3), x)


def test_interleave():
    wav = jnp.array([[[1, 2, 3], [10, 20, 30]]])
    np.testing.assert_array_equal(interleave(wav)[0, :, 0], [1, 10, 2, 20, 3, 30])
    np.testing.assert_array_equal(deinterleave(interleave(wav), 2), wav)


def test_encoder_is_causal_and_windowed(micro):
    """Latents of frame t depend on samples up to its end, and not on those long gone."""
    wav = jax.random.normal(jax.random.key(0), (1, 1, 16 * 60))

    def loss(wav):
        latents = micro.model.apply({"params": micro.params}, wav, method="latents")
        return jnp.sin(latents[0, 40]).sum()

    touched = np.flatnonzero(jax.grad(loss)(wav)[0, 0])
    assert touched[-1] == 41 * 16 - 1
    assert touched[0] > 16 * 20  # windows of 6 and 3 frames cannot see further


def test_decoder_is_causal(micro):
    latents = jax.random.normal(jax.random.key(0), (1, 30, 8))

    def loss(latents):
        decode = micro.model.apply(
            {"params": micro.params}, latents, method=lambda m, x: m.decoder(x)[0][..., 0][:, None]
        )
        return jnp.sin(decode[0, 0, 20 * 16 : 21 * 16]).sum()

    touched = np.flatnonzero(jnp.abs(jax.grad(loss)(latents)[0]).sum(-1))
    assert touched[-1] == 20


def test_bfloat16_products():
    """The operands are rounded, also those of the gradients; the sums are float32."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, weights, gradient = (jax.random.normal(k, (2, 7, 5, 5)) for k in keys)
    weights = weights[0]
    gradient = gradient[:, :, 0]

    def rounded(x):
        return x.astype(jnp.bfloat16).astype(jnp.float32)

    def plain(x, weights):
        return jnp.einsum("btnh,dnh->btd", x, weights, precision="highest")

    def product(x, weights):
        return products.einsum("btnh,dnh->btd", x, weights, BF16_PRODUCTS)

    weights = weights[:5]
    expected, pull = jax.vjp(plain, rounded(x), rounded(weights))
    found, pull_product = jax.vjp(product, x, weights)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for a, b in zip(pull_product(gradient), pull(rounded(gradient)), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [dict(remat="dots"), dict(remat="full"), dict(unroll_layers=2)], ids=str
)
def test_loops_change_nothing(micro, settings):
    wav = jax.random.normal(jax.random.key(0), (1, 1, 16 * 20))

    def loss(params, compute):
        return jnp.square(CodecModel(micro.config, compute).apply({"params": params}, wav)[0]).sum()

    plain = jax.grad(loss)(micro.params, ComputeConfig())
    again = jax.grad(loss)(micro.params, ComputeConfig(**settings))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), plain, again)


def test_bfloat16_stays_close(v1_tiny):
    wav = 0.1 * jax.random.normal(jax.random.key(0), (1, 1, 19200))
    half = dataclasses.replace(v1_tiny, compute=ComputeConfig(dtype="bfloat16"))
    latents = [c.model.apply({"params": c.params}, wav, method="latents") for c in (v1_tiny, half)]
    assert latents[1].dtype == jnp.float32
    error = jnp.linalg.norm(latents[1] - latents[0]) / jnp.linalg.norm(latents[0])
    assert 0 < error < 0.02
    heard = moss_tok.decode(half, np.zeros((1, 8, 10), int)).wav
    assert (heard != heard.astype(jnp.bfloat16)).any()  # audio needs more than its 8 bits


def test_bfloat16_gradients_stay_close(micro):
    """Also those of the layers' scales, which are multiplied into the weights then."""
    wav = 0.1 * jax.random.normal(jax.random.key(0), (2, 1, 16 * 100))

    def loss(params, compute):
        model = CodecModel(micro.config, compute)
        return jnp.square(model.apply({"params": params}, wav, method="latents")).sum()

    exact = jax.grad(loss)(micro.params, ComputeConfig())["encoder"]
    half = ComputeConfig(dtype="bfloat16", remat="dots")
    found = jax.grad(loss)(micro.params, half)["encoder"]
    error = jax.tree.map(lambda a, b: jnp.linalg.norm(a - b) / jnp.linalg.norm(a), exact, found)
    assert 0 < max(jax.tree.leaves(error)) < 0.03


def test_blocked_attention_gives_the_same_codes(v1_tiny, rng):
    wav = 0.1 * rng.standard_normal((1, 1, 72000), np.float32)
    blocked = dataclasses.replace(v1_tiny, compute=ComputeConfig(attention="blocked"))
    codes = [moss_tok.encode(c, wav).codes for c in (v1_tiny, blocked)]
    np.testing.assert_array_equal(*codes)
