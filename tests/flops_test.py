"""Useful FLOPs against what XLA counts in unrolled programs."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from helpers import ADVERSARIAL, LANGUAGE, PRETRAIN, SEMANTIC, make_recipe, micro_config

from moss_tok.codec.transformer import Stage
from moss_tok.language.config import LanguageConfig
from moss_tok.language.model import SemanticHead
from moss_tok.nn.compute import ComputeConfig
from moss_tok.objectives import flops
from moss_tok.objectives.discriminators import Discriminators
from moss_tok.speech.config import SpeechConfig, StackConfig
from moss_tok.speech.model import SpeechModel

COMPUTE = ComputeConfig(precision="default", attention="dense")


def counted(function, *arguments):
    """XLA's count; it looks at a scanned body once, so nothing here has more than one layer."""
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def test_a_stage_counts_what_xla_counts():
    stage = dataclasses.replace(
        micro_config().encoder[1], model_dim=256, num_layers=1, mlp_dim=1024, input_dim=128,
        output_dim=64,
    )  # fmt: skip
    model, num_frames = Stage(stage, COMPUTE, window=96), 96
    x = jnp.zeros((1, num_frames, 128))
    found = counted(model.apply, model.init(jax.random.key(0), x), x)
    half = 4 * 256 * num_frames * (num_frames - 1) / 2  # dense attention computes both triangles
    expected = flops.stage_flops(stage, num_frames, 96) + half
    assert expected == pytest.approx(found, rel=0.05)


def test_windows_count_only_what_is_seen():
    stage = dataclasses.replace(micro_config().encoder[1], num_layers=1)
    seen = sum(min(t + 1, 7) for t in range(50))
    difference = flops.stage_flops(stage, 50, 7) - flops.stage_flops(stage, 50, 1)
    assert difference == 4 * stage.model_dim * (seen - 50)


@pytest.mark.parametrize("changes", [{"discriminator_windows": ""}, {"discriminator_periods": ""}])
def test_discriminators_count_what_xla_counts(changes):
    flags = ADVERSARIAL | {"discriminator_channels": 8, "segment_seconds": 0.75} | changes
    objective = make_recipe(flags).objective
    model = Discriminators(objective.adversarial.discriminators)
    wav = jnp.zeros((1, 1, objective.num_samples))
    found = counted(model.apply, model.init(jax.random.key(0), wav), wav)
    expected = flops.discriminator_flops(objective)
    assert expected == pytest.approx(found, rel=0.1)


def test_a_language_model_counts_what_xla_counts():
    """Dense attention computes both triangles, which has no weight at these widths."""
    config = LanguageConfig(128, 1000, 0, 512, 1, 4, 2, 2048)
    head, (num_frames, num_tokens) = SemanticHead(config, COMPUTE), (40, 20)
    latents, one = jnp.zeros((1, num_frames, 128)), jnp.ones(1, jnp.int32)
    batch = (latents, num_frames * one, one, jnp.zeros((1, num_tokens), jnp.int32), one)
    found = counted(head.apply, head.init(jax.random.key(0), *batch), *batch)
    assert flops.language_flops(config, num_frames, num_tokens) == pytest.approx(found, rel=0.03)


def test_a_speech_model_counts_what_xla_counts():
    """Dense attention computes both triangles, which has no weight at these widths."""
    temporal = StackConfig(512, 1, 4, 2, 128, 1024)
    depth = StackConfig(256, 1, 2, 2, 128, 512)
    config = SpeechConfig(320, 100, 7, temporal, depth, 128, slot_id=1, end_id=2)
    model = SpeechModel(config, COMPUTE)
    num_frames = 20
    text = jnp.zeros((1, num_frames + 1), jnp.int32)
    codes = jnp.zeros((1, 7, num_frames + 1), jnp.int32)
    batch = (text, codes, jnp.ones((1, 7), bool))
    found = counted(model.apply, model.init(jax.random.key(0), *batch), *batch)
    end = flops.blocks_flops(depth, 1) + 2 * 128 * (2 * 512 + 256 + 2 * 256 + 512) + 2 * 512 * 320
    expected = flops.speech_flops(config, num_frames + 1, num_frames) - end
    assert expected == pytest.approx(found, rel=0.03)


def test_a_speech_model_counted_by_hand():
    """Three positions before the end: a token of text, and two frames of two codes."""
    config = SpeechConfig(
        7, 5, 2, StackConfig(8, 2, 2, 1, 4, 16), StackConfig(6, 3, 1, 1, 4, 10), 12, 1, 2
    )
    q, kv, out, mlp = 8 * 8, 2 * 8 * 4, 8 * 8, 3 * 8 * 16
    scores_and_sums = 2 * (1 + 2 + 3) * 2 * 4  # keys that are seen, heads, width
    temporal = 2 * (3 * (q + kv + out + mlp) + scores_and_sums)
    weights = 4 * 6 * 4 + 3 * 6 * 10
    frame = 3 * (3 * weights + 2 * (1 + 2 + 3) * 4)
    end = 3 * (weights + 2 * 1 * 4)
    depth = 2 * frame + end
    channels = 2 * 3 + 1
    before = channels * (2 * 8 * 12 + 12 * 6)
    after = channels * (2 * 6 * 12 + 12 * 8)
    heads = 3 * 8 * 7 + 2 * 2 * 8 * 6
    expected = 2 * (temporal + depth + before + after + heads)
    assert flops.speech_flops(config, 4, 2) == expected


def test_a_step_costs_more_with_discriminators_and_less_with_frozen_parts():
    def found(flags, language=None):
        return flops.item_flops(make_recipe(flags, language=language).objective)

    codec = micro_config()
    plain = found(PRETRAIN)
    assert plain == 3 * sum(flops.codec_flops(codec, 2048).values())
    assert found(ADVERSARIAL) > plain
    assert found(PRETRAIN | {"trainable": "decoder", "init_from": "x"}) < plain
    added = 3 * flops.language_flops(LANGUAGE, codec.num_frames(2048), SEMANTIC["max_text_tokens"])
    assert found(SEMANTIC, LANGUAGE) == plain + added
    alone = {"language_model": "tiny", "max_text_tokens": 4, "segment_seconds": 0.256}
    alone |= {"trainable": "language", "init_from": "x"}
    assert added < found(alone, LANGUAGE) < plain + added
