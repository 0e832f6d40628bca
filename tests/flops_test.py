"""Useful FLOPs against what XLA counts in unrolled programs."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from conftest import micro_config

from moss_tok.codec.transformer import Stage
from moss_tok.language.config import LanguageConfig
from moss_tok.language.model import SemanticHead
from moss_tok.nn.compute import ComputeConfig
from moss_tok.training import flops
from moss_tok.training.config import TrainConfig
from moss_tok.training.discriminators import Discriminators

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
    config = TrainConfig(
        discriminator_channels=8, **{"discriminator_periods": "3", "discriminator_windows": "512"}
        | changes,
    )  # fmt: skip
    model, wav = Discriminators(config.discriminators), jnp.zeros((1, 1, 6000))
    found = counted(model.apply, model.init(jax.random.key(0), wav), wav)
    expected = flops.discriminator_flops(config, micro_config(), 6000)
    assert expected == pytest.approx(found, rel=0.1)


def test_a_language_model_counts_what_xla_counts():
    """Dense attention computes both triangles, which has no weight at these widths."""
    config = LanguageConfig(128, 1000, 0, 512, 1, 4, 2, 2048)
    head, (num_frames, num_tokens) = SemanticHead(config, COMPUTE), (40, 20)
    latents, one = jnp.zeros((1, num_frames, 128)), jnp.ones(1, jnp.int32)
    batch = (latents, num_frames * one, one, jnp.zeros((1, num_tokens), jnp.int32), one)
    found = counted(head.apply, head.init(jax.random.key(0), *batch), *batch)
    assert flops.language_flops(config, num_frames, num_tokens) == pytest.approx(found, rel=0.03)


def test_a_step_costs_more_with_discriminators_and_less_with_frozen_parts():
    codec, config = micro_config(), TrainConfig(batch_size=4)
    plain = flops.step_flops(config, codec, 2048)
    assert plain == 4 * 3 * sum(flops.codec_flops(codec, 2048).values())
    judged = dataclasses.replace(config, stage="adversarial", discriminator_channels=2)
    assert flops.step_flops(judged, codec, 2048) > plain
    frozen = dataclasses.replace(config, trainable="decoder", init_from="x")
    assert flops.step_flops(frozen, codec, 2048) < plain
    language = LanguageConfig(8, 257, 256, 16, 1, 2, 1, 24)
    heard = dataclasses.replace(config, language_model="tiny")
    added = 4 * 3 * flops.language_flops(language, codec.num_frames(2048), config.max_text_tokens)
    assert flops.step_flops(heard, codec, 2048, language) == plain + added
    alone = dataclasses.replace(heard, trainable="language", init_from="x")
    assert added < flops.step_flops(alone, codec, 2048, language) < plain + added
