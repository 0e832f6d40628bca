"""Stream classes: they buffer blocks of any length, and say what is wrong with a block."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_near, init_params, micro_config

import moss_tok
from moss_tok.codec import live, streaming


@pytest.mark.parametrize(
    ("whole", "sizes"),
    [("v1_tiny", (1, 4)), ("v1_tiny", (3,)), ("nano_tiny", (3,)), ("v2_micro", (1, 4))],
    indirect=["whole"],
)
def test_streams_of_samples(whole, sizes):
    """Blocks of any length; the tail is flushed by the length rule; nothing compiles on the way."""
    codec, wav, *_ = whole
    if len(sizes) == 1:  # as a checkpoint of ours comes, where official ones do not
        params = jax.device_put(codec.params, jax.devices()[0])
        codec = moss_tok.Codec(params, codec.config)
    wav = wav[0, :, : 21 * codec.config.hop_length + 100]
    expected = moss_tok.encode(codec, wav[None]).codes[0]
    wav_hat = np.asarray(moss_tok.decode(codec, expected[None]).wav[0])
    sizes_of_blocks = np.random.default_rng(1).integers(1, 9000, 99)
    edges = np.unique(np.minimum(np.cumsum([0, *sizes_of_blocks]), wav.shape[1]))
    blocks = [wav[:, a:b] for a, b in zip(edges[:-1], edges[1:], strict=True)]
    with moss_tok.EncoderStream(codec, chunk_frames=sizes) as coder:
        with moss_tok.DecoderStream(codec, chunk_frames=sizes) as player:
            before = streaming._encode_step._cache_size(), streaming._decode_step._cache_size()
            parts = [coder.push(b) for b in blocks]
            parts.append(coder.finish())
            audio = [player.push(p) for p in parts] + [player.finish()]
            after = streaming._encode_step._cache_size(), streaming._decode_step._cache_size()
            assert before == after
            np.testing.assert_array_equal(np.concatenate(parts, axis=1), expected)
            assert_near(np.concatenate(audio, axis=1), wav_hat)
            before = streaming._reset_streams._cache_size()
            coder.reset()
            assert streaming._reset_streams._cache_size() == before
            again = coder.push(wav)
            np.testing.assert_array_equal(again, expected[:, :-1])
    stream = moss_tok.EncoderStream(codec, chunk_frames=sizes, source=blocks)
    np.testing.assert_array_equal(np.concatenate(list(stream), axis=1), expected)


def test_streams_of_several_slots(v1_tiny, rng):
    wav = 0.1 * rng.standard_normal((3, 1, 30000), np.float32)
    ends = [30000, 12345, 9600]
    found = {0: [], 1: [], 2: []}
    stream = moss_tok.EncoderStream(v1_tiny, 4, num_slots=3, chunk_frames=[1, 4])
    for i in range(0, 30000, 3000):
        blocks = {s: wav[s, :, i : min(i + 3000, ends[s])] for s in range(3) if i < ends[s]}
        for slot, codes in stream.push(blocks).items():
            found[slot].append(codes)
        for slot in blocks:
            if ends[slot] <= i + 3000:
                found[slot].append(stream.finish([slot])[slot])
    for slot in range(3):
        expected = moss_tok.encode(v1_tiny, wav[slot : slot + 1, :, : ends[slot]]).codes[0, :4]
        np.testing.assert_array_equal(np.concatenate(found[slot], axis=1), expected)


def test_several_slots_of_codes(v1_tiny, rng):
    """One goes on, one idles, one ends, one begins anew, one gets codes that are out of range."""
    codes = rng.integers(0, 64, (5, 8, 12))
    expected = np.asarray(moss_tok.decode(v1_tiny, codes).wav)
    stream = moss_tok.DecoderStream(v1_tiny, num_slots=5, chunk_frames=[4])

    def push(*parts):
        """(slot, start, end), ..."""
        found = stream.push({slot: codes[slot, :, start:end] for slot, start, end in parts})
        for slot, start, end in parts:
            assert_near(found[slot], expected[slot, :, start * 1920 : end * 1920])

    push(*((slot, 0, 6) for slot in range(5)))
    assert stream.finish([2])[2].shape == (1, 0)
    stream.reset([3])
    with pytest.raises(ValueError, match="slot 4: codes must be 0..63"):
        stream.push({0: codes[0, :, 6:], 4: codes[4, :, 6:] - 64})
    push((0, 6, 11), (3, 0, 5), (4, 6, 12))
    push((0, 11, 12), (1, 6, 12), (3, 5, 12))


def test_an_iterator_goes_on_after_a_bad_block(v1_tiny, rng):
    wav = 0.1 * rng.standard_normal((1, 6000), np.float32)
    expected = moss_tok.encode(v1_tiny, wav[None]).codes[0]
    source = [wav[:, :2000], wav[0], wav[:, 2000:]]
    with moss_tok.EncoderStream(v1_tiny, chunk_frames=[1], source=source) as stream:
        for _ in range(2):
            parts = [next(stream)]
            with pytest.raises(ValueError, match="must have the shape"):
                next(stream)
            np.testing.assert_array_equal(np.concatenate([*parts, *stream], axis=1), expected)
            assert list(stream) == []
            stream.reset()


def test_after_an_interrupt_streams_can_be_reset(v1_tiny, rng, monkeypatch):
    wav = 0.1 * rng.standard_normal((1, 6000), np.float32)
    expected = moss_tok.encode(v1_tiny, wav[None]).codes[0, :, :3]
    stream = moss_tok.EncoderStream(v1_tiny, num_slots=2, chunk_frames=[4])

    def interrupted(*args):
        streaming_step(*args)
        raise KeyboardInterrupt

    streaming_step = live.encode_step
    monkeypatch.setattr(live, "encode_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stream.push({0: wav})
    monkeypatch.undo()
    with pytest.raises(ValueError, match="this state has been used"):
        stream.reset([0])
    stream.reset()
    np.testing.assert_array_equal(stream.push({1: wav})[1], expected)


def test_the_last_frame_that_can_be_counted(v1_tiny):
    stream = moss_tok.EncoderStream(v1_tiny, num_slots=2, chunk_frames=[4])
    assert stream._max_frames == (2**31 - 1) // 8 - 4
    stream._num_frames[0] = stream._max_frames - 2
    block = np.zeros((1, 1920 + 1919), np.float32)
    assert stream.push({0: block})[0].shape[1] == 1
    with pytest.raises(ValueError, match=f"at most {stream._max_frames} frames, slot 0"):
        stream.push({1: block, 0: block[:, :1]})
    assert stream.finish([0])[0].shape[1] == 1
    stream.reset()
    assert stream.push({0: block, 1: block})[1].shape[1] == 1


def test_bad_input_harms_no_slot(v1_tiny, rng):
    wav = 0.1 * rng.standard_normal((1, 6000), np.float32)
    expected = moss_tok.encode(v1_tiny, wav[None]).codes[0, :, :3]
    stream = moss_tok.EncoderStream(v1_tiny, num_slots=2, chunk_frames=[4])
    stream.finish([1])
    for block, message in [
        ({0: wav, 1: wav}, "slot 1 is finished"),
        ({0: wav, 2: wav}, "slot must be 0..1, got 2"),
        ({0: wav[0]}, r"slot 0: wav must have the shape \[1, S\], got \[6000\]: use wav\[None\]"),
        ({0: wav.repeat(2, 0)}, r"must have the shape \[1, S\]"),
        ({0: (1000 * wav).astype(np.int16)}, "must be floating point"),
        ({0: wav * np.nan}, "not finite"),
        ({0: np.full((1, 9), 1e300)}, "not finite"),
        ({0: wav, True: wav}, "slot must be 0..1, got True"),
        (wav, "has 2 slots: push a dict"),
    ]:
        with pytest.raises(ValueError, match=message):
            stream.push(block)
    with pytest.raises(ValueError, match="sample_rate must be 24000 for this codec, got 16000"):
        stream.push({0: wav}, 16000)
    with pytest.raises(ValueError, match="sample_rate must be 24000"):
        stream.push({0: wav}, np.array([24000, 16000]))
    np.testing.assert_array_equal(stream.push({0: wav}, np.int64(24000))[0], expected)
    with pytest.raises(ValueError, match="slot 1 is finished"):
        stream.finish([1])
    for call in (stream.finish, stream.reset):
        with pytest.raises(ValueError, match="slots must be a list of integers, got 1"):
            call(1)
    for slots in ([[0]], np.array([[0]]), [{}], [None], "0"):
        for call in (stream.finish, stream.reset):
            with pytest.raises(ValueError, match="slot must be 0..1, got"):
                call(slots)
    assert stream.push({}) == {}
    stream.reset([1])
    np.testing.assert_array_equal(stream.push({1: wav})[1], expected)
    stream.reset([1])
    half = jnp.asarray(wav, jnp.bfloat16)
    expected = moss_tok.encode(v1_tiny, half[None]).codes[0, :, :3]
    np.testing.assert_array_equal(stream.push({1: half})[1], expected)
    stream.close()
    with pytest.raises(ValueError, match="closed"):
        stream.push({0: wav})
    player = moss_tok.DecoderStream(v1_tiny, 8, chunk_frames=[4])
    codes = np.asarray(expected)
    for block, message in [
        (codes + 64, "slot 0: codes must be 0..63"),
        (codes - 64, "must be 0..63"),
        (codes[:4], r"must have the shape \[8, T\]"),
        (codes.astype(float), "must be integers"),
    ]:
        with pytest.raises(ValueError, match=message):
            player.push(block)
    assert player.push([[]] * 8).shape == (1, 0)
    assert player.push(codes).shape == (1, 3 * 1920)
    with pytest.raises(ValueError, match="source"):
        next(player)


def test_a_window_of_one_frame():
    """Frames that see themselves alone need no cache."""
    config = micro_config()
    sides = {
        side: tuple(
            dataclasses.replace(m, context_seconds=1e-4) if hasattr(m, "num_heads") else m
            for m in getattr(config, side)
        )
        for side in ("encoder", "decoder")
    }
    config = dataclasses.replace(config, **sides)
    codec = moss_tok.Codec(init_params(config), config)
    wav = np.random.default_rng(0).standard_normal((1, 1, 160)).astype(np.float32)
    stream = moss_tok.EncoderStream(codec, chunk_frames=[8, 2])
    expected = moss_tok.encode(codec, wav).codes[0]
    np.testing.assert_array_equal(stream.push(wav[0]), expected)


def test_a_slot_named_twice_ends_once(v1_tiny):
    with moss_tok.EncoderStream(v1_tiny, chunk_frames=[1]) as stream:
        assert stream.push(np.zeros((1, 2000), np.float32)).shape[-1] == 1
        assert stream.finish([0, 0])[0].shape[-1] == 1
