"""Generation of speech: caches, batches, quantizers, streams, and the layouts of prompts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moss_tok.language import text
from moss_tok.speech import generate, layout, pretrained, steps
from moss_tok.speech.config import SpeechConfig, StackConfig
from moss_tok.speech.generate import Request, Spoken
from moss_tok.speech.sampling import GREEDY

BYTES = text.ByteTokenizer()
CONFIG = SpeechConfig(
    codebook_size=7, num_quantizers=3,
    temporal=StackConfig(16, 2, 4, 2, 8, 24), depth=StackConfig(12, 2, 2, 1, 6, 16),
    adapter_dim=10, frame_rate=10.0, max_positions=64, **layout.token_fields(BYTES),
)  # fmt: skip
TEXTS = ["ab", "a longer one", "c", "seven 7", "xy z", "b"]
REQUESTS = [Request(text) for text in TEXTS]


@pytest.fixture(scope="module")
def speech():
    params = nn.meta.unbox(
        jax.jit(pretrained.init_boxed, static_argnums=0)(CONFIG, jax.random.key(3))
    )
    params["code_embeddings"] *= 50  # frames differ, and some texts end
    params["text_embedding"] *= 50
    return steps.Speech(params, CONFIG, BYTES)


@jax.jit
def whole_logits(speech, positions, in_use):
    return speech.apply(*positions, in_use, method="__call__")


def without_cache(speech, request, num_frames, number=3):
    """Greedy codes, by teacher-forced logits of everything before, again for each code."""
    prompt = layout.prompt(CONFIG, BYTES, request)
    first = len(prompt.text)
    text = np.full((1, 24), CONFIG.slot_id)
    codes = np.full((1, 3, 24), CONFIG.codebook_size)
    text[0, :first] = prompt.text
    codes[0, :, :first] = prompt.codes
    in_use = jnp.arange(3)[None] < number
    for place in range(first, first + num_frames):
        found, _ = whole_logits(speech, (text, codes), in_use)
        slot, end = (found[0, place - 1, i] for i in (CONFIG.slot_id, CONFIG.end_id))
        if place > first and end > slot:
            return Spoken(codes[0, :number, first:place], True)
        for level in range(number):
            _, found = whole_logits(speech, (text, codes), in_use)
            codes[0, level, place] = np.argmax(found[0, level, place - 1, :7])
    return Spoken(codes[0, :number, first : first + num_frames], False)


def same(a, b):
    return a.ended == b.ended and np.array_equal(a.codes, b.codes)


@pytest.mark.parametrize("number", [3, 1])
def test_caches_change_nothing(speech, number):
    found = generate.generate(speech, REQUESTS, GREEDY, num_quantizers=number)
    for request, spoken in zip(REQUESTS, found, strict=True):
        limit = 6
        expected = without_cache(speech, request, limit, number)
        if expected.ended:
            assert same(spoken, expected)
        np.testing.assert_array_equal(spoken.codes[:, :limit], expected.codes)


def test_batches_and_blocks_change_nothing(speech):
    together = generate.generate(speech, REQUESTS, seed=5)
    assert len({spoken.codes.shape[1] for spoken in together}) > 2
    for item, request in enumerate(REQUESTS):
        alone = generate.generate(speech, [request], seed=5, first_item=item)[0]
        assert same(alone, together[item])
        blocks = list(generate.frames(speech, request, seed=5, item=item, block_frames=3))
        np.testing.assert_array_equal(np.concatenate(blocks, axis=1), alone.codes)
    again = generate.generate(speech, REQUESTS, seed=6)
    assert not all(same(a, b) for a, b in zip(together, again, strict=True))
