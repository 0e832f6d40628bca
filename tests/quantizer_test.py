"""The quantizer against a plain numpy statement of it."""

import jax
import jax.numpy as jnp
import numpy as np

from moss_tok.codec.quantizer import ResidualQuantizer, nearest_codes


def plain(params, latents, num_quantizers):
    """One vector at a time: codes [Q, T] and quantized latents [T, D]."""

    def project(name, x, q=None):
        p = {k: np.asarray(v, np.float64) for k, v in params[name].items()}
        p = p if q is None else {k: v[q] for k, v in p.items()}
        kernel = p["direction"] * (p["gain"] / np.linalg.norm(p["direction"], axis=0))
        return x @ kernel + p["bias"]

    codes, rows = [], []
    for x in np.asarray(latents, np.float64):
        residual, total, chosen = project("input_projection", x), 0, []
        for q in range(num_quantizers):
            z = project("in_projections", residual, q)
            book = np.asarray(params["codebooks"][q], np.float64)
            cosines = book @ z / np.linalg.norm(book, axis=1)
            chosen.append(int(np.argmax(cosines)))
            value = project("out_projections", book[chosen[-1]], q)
            residual, total = residual - value, total + value
        codes.append(chosen)
        rows.append(project("output_projection", total))
    return np.array(codes).T, np.stack(rows)


def test_against_numpy(micro, rng):
    model = ResidualQuantizer(micro.config.quantizer)
    # Rows of very different lengths: in the initial codebooks, the nearest row in angle is nearly
    # always the nearest in distance, too.
    books = rng.standard_normal((4, 16, 3), np.float32)
    params = micro.params["quantizer"] | {"codebooks": books}
    latents = rng.standard_normal((1, 50, 8), np.float32)
    out = model.apply({"params": params}, latents, 4)
    codes, values = plain(params, latents[0], 4)
    np.testing.assert_array_equal(out.codes[0], codes)
    np.testing.assert_allclose(out.latents[0], values, atol=1e-5)
    decoded = model.apply({"params": params}, out.codes, method="decode")
    np.testing.assert_allclose(decoded, out.latents, atol=1e-6)


def test_fewer_quantizers_are_a_prefix(micro, rng):
    model = ResidualQuantizer(micro.config.quantizer)
    variables = {"params": micro.params["quantizer"]}
    latents = rng.standard_normal((2, 9, 8), np.float32)
    full = model.apply(variables, latents, 4)
    for n in (1, 2, 3):
        part = model.apply(variables, latents, n)
        np.testing.assert_array_equal(part.codes, full.codes[:, :n])
        keep = jnp.broadcast_to(jnp.arange(4) < n, (2, 4))
        masked = model.apply(variables, latents, 4, keep)
        np.testing.assert_allclose(masked.latents, part.latents, atol=1e-6)


def test_ties_take_the_first_row():
    codebook = jnp.array([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0]])
    assert nearest_codes(jnp.array([3.0, 0.0]), codebook) == 1
    assert nearest_codes(jnp.zeros(2), codebook) == 0


def test_straight_through_gradient(micro, rng):
    """With one quantizer the gradient is that of the projections alone."""
    model = ResidualQuantizer(micro.config.quantizer)
    params = micro.params["quantizer"]
    latents = rng.standard_normal((1, 5, 8), np.float32)
    direction = rng.standard_normal((1, 5, 8), np.float32)

    def loss(x):
        return (model.apply({"params": params}, x, 1).latents * direction).sum()

    kernels = []
    for name, q in (("input_projection", None), ("in_projections", 0), ("out_projections", 0),
                    ("output_projection", None)):  # fmt: skip
        p = params[name] if q is None else jax.tree.map(lambda x, q=q: x[q], params[name])
        kernels.append(p["direction"] * (p["gain"] / np.linalg.norm(p["direction"], axis=0)))
    expected = direction @ np.linalg.multi_dot(kernels).T
    np.testing.assert_allclose(jax.grad(loss)(latents), expected, atol=1e-5)


def test_losses_train_the_right_side(micro, rng):
    model = ResidualQuantizer(micro.config.quantizer)
    latents = rng.standard_normal((1, 5, 8), np.float32)

    def loss(params, x, name):
        return getattr(model.apply({"params": params}, x, 4), name).sum()

    params = micro.params["quantizer"]
    to_books, to_latents = jax.grad(loss, argnums=(0, 1))(params, latents, "codebook_loss")
    assert np.abs(to_books["codebooks"]).sum() > 0
    np.testing.assert_array_equal(to_latents, 0)
    to_books, to_latents = jax.grad(loss, argnums=(0, 1))(params, latents, "commitment_loss")
    assert np.abs(to_latents).sum() > 0
    np.testing.assert_array_equal(to_books["codebooks"], 0)
