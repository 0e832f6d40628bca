"""encode and decode: batches, lengths, padding, prefixes, transformations, errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moss_tok
from moss_tok.codec import inference


@pytest.fixture(scope="module")
def wavs():
    generator = np.random.default_rng(1)
    return [0.1 * generator.standard_normal((1, n), np.float32) for n in (9600, 1, 5000, 1920)]


def pad(wavs, size, fill):
    out = np.full((len(wavs), wavs[0].shape[0], size), fill, np.float32)
    for row, wav in zip(out, wavs, strict=True):
        row[:, : wav.shape[-1]] = wav
    return out


@pytest.mark.parametrize("fill", [0.0, 0.5, np.nan, np.inf])
@pytest.mark.parametrize("size", [9600, 12345])
def test_items_do_not_depend_on_their_batch(v1_tiny, wavs, fill, size):
    lengths = np.array([w.shape[-1] for w in wavs])
    batch = moss_tok.encode(v1_tiny, pad(wavs, size, fill), lengths)
    assert batch.codes.shape == (4, 8, -(-size // 1920))
    assert batch.codes.dtype == jnp.int32
    np.testing.assert_array_equal(batch.lengths, -(-lengths // 1920))
    decoded = moss_tok.decode(v1_tiny, batch.codes, batch.lengths)
    for i, wav in enumerate(wavs):
        alone = moss_tok.encode(v1_tiny, wav[None])
        n = alone.codes.shape[-1]
        np.testing.assert_array_equal(batch.codes[i, :, :n], alone.codes[0])
        np.testing.assert_array_equal(batch.codes[i, :, n:], 0)
        audio = moss_tok.decode(v1_tiny, alone.codes)
        assert audio.lengths[0] == decoded.lengths[i] == n * 1920
        np.testing.assert_allclose(decoded.wav[i, :, : n * 1920], audio.wav[0], atol=1e-5)
        np.testing.assert_array_equal(decoded.wav[i, :, n * 1920 :], 0)


def test_codes_past_the_length_are_not_looked_at(v1_tiny, rng):
    codes = rng.integers(0, 64, (1, 8, 10))
    wrong = codes.copy()
    wrong[:, :, 7:] = 10**6
    outputs = [moss_tok.decode(v1_tiny, c, np.array([7])).wav for c in (codes, wrong)]
    np.testing.assert_array_equal(*outputs)


def test_an_empty_item(v1_tiny):
    encoded = moss_tok.encode(v1_tiny, np.ones((2, 1, 4000), np.float32), np.array([0, 4000]))
    assert encoded.lengths.tolist() == [0, 3]
    np.testing.assert_array_equal(encoded.codes[0], 0)


@pytest.mark.parametrize("n", [1, 3, 8])
def test_num_quantizers_is_a_prefix(v1_tiny, wavs, n):
    full = moss_tok.encode(v1_tiny, wavs[0][None])
    part = moss_tok.encode(v1_tiny, wavs[0][None], num_quantizers=n)
    np.testing.assert_array_equal(part.codes, full.codes[:, :n])
    assert moss_tok.decode(v1_tiny, part.codes).wav.shape == (1, 1, 9600)


@pytest.mark.parametrize("whole_seconds", [60.0, 0.0])
def test_one_program_decodes_all_prefixes(v1_tiny, wavs, monkeypatch, whole_seconds):
    """At once or in chunks, and as their codes alone are decoded, by another program."""
    monkeypatch.setattr(inference, "WHOLE_SECONDS", whole_seconds)
    monkeypatch.setattr(inference, "CHUNK_SECONDS", 0.16)
    codes = np.asarray(moss_tok.encode(v1_tiny, wavs[0][None]).codes[0])
    inference.decode_one(v1_tiny, codes)
    compiled = inference._decode._cache_size()
    found = [inference.decode_one(v1_tiny, codes, n) for n in range(1, 9)]
    assert inference._decode._cache_size() == compiled
    for n, wav in enumerate(found, 1):
        alone = inference.decode_one(v1_tiny, codes[:n])
        np.testing.assert_allclose(wav, alone, rtol=0, atol=1e-6 * np.abs(alone).max())


def test_under_jit_vmap_and_as_a_pytree(v1_tiny, wavs):
    wav = np.stack([wavs[0], 0.5 * wavs[0]])
    expected = moss_tok.encode(v1_tiny, wav).codes
    jitted = jax.jit(lambda codec, wav: moss_tok.encode(codec, wav, num_quantizers=8).codes)
    np.testing.assert_array_equal(jitted(v1_tiny, wav), expected)
    mapped = jax.vmap(lambda wav: moss_tok.encode(v1_tiny, wav[None]).codes[0])
    np.testing.assert_array_equal(mapped(wav), expected)
    same = jax.tree.map(lambda x: x, v1_tiny)
    assert same.config == v1_tiny.config


@pytest.mark.parametrize("name", ["num_quantizers", "chunk_seconds"])
def test_traced_arguments_that_must_be_static(v1_tiny, name):
    with pytest.raises(ValueError, match=f"{name} must be static .*static_argnames='{name}'"):
        jax.eval_shape(lambda value: moss_tok.encode(v1_tiny, WAV, **{name: value}), 1)


def test_stereo(nano_tiny, rng):
    wav = 0.1 * rng.standard_normal((2, 2, 8000), np.float32)
    encoded = moss_tok.encode(nano_tiny, wav)
    assert encoded.codes.shape == (2, 8, 3)
    assert moss_tok.decode(nano_tiny, encoded.codes).wav.shape == (2, 2, 3 * 3840)


WAV = np.zeros((1, 1, 4000), np.float32)
CODES = np.zeros((1, 8, 3), np.int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: moss_tok.encode(c, WAV[0]), r"wav must have the shape \[B, 1, S\]"),
        (lambda c: moss_tok.encode(c, np.zeros((1, 2, 9))), r"wav must have the shape"),
        (lambda c: moss_tok.encode(c, WAV[..., :0]), r"wav must have the shape"),
        (lambda c: moss_tok.encode(c, WAV.astype(np.int16)), "wav must be floating point"),
        (lambda c: moss_tok.encode(c, "a.wav"), "wav must be an array, .* got str"),
        (lambda c: moss_tok.decode(c, [[1, 2], [3]]), "codes must be an array, .* got list"),
        (lambda c: moss_tok.encode(c, WAV, np.array([1, 2])), "lengths must be integers"),
        (lambda c: moss_tok.encode(c, WAV, np.array([1.0])), "lengths must be integers"),
        (lambda c: moss_tok.encode(c, WAV, num_quantizers=0), "num_quantizers must be 1..8, got 0"),
        (lambda c: moss_tok.encode(c, WAV, num_quantizers=9), "num_quantizers must be 1..8, got 9"),
        (lambda c: moss_tok.encode(c, WAV, num_quantizers=1.5), "num_quantizers must be 1..8"),
        (lambda c: moss_tok.encode(c, WAV, num_quantizers=True), "num_quantizers must be 1..8"),
        (lambda c: moss_tok.decode(c, CODES[0]), r"codes must have the shape \[B, Q, T\]"),
        (lambda c: moss_tok.decode(c, CODES.astype(float)), "codes must be integers"),
        (lambda c: moss_tok.decode(c, [[[2**40]]]), r"codes must be 0\.\.63, got 1099511627776"),
        (lambda c: moss_tok.decode(c, np.zeros((1, 9, 3), int)), "num_quantizers must be 1..8"),
        (lambda c: moss_tok.decode(c, CODES[..., :0]), "codes must have the shape"),
    ],
)
def test_errors_say_what_is_accepted(v1_tiny, call, message):
    with pytest.raises(ValueError, match=message):
        call(v1_tiny)


def test_more_samples_than_can_be_counted(v1_tiny):
    """They wrapped around, and the audio was zero."""
    wav = jax.ShapeDtypeStruct((1, 1, 2**31), jnp.float32)
    with pytest.raises(ValueError, match="2147483648 samples .* 2147483647: use EncoderStream"):
        jax.eval_shape(lambda wav: moss_tok.encode(v1_tiny, wav), wav)
    codes = jax.ShapeDtypeStruct((1, 8, 2**31 // 1920 + 1), jnp.int32)
    with pytest.raises(ValueError, match="use DecoderStream"):
        jax.eval_shape(lambda codes: moss_tok.decode(v1_tiny, codes), codes)


def test_a_codec_without_one_side(v1_tiny):
    params = {k: v for k, v in v1_tiny.params.items() if k != "decoder"}
    half = dataclasses.replace(v1_tiny, params=params)
    moss_tok.encode(half, WAV)
    with pytest.raises(ValueError, match="loaded without its decoder"):
        moss_tok.decode(half, CODES)


def test_numpy_integers_count(v1_tiny):
    assert moss_tok.encode(v1_tiny, WAV, num_quantizers=np.int64(2)).codes.shape[1] == 2


def test_padding_is_small():
    sizes = np.arange(1, 5000)
    padded = np.array([inference.bucket_frames(int(n)) for n in sizes])
    assert (padded >= sizes).all() and (padded <= 1.125 * sizes).all()
    assert len(set(padded[sizes > 100])) < 50
    assert padded[sizes > 100].sum() < 1.07 * sizes[sizes > 100].sum()
