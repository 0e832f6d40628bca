"""Useful floating-point operations of a training step, from shapes alone.

A multiplication and an addition count as two. Counted are the matrix products of the Transformers
(weights, and attention within its window), the quantizers and the discriminators' convolutions;
not the spectra, norms and element-wise work, nor anything computed twice.
"""

import math

import jax
import jax.numpy as jnp

from moss_tok.codec.config import CodecConfig, PatchConfig, TransformerConfig
from moss_tok.language.config import LanguageConfig
from moss_tok.training.config import TrainConfig
from moss_tok.training.discriminators import Discriminators


def stage_flops(stage: TransformerConfig, num_frames: int, window: int) -> float:
    """Forward FLOPs of one Transformer stage on `num_frames` frames of one item."""
    d, f = stage.model_dim, stage.mlp_dim
    weights = stage.num_layers * (4 * d * d + 2 * d * f)
    weights += stage.input_projection * stage.input_dim * d
    weights += stage.output_projection * stage.output_dim * d
    window = min(window, num_frames)
    keys = num_frames * window - window * (window - 1) / 2  # a query sees itself and what is before
    return 2.0 * weights * num_frames + 4.0 * stage.num_layers * d * keys


def codec_flops(codec: CodecConfig, num_samples: int) -> dict[str, float]:
    """Forward FLOPs of encoder, quantizer and decoder on one item of `num_samples` samples."""
    seconds, found = num_samples / codec.sample_rate, {}
    for side in ("encoder", "decoder"):
        rows = zip(getattr(codec, side), codec.windows(side), codec.stage_rates(side), strict=True)
        found[side] = sum(
            stage_flops(module, round(rate * seconds), window)
            for module, window, rate in rows
            if not isinstance(module, PatchConfig)
        )
    q = codec.quantizer
    level = 2 * q.rvq_dim * q.codebook_dim + q.codebook_size * q.codebook_dim
    outer = (q.input_dim + q.output_dim) * q.rvq_dim
    found["quantizer"] = 2.0 * codec.num_frames(num_samples) * (q.num_quantizers * level + outer)
    return found


def language_flops(language: LanguageConfig, num_frames: int, num_tokens: int) -> float:
    """Forward FLOPs of the semantic head on an item of `num_frames` and `num_tokens` of text."""
    c, size = language, 2 + num_frames + num_tokens
    heads = (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    weights = c.num_layers * c.model_dim * (heads + 3 * c.mlp_dim)
    attended = 2 * c.num_layers * c.num_heads * c.head_dim * size * (size + 1) / 2
    outer = c.latents_dim * c.model_dim * num_frames + c.model_dim * c.vocab_size * (num_tokens + 1)
    return 2.0 * (weights * size + attended + outer)


def discriminator_flops(config: TrainConfig, codec: CodecConfig, num_samples: int) -> float:
    """Forward FLOPs of all discriminators on one item."""
    model = Discriminators(config.discriminators, config.dtype)
    wav = jax.ShapeDtypeStruct((1, codec.num_channels, num_samples), jnp.float32)
    features, variables = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x), wav
    )
    kernels = jax.tree_util.tree_leaves_with_path(variables["params"])
    total = 0.0
    for name, layers in zip(_names(config), features, strict=True):
        shapes = {
            int(path[1].key.rpartition("_")[2]): leaf.shape
            for path, leaf in kernels
            if path[0].key == name and any(getattr(p, "key", "") == "direction" for p in path)
        }
        for number, layer in enumerate(layers):
            total += 2.0 * math.prod(layer.shape[:-1]) * math.prod(shapes[number])
    return total


def _names(config: TrainConfig) -> list[str]:
    c = config.discriminators
    return [f"period_{p}" for p in c.periods] + [f"window_{w}" for w in c.windows]


def step_flops(
    config: TrainConfig,
    codec: CodecConfig,
    num_samples: int,
    language: LanguageConfig | None = None,
) -> float:
    """Useful FLOPs of a training step: a backward pass costs twice its forward pass.

    The discriminators see recordings and reconstructions with gradients in their parameters, then
    recordings forward and reconstructions with gradients in the audio.
    """
    forward = codec_flops(codec, num_samples)
    total = 0 if config.trainable == "language" else 3 * forward["decoder"]
    passes = 3 if config.trainable == "all" else 1
    total += (forward["encoder"] + forward["quantizer"]) * passes
    if language is not None:
        num_frames = codec.num_frames(num_samples)
        total += 3 * language_flops(language, num_frames, config.max_text_tokens)
    if config.adversarial:
        total += (3 + 3 + 1 + 2) * discriminator_flops(config, codec, num_samples)
    return config.batch_size * total
