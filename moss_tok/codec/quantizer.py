"""Residual LFQ: each quantizer codes what the ones before it left over.

Every quantizer projects the residual to a few dimensions, takes the codebook row nearest in angle
(both sides L2-normalised, first row on ties), and projects the raw row back. Everything is float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from moss_tok import summary
from moss_tok.codec.config import QuantizerConfig

_HIGHEST = jax.lax.Precision.HIGHEST


class Quantized(NamedTuple):
    """What the quantizer makes of latents.

    Attributes:
      latents: Quantized latents [B, T, D] float32, straight-through.
      codes: [B, Q, T] int32.
      commitment_loss: Pulls projected residuals to their codes; [Q, B, T], mean over dimensions.
      codebook_loss: Pulls codes to the projected residuals; [Q, B, T].
      projected: What the codes stand for, [Q, B, T, codebook_dim].
    """

    latents: jax.Array
    codes: jax.Array
    commitment_loss: jax.Array
    codebook_loss: jax.Array
    projected: jax.Array

    def __repr__(self) -> str:
        return summary.describe_arrays("Quantized", **self._asdict())


class WeightNormProjection(nn.Module):
    """Weight-normalised linear map with bias: kernel = gain * direction / |direction|.

    `quantizers` > 0 stacks that many maps along a leading axis of each parameter.
    """

    in_features: int
    out_features: int
    axes: tuple[str, str]
    quantizers: int = 0

    def setup(self) -> None:
        """Declares the parameters."""
        lead = (self.quantizers,) if self.quantizers else ()
        names = ("quantizers",) if self.quantizers else ()
        size_in, size_out = self.in_features, self.out_features
        bound = size_in**-0.5

        def direction(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        def gain(key, shape, dtype):
            del key
            return jnp.full(shape, 3**-0.5, dtype)  # expected norm of a direction

        def box(init, *axes):
            return nn.with_logical_partitioning(init, names + axes)

        f32 = jnp.float32
        self.direction = self.param(
            "direction", box(direction, *self.axes), lead + (size_in, size_out), f32
        )
        self.gain = self.param("gain", box(gain, self.axes[1]), lead + (size_out,), f32)
        zeros = nn.initializers.zeros
        self.bias = self.param("bias", box(zeros, self.axes[1]), lead + (size_out,), f32)

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
                c.rvq_dim, c.codebook_dim, ("rvq", "code"), c.num_quantizers
            )
            self.out_projections = WeightNormProjection(
                c.codebook_dim, c.rvq_dim, ("code", "rvq"), c.num_quantizers
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

    def __call__(self, latents: jax.Array, num_quantizers: int, keep: jax.Array | None = None):
        """Quantizes latents [B, T, D] with the first `num_quantizers` (a static int) quantizers.

        Args:
          latents: [B, T, D].
          num_quantizers: How many levels are computed.
          keep: For training, bool [B, Q]: the levels that add to the quantized latents.

        Returns:
          `Quantized`.
        """
        x = latents.astype(jnp.float32)
        if self.config.input_dim != self.config.rvq_dim:
            x = self.input_projection(x)  # [B, T, R]
        used = jnp.ones((num_quantizers, x.shape[0]), bool) if keep is None else keep.T
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

        _, (codes, values, *rest) = jax.lax.scan(step, x, (levels, used))
        return Quantized(self._output(values.sum(0)), jnp.moveaxis(codes, 0, 1), *rest)

    def decode(self, codes: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        """Codes [B, q, T] of the first q quantizers to quantized latents [B, T, D].

        Codes out of range are clamped. `keep`, bool [B, q], leaves quantizers out, so that one
        program decodes every prefix.
        """
        batch, num_quantizers, num_frames = codes.shape
        keep = jnp.ones((batch, num_quantizers), bool) if keep is None else keep
        most = min(self.config.codebook_size - 1, jnp.iinfo(codes.dtype).max)
        codes = jnp.clip(codes, 0, most).astype(jnp.int32)  # negative ones would count from the end

        def step(total, level):
            weights, codes, used = level
            value = _project(weights["codebook"][codes], weights, "out")
            return total + value * used[:, None, None], None

        total = jnp.zeros((batch, num_frames, self.config.rvq_dim), jnp.float32)
        levels = (self._levels(num_quantizers), jnp.moveaxis(codes, 1, 0), keep.T)
        total, _ = jax.lax.scan(step, total, levels)
        return self._output(total)

    def _output(self, x: jax.Array) -> jax.Array:
        if self.config.output_dim != self.config.rvq_dim:
            x = self.output_projection(x)
        return x


def _project(x: jax.Array, weights: dict[str, jax.Array], side: str) -> jax.Array:
    if f"{side}_kernel" not in weights:
        return x
    kernel, bias = weights[f"{side}_kernel"], weights[f"{side}_bias"]
    return jnp.einsum("bti,io->bto", x, kernel, precision=_HIGHEST) + bias
