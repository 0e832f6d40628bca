"""Residual LFQ: each quantizer codes the residual of the quantizers before it.

Each quantizer projects the residual to a few dimensions, takes the codebook row nearest in angle
(both are L2-normalized; the first row wins ties), and projects the unnormalized row back.
Everything is float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from moss_tok import summary
from moss_tok.codec.config import QuantizerConfig

_HIGHEST = jax.lax.Precision.HIGHEST


class Quantized(NamedTuple):
    """Result of the quantizer.

    Attributes:
      latents: Quantized latents [B, T, D] float32, with straight-through gradients.
      codes: [B, Q, T] int32.
      commitment_loss: [Q, B, T], mean over dimensions; pulls projected residuals to codebook rows.
      codebook_loss: [Q, B, T], mean over dimensions; pulls codebook rows to projected residuals.
      projected: Projected residuals that the codes replace, [Q, B, T, codebook_dim].
    """

    latents: jax.Array
    codes: jax.Array
    commitment_loss: jax.Array
    codebook_loss: jax.Array
    projected: jax.Array

    def __repr__(self) -> str:
        return summary.describe_arrays("Quantized", **self._asdict())


# Not nn.WeightNorm, which wraps a layer and calls it: the quantizers need the kernels themselves,
# stacked for one scan. It also names its scale by path and gives it no logical axes, so existing
# checkpoints would not load and the gains would not be sharded.
class WeightNormProjection(nn.Module):
    """Weight-normalized linear map with bias: kernel = gain * direction / |direction|.

    With `quantizers` > 0, each parameter has a leading axis for that many maps.
    """

    in_features: int
    out_features: int
    axes: tuple[str, str]
    quantizers: int = 0

    def setup(self) -> None:
        """Declares the parameters."""
        lead = (self.quantizers,) if self.quantizers else ()
        names = ("quantizers",) if self.quantizers else ()
        output_shape = lead + (self.out_features,)
        direction_shape = lead + (self.in_features, self.out_features)
        bound = self.in_features**-0.5

        def direction(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        def gain(key, shape, dtype):
            del key
            return jnp.full(shape, 3**-0.5, dtype)  # expected norm of a direction

        def box(init, *axes):
            return nn.with_logical_partitioning(init, names + axes)

        out_axis = self.axes[1]
        direction_init = box(direction, *self.axes)
        bias_init = box(nn.initializers.zeros, out_axis)
        self.direction = self.param("direction", direction_init, direction_shape, jnp.float32)
        self.gain = self.param("gain", box(gain, out_axis), output_shape, jnp.float32)
        self.bias = self.param("bias", bias_init, output_shape, jnp.float32)

    def weights(self) -> tuple[jax.Array, jax.Array]:
        """Kernel [(Q,) in, out] and bias [(Q,) out]."""
        norm = jnp.sqrt(jnp.sum(jnp.square(self.direction), axis=-2, keepdims=True))
        return self.direction * (self.gain[..., None, :] / norm), self.bias

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, in] -> [B, T, out]."""
        kernel, bias = self.weights()
        return jnp.einsum("bti,io->bto", x, kernel, precision=_HIGHEST) + bias


def nearest_codes(projected: jax.Array, codebook: jax.Array) -> jax.Array:
    """Index of the codebook row [K, c] nearest in angle to each vector [..., c]; int32 [...]."""
    unit = _normalize(projected)
    similarity = jnp.einsum("...c,kc->...k", unit, _normalize(codebook), precision=_HIGHEST)
    return jnp.argmax(similarity, axis=-1).astype(jnp.int32)


def _normalize(x: jax.Array) -> jax.Array:
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))
    return x / jnp.maximum(norm, 1e-12)


class ResidualQuantizer(nn.Module):
    """Input projection, Q quantizers under one scan, output projection."""

    config: QuantizerConfig

    def setup(self) -> None:
        """Declares the parameters."""
        c = self.config
        if c.input_dim != c.rvq_dim:
            self.input_projection = WeightNormProjection(c.input_dim, c.rvq_dim, ("width", "rvq"))
        if c.output_dim != c.rvq_dim:
            self.output_projection = WeightNormProjection(c.rvq_dim, c.output_dim, ("rvq", "width"))
        if c.codebook_dim != c.rvq_dim:
            self.in_projections = WeightNormProjection(
                in_features=c.rvq_dim,
                out_features=c.codebook_dim,
                axes=("rvq", "code"),
                quantizers=c.num_quantizers,
            )
            self.out_projections = WeightNormProjection(
                in_features=c.codebook_dim,
                out_features=c.rvq_dim,
                axes=("code", "rvq"),
                quantizers=c.num_quantizers,
            )
        axes = ("quantizers", "codebook", "code")
        shape = (c.num_quantizers, c.codebook_size, c.codebook_dim)
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), axes)
        self.codebooks = self.param("codebooks", init, shape, jnp.float32)

    def _levels(self, num_quantizers: int) -> dict[str, jax.Array]:
        """Kernels, biases and codebooks of the first `num_quantizers` levels, stacked."""
        levels = {"codebook": self.codebooks}
        if self.config.codebook_dim != self.config.rvq_dim:
            levels["in_kernel"], levels["in_bias"] = self.in_projections.weights()
            levels["out_kernel"], levels["out_bias"] = self.out_projections.weights()
        return jax.tree.map(lambda x: x[:num_quantizers], levels)

    def __call__(self, latents: jax.Array, num_quantizers: int, mask: jax.Array | None = None):
        """Quantizes latents with the first `num_quantizers` quantizers.

        Args:
          latents: [B, T, D].
          num_quantizers: Number of levels, a static int.
          mask: For training, bool [B, num_quantizers], the levels that add to the quantized
            latents; default: all.

        Returns:
          `Quantized`.
        """
        x = latents.astype(jnp.float32)
        if self.config.input_dim != self.config.rvq_dim:
            x = self.input_projection(x)  # [B, T, R]
        used = jnp.ones((num_quantizers, x.shape[0]), bool) if mask is None else mask.T
        levels = self._levels(num_quantizers)

        def step(residual, level):
            weights, used = level
            projected = _project(residual, weights, "in")  # [B, T, c]
            codes = nearest_codes(jax.lax.stop_gradient(projected), weights["codebook"])
            rows = weights["codebook"][codes]
            commitment = jnp.square(projected - jax.lax.stop_gradient(rows)).mean(-1)
            codebook = jnp.square(rows - jax.lax.stop_gradient(projected)).mean(-1)
            straight = projected + jax.lax.stop_gradient(rows - projected)
            value = _project(straight, weights, "out") * used[:, None, None]  # [B, T, R]
            outputs = (codes, value, commitment, codebook, projected)
            return residual - value, outputs

        _, outputs = jax.lax.scan(step, x, (levels, used))
        codes, values, commitment, codebook, projected = outputs
        return Quantized(
            latents=self._output(values.sum(0)),
            codes=jnp.moveaxis(codes, 0, 1),
            commitment_loss=commitment,
            codebook_loss=codebook,
            projected=projected,
        )

    def decode(self, codes: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Maps codes [B, q, T] of the first q quantizers to quantized latents [B, T, D].

        Codes out of range are clamped. `mask`, bool [B, q], selects the quantizers that count, so
        that one program decodes every prefix.
        """
        batch, num_quantizers, num_frames = codes.shape
        mask = jnp.ones((batch, num_quantizers), bool) if mask is None else mask
        largest_code = min(self.config.codebook_size - 1, jnp.iinfo(codes.dtype).max)
        # Negative codes would index the codebook from its end.
        codes = jnp.clip(codes, 0, largest_code).astype(jnp.int32)

        def step(total, level):
            weights, codes, used = level
            value = _project(weights["codebook"][codes], weights, "out")
            return total + value * used[:, None, None], None

        total = jnp.zeros((batch, num_frames, self.config.rvq_dim), jnp.float32)
        levels = (self._levels(num_quantizers), jnp.moveaxis(codes, 1, 0), mask.T)
        total, _ = jax.lax.scan(step, total, levels)
        return self._output(total)

    def _output(self, x: jax.Array) -> jax.Array:
        if self.config.output_dim != self.config.rvq_dim:
            x = self.output_projection(x)
        return x


def _project(x: jax.Array, weights: dict[str, jax.Array], side: str) -> jax.Array:
    if f"{side}_kernel" not in weights:
        return x
    kernel = weights[f"{side}_kernel"]
    bias = weights[f"{side}_bias"]
    return jnp.einsum("bti,io->bto", x, kernel, precision=_HIGHEST) + bias
