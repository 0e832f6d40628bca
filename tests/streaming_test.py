"""Steps of streams: any split of the input gives what encode and decode of the whole give."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MOST_FRAMES, assert_near, code_noise
from jax.sharding import NamedSharding, PartitionSpec

import moss_tok
from moss_tok import sharding
from moss_tok.codec import inference, pretrained, streaming
from moss_tok.nn import attention, rope
from moss_tok.nn.compute import ComputeConfig


def splits(name, num_frames):
    """Where chunks begin and end; chunks of 1, 7 and 93 frames, because each size is compiled."""
    random = list(np.random.default_rng(0).choice([1, 7], num_frames))
    sizes = {"1": [1] * num_frames, "long": [7, 1, 93, 7], "random": random}
    edges = np.cumsum(sizes[name])
    edges = edges[edges <= num_frames - 7]  # the rest in chunks of one frame
    return [0, *edges, *range(edges[-1] + 1, num_frames + 1)]


@pytest.mark.parametrize(
    ("whole", "name"),
    [("v1_tiny", name) for name in ("1", "long", "random")]
    + [("nano_tiny", "long"), ("v2_micro", "long")],
    indirect=["whole"],
)
def test_any_split_gives_the_whole(whole, name):
    """Chunks of 1 and 93 frames are shorter and longer than any window."""
    codec, wav, codes, wav_hat = whole
    hop = codec.config.hop_length
    longest = max(w / r for w, r in windows(codec.config))
    assert MOST_FRAMES > 3 * longest * codec.config.frame_rate
    coder = streaming.init_encoder_stream(codec, 2)
    player = streaming.init_decoder_stream(codec, 2)
    edges = splits(name, MOST_FRAMES)
    found = ([], [])
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        coder, part = streaming.encode_step(codec, coder, wav[..., start * hop : end * hop])
        found[0].append(part)
        player, part = streaming.decode_step(codec, player, part)
        found[1].append(part)
    np.testing.assert_array_equal(np.concatenate(found[0], axis=-1), codes)
    assert_near(np.concatenate(found[1], axis=-1), wav_hat)
    assert coder.position.tolist() == [MOST_FRAMES] * 2


def windows(config):
    pairs = zip(config.windows("encoder"), config.stage_rates("encoder"), strict=True)
    return [(window, rate) for window, rate in pairs if window]


@pytest.mark.parametrize(
    ("whole", "chunk_seconds"),
    [("v1_tiny", 0.1), ("v1_tiny", 1.5), ("nano_tiny", 1.5), ("v2_micro", 0.1)],
    indirect=["whole"],
)
def test_long_audio_in_chunks_is_the_whole(whole, chunk_seconds):
    """Chunks below and above the length of the windows."""
    codec, wav, codes, wav_hat = whole
    lengths = np.array([wav.shape[-1] - 5000, wav.shape[-1]])
    found = moss_tok.encode(codec, wav, lengths, chunk_seconds=chunk_seconds)
    expected = moss_tok.encode(codec, wav, lengths, chunk_seconds=0)
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(found.lengths, expected.lengths)
    np.testing.assert_array_equal(found.codes[1], codes[1])
    assert_near(moss_tok.decode(codec, codes, chunk_seconds=chunk_seconds).wav, wav_hat)


def test_long_audio_is_cut_by_itself(v1_tiny, monkeypatch):
    wav = np.zeros((1, 1, 40 * 1920), np.float32)
    assert inference._frames_per_chunk(v1_tiny, 40, None) == 40
    for second in (1, np.int64(1), np.float32(1)):
        assert inference._frames_per_chunk(v1_tiny, 40, second) == 10
    monkeypatch.setattr(inference, "WHOLE_SECONDS", 2.0)
    monkeypatch.setattr(inference, "CHUNK_SECONDS", 1.0)
    assert inference._frames_per_chunk(v1_tiny, 40, None) == 10  # equal parts
    assert moss_tok.encode(v1_tiny, wav).codes.shape == (1, 8, 40)
    for value in (-1, np.nan, "5"):
        with pytest.raises(ValueError, match="chunk_seconds must be a number of at least 0"):
            moss_tok.encode(v1_tiny, wav, chunk_seconds=value)


@pytest.mark.parametrize("function", ["encode", "decode"])
def test_memory_does_not_grow_with_the_length(micro, function):
    def temporary_bytes(num_frames):
        if function == "encode":
            args = (jnp.zeros((1, 1, num_frames * 16)), jnp.array([num_frames]), 4, 50)
            compiled = inference._encode.lower(micro, *args).compile()
        else:
            args = (jnp.zeros((1, 4, num_frames), jnp.int32), jnp.array([num_frames]), 4, 50)
            compiled = inference._decode.lower(micro, *args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(16007) < 1.01 * temporary_bytes(4007) + 1000


def test_slots_are_independent(v1_tiny, rng):
    """One goes on, one idles, one ends within a frame, one begins anew, one hears NaN.

    Where a step is traced, as here, NaN cannot be refused.
    """
    hop, codec = 1920, v1_tiny
    encode_step = jax.jit(streaming.encode_step)
    wav = 0.1 * rng.standard_normal((5, 1, 40 * hop), np.float32)
    expected = np.asarray(moss_tok.encode(codec, wav).codes)
    state = streaming.init_encoder_stream(codec, 5)
    state, first = encode_step(codec, state, wav[..., : 20 * hop])
    np.testing.assert_array_equal(first, expected[..., :20])
    state = streaming.reset_streams(state, np.array([False, False, False, True, False]))
    chunk = wav[..., 20 * hop : 24 * hop].copy()
    chunk[3] = wav[3, :, : 4 * hop]
    chunk[1] = chunk[4] = np.nan
    lengths = np.array([4 * hop, 0, 2 * hop + 7, 4 * hop, 4 * hop])
    state, second = encode_step(codec, state, chunk, lengths)
    np.testing.assert_array_equal(second[0], expected[0, :, 20:24])
    np.testing.assert_array_equal(second[1], 0)
    ended = moss_tok.encode(codec, wav[2:3, :, : 22 * hop + 7]).codes[0]
    np.testing.assert_array_equal(second[2, :, :3], ended[:, 20:])
    np.testing.assert_array_equal(second[2, :, 3:], 0)
    np.testing.assert_array_equal(second[3], expected[3, :, :4])
    assert state.position.tolist() == [24, 20, 23, 4, 24]
    # The one that idled goes on, the one that heard NaN begins anew and has forgotten it.
    state = streaming.reset_streams(state, np.arange(5) == 4)
    chunk = np.zeros((5, 1, 4 * hop), np.float32)
    chunk[1], chunk[4] = wav[1, :, 20 * hop : 24 * hop], wav[4, :, : 4 * hop]
    state, third = encode_step(codec, state, chunk, np.array([0, 1, 0, 0, 1]) * 4 * hop)
    np.testing.assert_array_equal(third[1], expected[1, :, 20:24])
    np.testing.assert_array_equal(third[4], expected[4, :, :4])


def test_slots_of_codes_are_independent(v1_tiny, rng):
    """One goes on, one idles, one ends, one begins anew, one gets codes that are out of range."""
    codes, hop = rng.integers(0, 64, (5, 8, 12)), 1920
    codes[4, :, 5:7] = -1, 10**6
    expected = np.asarray(moss_tok.decode(v1_tiny, np.clip(codes, 0, 63)).wav)
    decode_step = jax.jit(streaming.decode_step)  # traced codes cannot be refused
    state = streaming.init_decoder_stream(v1_tiny, 5)
    position = np.zeros(5, int)
    for begins, counts in ([], [4] * 5), ([3], [4, 0, 2, 4, 4]), ([], [0, 4, 0, 1, 4]):
        state = streaming.reset_streams(state, np.isin(np.arange(5), begins))
        position[begins] = 0
        chunk, wanted = np.full((5, 8, 4), 99), np.zeros((5, 1, 4 * hop), np.float32)
        for slot, (start, count) in enumerate(zip(position, counts, strict=True)):
            end = start + count
            chunk[slot, :, :count] = codes[slot, :, start:end]
            wanted[slot, :, : count * hop] = expected[slot, :, start * hop : end * hop]
        state, found = decode_step(v1_tiny, state, chunk, np.array(counts))
        assert_near(found, wanted)
        assert not np.any(np.asarray(found)[wanted == 0])
        position += counts
        assert state.position.tolist() == position.tolist()


def test_after_a_day_streams_are_as_exact(v1_tiny, monkeypatch):
    """Phases depend on distances alone, and are as precise far out as at the beginning.

    One codec: the positions are the same for all.
    """
    codec, wav, codes, wav_hat = code_noise(v1_tiny)
    day, table = 24 * 3600 * 400, rope.rope_table
    monkeypatch.setattr(rope, "rope_table", lambda p, *args: table(p + day, *args))
    jax.clear_caches()
    hop = codec.config.hop_length
    state = streaming.init_encoder_stream(codec, 2)
    player = streaming.init_decoder_stream(codec, 2)
    for start in range(0, MOST_FRAMES, 12):
        chunk = wav[..., start * hop : (start + 12) * hop]
        state, found = streaming.encode_step(codec, state, chunk)
        np.testing.assert_array_equal(found, codes[..., start : start + 12])
        player, found = streaming.decode_step(codec, player, found)
        assert_near(found, wav_hat[..., start * hop : (start + 12) * hop])
    jax.clear_caches()


@pytest.mark.parametrize("position", [24 * 3600 * 25 // 2, (2**31 - 1) // 8 - 147])
def test_where_a_stream_is_changes_nothing(v1_tiny, rng, position):
    """A day in, and before the last frame that can be counted: the fastest stage has 8 of each."""
    wav = np.repeat(0.1 * rng.standard_normal((1, 1, 147 * 1920), np.float32), 2, axis=0)
    state, codes = streaming.init_encoder_stream(v1_tiny, 2), []
    state = state.replace(position=jnp.array([0, position]))
    for start in range(0, 147 * 1920, 7 * 1920):
        state, part = streaming.encode_step(v1_tiny, state, wav[..., start : start + 7 * 1920])
        codes.append(part)
    assert state.position.tolist() == [147, position + 147]
    heard = np.concatenate(codes, axis=-1)[..., 100:]  # what a stream begins with is heard in 99
    np.testing.assert_array_equal(heard[1], heard[0])


@pytest.mark.parametrize("start", [0, 3, 17, 10**6])
@pytest.mark.parametrize("num_frames", [1, 5, 64, 130])
@pytest.mark.parametrize("window", [1, 9, 150])
def test_cached_attention_against_brute_force(rng, start, num_frames, window):
    shape = (2, 2, window - 1 + num_frames, 4)
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for _ in range(3))
    starts = np.array([start, max(0, start - 2)])  # each slot elsewhere
    new = slice(window - 1, None)
    rings = []
    for x in (k, v):
        ring = np.full((2, 2, window - 1, 4), 99.0, np.float32)  # what no frame has written yet
        for slot, s in enumerate(starts):
            for age in range(min(window - 1, s)):
                ring[slot, :, (s - 1 - age) % (window - 1)] = x[slot, :, window - 2 - age]
        rings.append(ring)
    found = attention.attend_cached(
        q[:, :, new],
        k[:, :, new],
        v[:, :, new],
        attention.Cache(*rings),
        jnp.array(starts),
        "highest",
    )
    for slot, s in enumerate(starts):
        for t in range(num_frames):
            keys = slice(t + max(0, window - 1 - s - t), t + window)
            scores = np.einsum("nh,nsh->ns", q[slot, :, window - 1 + t], k[slot, :, keys]) / 2
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            expected = np.einsum("ns,nsh->nh", weights, v[slot, :, keys])
            np.testing.assert_allclose(found[slot, :, t], expected, atol=2e-6)


@pytest.mark.parametrize("mesh", ["data:8", "data:2,fsdp:2,tensor:2"])
def test_on_a_mesh(micro, rng, mesh):
    """The state is split like its streams and heads, and stays so: nothing compiles again."""
    mesh = sharding.make_mesh(mesh)
    hop = micro.config.hop_length
    boxed = pretrained.boxed_shapes(micro.config)
    params = sharding.whole(micro.params, sharding.param_shardings(boxed, mesh))
    codec = moss_tok.Codec(params, micro.config)
    wav = 0.1 * rng.standard_normal((8, 1, 20 * hop), np.float32)
    expected = moss_tok.encode(micro, wav)
    wav_hat = moss_tok.decode(micro, expected.codes).wav
    states = [streaming.init_encoder_stream(codec, 8), streaming.init_decoder_stream(codec, 8)]
    keys = states[0].caches["stage_1"].keys
    heads = "tensor" if mesh.shape["tensor"] > 1 else None
    assert keys.sharding.is_equivalent_to(
        NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp"), heads)), keys.ndim
    )
    steps = (streaming._encode_step, streaming._decode_step, streaming._reset_streams)
    counts = []
    for start in range(0, 20, 5):
        chunk = sharding.global_batch(mesh, 8, wav[..., start * hop : (start + 5) * hop])
        states[0], codes = streaming.encode_step(codec, states[0], chunk)
        np.testing.assert_array_equal(codes, expected.codes[..., start : start + 5])
        states[1], found = streaming.decode_step(codec, states[1], codes)
        assert_near(found, wav_hat[..., start * hop : (start + 5) * hop])
        states = [streaming.reset_streams(state, np.zeros(8, bool)) for state in states]
        counts.append([step._cache_size() for step in steps])
    assert counts[1:] == counts[:1] * 3
    found = states[0].caches["stage_1"].keys.sharding
    assert found.is_equivalent_to(keys.sharding, keys.ndim)


def test_in_half_precision(v1_tiny, rng):
    """bfloat16 finds other codes, but a stream is as near to the whole as they are to float32."""
    half = dataclasses.replace(v1_tiny, compute=ComputeConfig("bfloat16", "default"))
    codes = rng.integers(0, 64, (1, 8, 30))
    whole = np.asarray(moss_tok.decode(half, codes).wav)
    state, parts = streaming.init_decoder_stream(half, 1), []
    assert state.caches["stage_0"].keys.dtype == jnp.bfloat16
    for start in range(0, 30, 5):
        state, part = streaming.decode_step(half, state, codes[..., start : start + 5])
        parts.append(part)
    exact = np.asarray(moss_tok.decode(v1_tiny, codes).wav)
    error = np.abs(whole - exact).max()
    assert np.abs(np.concatenate(parts, axis=-1) - whole).max() < error < 0.1 * np.abs(exact).max()


def test_errors_of_the_steps(v1_tiny):
    state = moss_tok.init_encoder_stream(v1_tiny, 2)
    other = moss_tok.init_decoder_stream(v1_tiny, 2)
    scalar = state.replace(position=jnp.int32(0))
    # The same stages, but the first hears less.
    patch, stage, *rest = v1_tiny.config.encoder
    stage = dataclasses.replace(stage, context_seconds=0.5 * stage.context_seconds)
    config = dataclasses.replace(v1_tiny.config, encoder=(patch, stage, *rest))
    short = v1_tiny.replace(config=config)
    of_others = SimpleNamespace(is_fully_addressable=False)  # a global array of several processes
    elsewhere = v1_tiny.replace(params=jax.tree.map(lambda _: of_others, v1_tiny.params))
    wav, codes = np.zeros((2, 1, 1920), np.float32), np.zeros((2, 8, 1), np.int32)
    for call, message in [
        (lambda: moss_tok.encode_step(v1_tiny, state, wav[:1]), "wav must have the shape"),
        (lambda: moss_tok.encode_step(v1_tiny, state, wav[..., :-1]), "whole frames of 1920"),
        (lambda: moss_tok.encode_step(v1_tiny, state, wav.astype(int)), "floating point"),
        (lambda: moss_tok.encode_step(v1_tiny, state, "a.wav"), "wav must be an array"),
        (lambda: moss_tok.encode_step(v1_tiny, state, wav, None, 9), "num_quantizers must be"),
        (lambda: moss_tok.decode_step(v1_tiny, other, codes[0]), "codes must have the shape"),
        (lambda: moss_tok.decode_step(v1_tiny, other, codes * 1.0), "codes must be integers"),
        (lambda: moss_tok.encode_step(v1_tiny, state, wav, np.array([0, 1.0])), "got float64"),
        (lambda: moss_tok.encode_step(v1_tiny, state, wav, [True, False]), "got bool"),
        (lambda: moss_tok.reset_streams(state, np.ones(3, bool)), r"slots must .*\[2\].*\[3\]"),
        (lambda: moss_tok.encode_step(v1_tiny, other, wav), "state must be one of init_encoder"),
        (lambda: moss_tok.decode_step(v1_tiny, state, codes), "state must be one of init_decoder"),
        (lambda: moss_tok.encode_step(short, state, wav), "state must be one of init_encoder"),
        (lambda: moss_tok.encode_step(v1_tiny, None, wav), "init_decoder_stream, got NoneType"),
        (lambda: moss_tok.encode_step(v1_tiny, state.replace(position=None), wav), "got StreamSt"),
        (lambda: moss_tok.encode_step(v1_tiny, scalar, wav), r"the shape \[B\], got \[\]"),
        (
            lambda: moss_tok.EncoderStream(elsewhere),
            "EncoderStream needs .* one process, .* encode_step",
        ),
        (lambda: moss_tok.encode_step(v1_tiny, state.replace(caches=None), wav), "got StreamState"),
        (lambda: moss_tok.decode_step(v1_tiny, state.caches, codes), "state must be .* got dict"),
        (lambda: moss_tok.reset_streams(None, np.ones(2, bool)), "state must be .* got NoneType"),
        (lambda: moss_tok.encode_step(v1_tiny, state, wav, ["a", "b"]), "lengths must be integers"),
        (lambda: moss_tok.EncoderStream(v1_tiny, source=3), "source must be an iterable"),
        (lambda: moss_tok.EncoderStream(v1_tiny, None, 2, source=[]), "source needs num_slots=1"),
        (lambda: moss_tok.reset_streams(state, np.arange(2)), "slots must be booleans"),
        (lambda: moss_tok.init_encoder_stream(v1_tiny, 0), "batch_size must be .* got 0"),
        (lambda: moss_tok.EncoderStream(v1_tiny, num_slots=0), "num_slots must be .* got 0"),
        (lambda: moss_tok.DecoderStream(v1_tiny, num_slots=1.5), "num_slots must be .* got 1.5"),
        (lambda: moss_tok.EncoderStream(v1_tiny, chunk_frames=()), "chunk_frames must be"),
        (lambda: moss_tok.EncoderStream(v1_tiny, chunk_frames=4), "chunk_frames must be"),
        (lambda: moss_tok.EncoderStream(v1_tiny, 9), "num_quantizers must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    moss_tok.encode_step(v1_tiny, state, wav)  # none of them took the state


def test_a_state_is_used_once(v1_tiny):
    state = moss_tok.init_encoder_stream(v1_tiny, 1)
    wav = np.zeros((1, 1, 1920), np.float32)
    moss_tok.encode_step(v1_tiny, state, wav)
    for call in (
        lambda: moss_tok.encode_step(v1_tiny, state, wav),
        lambda: moss_tok.reset_streams(state, np.ones(1, bool)),
    ):
        with pytest.raises(ValueError, match="this state has been used"):
            call()
