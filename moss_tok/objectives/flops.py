"""Useful floating-point operations of a training step, from shapes alone.

A multiplication and an addition count as two operations. The count includes the matrix products of
the Transformers (weights, and attention within its window), the quantizers and the discriminators'
convolutions. It excludes spectra, norms, embeddings, element-wise operations, padding and
recomputation.
"""

import math

import jax
import jax.numpy as jnp

from moss_tok.codec.config import CodecConfig, PatchConfig, TransformerConfig
from moss_tok.language.config import LanguageConfig
from moss_tok.objectives.adversarial import AdversarialObjective
from moss_tok.objectives.base import CodecBasedObjective
from moss_tok.objectives.discriminators import Discriminators, make_discriminators
from moss_tok.objectives.recognition import RecognitionObjective
from moss_tok.objectives.speech import SpeechObjective
from moss_tok.speech.config import SpeechConfig, StackConfig


def stage_flops(stage: TransformerConfig, num_frames: int, window: int) -> float:
    """Forward FLOPs of one Transformer stage on `num_frames` frames of one item."""
    width = stage.model_dim
    weights = stage.num_layers * (4 * width * width + 2 * width * stage.mlp_dim)
    weights += stage.input_projection * stage.input_dim * width
    weights += stage.output_projection * stage.output_dim * width
    window = min(window, num_frames)
    keys = num_frames * window - window * (window - 1) / 2  # a query attends to itself and the past
    return 2.0 * weights * num_frames + 4.0 * stage.num_layers * width * keys


def codec_flops(codec: CodecConfig, num_samples: int) -> dict[str, float]:
    """Forward FLOPs of encoder, quantizer and decoder on one item of `num_samples` samples."""
    seconds = num_samples / codec.sample_rate
    flops = {}
    for side in ("encoder", "decoder"):
        flops[side] = 0
        rows = zip(getattr(codec, side), codec.windows(side), codec.stage_rates(side), strict=True)
        for module, window, rate in rows:
            if not isinstance(module, PatchConfig):
                flops[side] += stage_flops(module, round(rate * seconds), window)
    q = codec.quantizer
    level = 2 * q.rvq_dim * q.codebook_dim + q.codebook_size * q.codebook_dim
    outer = (q.input_dim + q.output_dim) * q.rvq_dim
    flops["quantizer"] = 2.0 * codec.num_frames(num_samples) * (q.num_quantizers * level + outer)
    return flops


def language_flops(language: LanguageConfig, num_frames: int, num_tokens: int) -> float:
    """Forward FLOPs of the semantic head on an item of `num_frames` and `num_tokens` of text."""
    c = language
    outer = c.latents_dim * c.model_dim * num_frames + c.model_dim * c.vocab_size * (num_tokens + 1)
    return blocks_flops(c, 2 + num_frames + num_tokens) + 2.0 * outer


def blocks_flops(stack: LanguageConfig | StackConfig, size: int) -> float:
    """Forward FLOPs of causal blocks with grouped queries on a sequence of `size`."""
    heads = (2 * stack.num_heads + 2 * stack.num_kv_heads) * stack.head_dim
    weights = stack.model_dim * (heads + 3 * stack.mlp_dim)
    attended = 2 * stack.num_heads * stack.head_dim * size * (size + 1) / 2
    return 2.0 * stack.num_layers * (weights * size + attended)


def discriminator_flops(objective: AdversarialObjective) -> float:
    """Forward FLOPs of all discriminators on one item."""
    settings = objective.adversarial.discriminators
    model = Discriminators(settings, objective.compute.dtype)
    shape = (1, objective.codec.num_channels, objective.num_samples)
    wav = jax.ShapeDtypeStruct(shape, jnp.float32)
    features, variables = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x), wav
    )
    kernels = jax.tree_util.tree_leaves_with_path(variables["params"])
    total = 0.0
    for name, layers in zip(make_discriminators(settings), features, strict=True):
        shapes = {}
        for path, leaf in kernels:
            names = [getattr(entry, "key", "") for entry in path]
            if names[0] == name and "direction" in names:
                shapes[int(names[1].rpartition("_")[2])] = leaf.shape
        for number, layer in enumerate(layers):
            total += 2.0 * math.prod(layer.shape[:-1]) * math.prod(shapes[number])
    return total


def speech_flops(speech: SpeechConfig, num_positions: int, num_frames: int) -> float:
    """Forward FLOPs of a speech model on a sequence whose last `num_frames` frames are predicted.

    The temporal Transformer reads all `num_positions` positions but the last, which ends speech.
    The depth Transformer predicts all channels of a frame, and of the end the text channel alone.
    """
    c = speech
    width = c.temporal.model_dim
    inner = c.depth.model_dim
    temporal = blocks_flops(c.temporal, num_positions - 1)
    depth = num_frames * blocks_flops(c.depth, c.num_channels) + blocks_flops(c.depth, 1)
    predicted = num_frames * c.num_channels + 1
    before = 2 * width + inner  # gate, up and down of an adapter
    after = 2 * inner + width
    outer = predicted * (before + after) * c.adapter_dim
    outer += (num_frames + 1) * width * c.vocab_size
    outer += num_frames * c.num_quantizers * width * (c.codebook_size + 1)
    return temporal + depth + 2.0 * outer


def item_flops(objective: CodecBasedObjective | SpeechObjective) -> float:
    """Useful FLOPs of a training step per item; a backward pass counts as two forward passes.

    An item of the objective speech is its longest sequence, with all quantizers in use. The
    discriminators run on recordings and reconstructions with gradients of their parameters (3 + 3),
    then on recordings without gradients (1) and on reconstructions with gradients of the audio (2).
    """
    if isinstance(objective, SpeechObjective):
        num_positions = objective.num_positions
        return 3 * speech_flops(objective.config, num_positions, objective.max_frames)
    codec = objective.codec
    forward = codec_flops(codec, objective.num_samples)
    passes = 3 if objective.trainable == "all" else 1
    total = (forward["encoder"] + forward["quantizer"]) * passes
    if not isinstance(objective, RecognitionObjective):
        total += 3 * forward["decoder"]
    if objective.language is not None:
        num_frames = codec.num_frames(objective.num_samples)
        num_tokens = objective.settings.text.max_text_tokens
        total += 3 * language_flops(objective.language, num_frames, num_tokens)
    if isinstance(objective, AdversarialObjective):
        total += (3 + 3 + 1 + 2) * discriminator_flops(objective)
    return total
