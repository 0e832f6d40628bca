"""The speech model: causality over time and over depth, caches, dropped quantizers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moss_tok import sharding
from moss_tok.nn import blocks
from moss_tok.nn.cache import Span
from moss_tok.nn.compute import ComputeConfig
from moss_tok.speech import config as configs
from moss_tok.speech.config import SpeechConfig, StackConfig
from moss_tok.speech.model import SpeechModel

CONFIG = SpeechConfig(
    vocab_size=20, codebook_size=7, num_quantizers=3,
    temporal=StackConfig(16, 2, 4, 2, 8, 24), depth=StackConfig(12, 2, 2, 1, 6, 16),
    adapter_dim=10, slot_id=18, end_id=19,
)  # fmt: skip
MODEL = SpeechModel(CONFIG)
IN_USE = jnp.ones((2, 3), bool)


@pytest.fixture(scope="module")
def params():
    text, codes = jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 3, 2), jnp.int32)
    boxed = MODEL.init(jax.random.key(0), text, codes, jnp.ones((1, 3), bool))["params"]
    return nn.meta.unbox(boxed)


@pytest.fixture
def positions(rng):
    return (
        jnp.asarray(rng.integers(0, 20, (2, 6)), jnp.int32),
        jnp.asarray(rng.integers(0, 8, (2, 3, 6)), jnp.int32),
    )


def logits(params, text, codes, in_use=IN_USE):
    return MODEL.apply({"params": params}, text, codes, in_use)


def test_shapes(params, positions):
    text, codes = logits(params, *positions)
    assert text.shape == (2, 5, 20) and codes.shape == (2, 3, 5, 8)
    assert text.dtype == codes.dtype == jnp.float32


def test_logits_depend_on_earlier_positions_and_channels_alone(params, positions):
    """Channel c of position t sees all of the positions before t, and channels below c of t."""
    text, codes = positions
    before = logits(params, text, codes)
    changed_text = logits(params, text.at[:, 3].add(1), codes)
    np.testing.assert_array_equal(changed_text[0][:, :3], before[0][:, :3])  # position 3 itself
    np.testing.assert_array_equal(changed_text[1][:, :, :2], before[1][:, :, :2])
    assert (changed_text[1][:, 0, 2] != before[1][:, 0, 2]).any()
    assert (changed_text[0][:, 3] != before[0][:, 3]).any()
    changed = logits(params, text, codes.at[:, 1, 3].set((codes[:, 1, 3] + 1) % 7))
    np.testing.assert_array_equal(changed[0][:, :3], before[0][:, :3])
    np.testing.assert_array_equal(changed[1][:, :2, 2], before[1][:, :2, 2])
    assert (changed[1][:, 2, 2] != before[1][:, 2, 2]).any()
    assert (changed[1][:, 0, 3] != before[1][:, 0, 3]).any()


def test_dropped_quantizers_change_nothing_below_and_learn_nothing(params, positions):
    text, codes = positions
    in_use = IN_USE.at[:, 1:].set(False)
    before = logits(params, text, codes, in_use)
    changed = logits(params, text, codes.at[:, 1:, 2].set((codes[:, 1:, 2] + 1) % 7), in_use)
    np.testing.assert_array_equal(changed[0], before[0])
    np.testing.assert_array_equal(changed[1][:, 0], before[1][:, 0])

    @jax.grad
    def gradient(params):
        text_logits, code_logits = logits(params, text, codes, in_use)
        return text_logits.sum() + code_logits[:, 0].sum()

    found = gradient(params)
    assert not found["code_embeddings"][1:].any() and found["code_embeddings"][0].any()
    assert not found["out"]["code_heads"][1:].any() and not found["out"]["gate"][2:].any()


def test_the_code_for_none_is_zero_and_learns_nothing(params, positions):
    """As the padding rows of the official embeddings."""
    text, codes = positions
    assert not params["code_embeddings"][:, -1].any()
    gradient = jax.grad(lambda p: logits(p, text, codes.at[:, :, 2].set(7))[1].sum())(params)
    assert not gradient["code_embeddings"][:, -1].any()
    assert gradient["code_embeddings"][:2, :-1].any()


def test_step_by_step_equals_all_at_once(params, positions):
    """Caches of both Transformers, position by position and channel by channel."""
    text, codes = positions
    expected_text, expected_codes = logits(params, text, codes)

    def apply(*args, method):
        return MODEL.apply({"params": params}, *args, method=method)

    compute = ComputeConfig()
    cache = blocks.empty_cache(CONFIG.temporal.block, 2, compute, 2, 6)
    for t in range(5):
        x = apply(text[:, t : t + 1], codes[:, :, t : t + 1], IN_USE, method="embed")
        span = Span(jnp.full(2, t), jnp.ones(2, jnp.int32))
        states, cache = apply(x, cache, span, method="temporal_states")
        depth_cache = blocks.empty_cache(CONFIG.depth.block, 2, compute, 2, 4)
        channel_input = states
        for channel in range(4):
            span = Span(jnp.full(2, channel), jnp.ones(2, jnp.int32))
            depth, depth_cache = apply(channel_input, depth_cache, span, method="depth_states")
            here = slice(channel, channel + 1)
            state = apply(depth, here, method="head_states")
            if channel == 0:
                found = apply(state[:, 0], method="text_logits")
                np.testing.assert_allclose(found, expected_text[:, t], atol=1e-5)
                token = text[:, t + 1]
                channel_input = params["text_embedding"][token][:, None]
                continue
            level = slice(channel - 1, channel)
            found = apply(state, level, method="code_logits")
            np.testing.assert_allclose(found[:, 0], expected_codes[:, channel - 1, t], atol=1e-5)
            code = codes[:, channel - 1, t + 1]
            channel_input = params["code_embeddings"][channel - 1][code][:, None]


def test_items_and_what_comes_later_change_nothing(params, positions):
    text, codes = positions
    whole = logits(params, text, codes)
    alone = logits(params, text[:1, :4], codes[:1, :, :4], IN_USE[:1])
    np.testing.assert_allclose(alone[0], whole[0][:1, :3], atol=1e-5)
    np.testing.assert_allclose(alone[1], whole[1][:1, :, :3], atol=1e-5)


def test_every_logical_name_has_a_rule():
    def init():
        text, codes = jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 3, 2), jnp.int32)
        return MODEL.init(jax.random.key(0), text, codes, jnp.ones((1, 3), bool))["params"]

    boxes = jax.tree.leaves(
        jax.eval_shape(init), is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    )
    names = {axis for box in boxes for axis in box.names if axis is not None}
    assert names <= {rule[0] for rule in sharding.RULES}


def test_json_there_and_back():
    assert SpeechConfig.from_json(CONFIG.to_json()) == CONFIG
    with pytest.raises(ValueError, match="end_id must be 0..19, got 20"):
        dataclasses.replace(CONFIG, end_id=20)
    with pytest.raises(ValueError, match="speech_model must be one of tiny, small, 1.7b"):
        configs.preset("big", 20, 7, 3, 18, 19)
