"""Values from Python: refused where they can be looked at, as before where they are traced."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moss_tok
from moss_tok import language
from moss_tok.codec import checks
from moss_tok.language import config as language_configs
from moss_tok.language import pretrained as language_models
from moss_tok.language import text
from moss_tok.nn.compute import ComputeConfig

HOP = 16  # of `micro`: 4 quantizers of 16 codes
WAV = np.full((2, 1, 4 * HOP), 0.1, np.float32)
CODES = np.full((2, 4, 4), 3, np.int32)


class Tensor:
    """What is no array of numpy's or JAX's, but becomes one, as a tensor of torch does."""

    def __init__(self, array):
        self._array = array

    def __array__(self, dtype=None, copy=None):
        if self._array is None:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad.\nUse detach().")
        return self._array


@pytest.fixture(scope="module")
def reader(micro, small_language_model):
    """A language model that reads codes of `micro`."""
    words = text.load("bytes")
    width = micro.config.quantizer.output_dim
    config = language_configs.preset("tiny", width, words.vocab_size, words.end_id, "codes")
    params = language_models.init(config, jax.random.key(0))
    return language.Language(params, config, words, ComputeConfig())


def changed(array, index, value):
    """A copy with one value in another's place."""
    array = array.copy()
    array[index] = value
    return array


def transcribe(codec, reader, codes, lengths=None):
    sampling = language.Sampling(max_tokens=1)
    return language.transcribe(codec, reader, codes, lengths, sampling=sampling)


def encode_step(codec, wav, lengths=None):
    return moss_tok.encode_step(codec, moss_tok.init_encoder_stream(codec, 2), wav, lengths)[1]


def decode_step(codec, codes, lengths=None):
    return moss_tok.decode_step(codec, moss_tok.init_decoder_stream(codec, 2), codes, lengths)[1]


BAD_LENGTHS = [
    ([-1, 2], r"lengths must be 0\.\.{size}, got -1\.\.2"),
    (np.array([-1, 2]), r"lengths must be 0\.\.{size}, got -1\.\.2"),
    (np.array([1, 2**40]), r"lengths must be 0\.\.{size}, got 1\.\.1099511627776"),
    (jnp.array([1, 65]), r"lengths must be 0\.\.{size}, got 1\.\.65"),
    (Tensor(np.array([1, 65])), r"lengths must be 0\.\.{size}, got 1\.\.65"),
    ([[1, 2]], r"lengths must be integers of the shape \[2\], got int.. \[1, 2\]"),
    ([1], r"lengths must be integers of the shape \[2\], got int.. \[1\]"),
    (3, r"lengths must be integers of the shape \[2\]"),
    ([1.0, 2.0], "lengths must be integers .* got float"),
    (["a", "b"], "lengths must be integers .* got <U1"),
    ([[1, 2], [3]], "lengths must be an array, integers, got list"),
]


@pytest.mark.parametrize(("lengths", "message"), BAD_LENGTHS)
def test_bad_lengths(micro, reader, lengths, message):
    for call, x in [
        (moss_tok.encode, WAV),
        (moss_tok.decode, CODES),
        (encode_step, WAV),
        (decode_step, CODES),
        (lambda codec, x, lengths: transcribe(codec, reader, x, lengths), CODES),
    ]:
        with pytest.raises(ValueError, match=message.format(size=x.shape[-1])):
            call(micro, x, lengths)


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, np.ndarray.tolist, Tensor])
@pytest.mark.parametrize("value", [-1, 16, 10**6])
def test_codes_outside_the_codebook(micro, reader, kind, value):
    codes = changed(CODES, (1, 2, 2), value)
    message = rf"codes must be 0\.\.15, got {min(3, value)}\.\.{max(3, value)}"
    for call in (
        lambda lengths=None: moss_tok.decode(micro, kind(codes), lengths),
        lambda lengths=None: decode_step(micro, kind(codes), lengths),
        lambda lengths=None: transcribe(micro, reader, kind(codes), lengths),
    ):
        with pytest.raises(ValueError, match=message):
            call()
        call([4, 2])  # it is past the length
    with pytest.raises(ValueError, match=message):
        language.transcribe_codes(micro, reader, list(codes))
    with pytest.raises(ValueError, match=f"slot 0: {message}"):
        moss_tok.DecoderStream(micro, chunk_frames=[1]).push(kind(codes[1]))


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, np.ndarray.tolist, Tensor])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_samples_that_are_no_numbers(micro, reader, kind, value):
    wav = changed(WAV.astype(np.float64), (1, 0, 2 * HOP), value)
    message = "wav has samples that are not finite numbers"
    for call in (moss_tok.encode, encode_step):
        with pytest.raises(ValueError, match=message):
            call(micro, kind(wav))
        call(micro, kind(wav), [4 * HOP, 2 * HOP])  # it is past the length
    with pytest.raises(ValueError, match=message):
        language.transcribe_wavs(micro, reader, list(wav))
    with pytest.raises(ValueError, match=f"slot 0: {message}"):
        moss_tok.EncoderStream(micro, chunk_frames=[1]).push(kind(wav[1]))


def test_a_language_model_of_latents_checks_audio(micro, reader):
    latents = reader.replace(config=language_configs.preset("tiny", 8, 257, 256, "latents"))
    with pytest.raises(ValueError, match="wav has samples that are not finite"):
        language.transcribe_wavs(micro, latents, [WAV[0] * np.nan])


@pytest.mark.parametrize("value", [np.nan, 1.0, -1.0])
def test_bfloat16(value):
    wav = changed(WAV, (0, 0, 3), value).astype(jnp.bfloat16)
    if np.isnan(value):
        with pytest.raises(ValueError, match="not finite"):
            checks.check_wav(wav, ("B", 1, "S"))
    else:
        checks.check_wav(wav, ("B", 1, "S"))


INT16 = (1000 * WAV).astype(np.int16)
STEREO = np.zeros((2, 9), np.float32)


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: checks.check_wav(INT16, ("B", 1, "S")), r"got int16: use wav / 32768$"),
        (lambda: checks.check_wav(INT16.astype(int), ("B", 1, "S")), "got int64: divide it by the"),
        (lambda: checks.check_wav(WAV > 0, ("B", 1, "S")), r"in \[-1, 1\], got bool$"),
        (lambda: checks.check_wav(WAV * 1j, ("B", 1, "S")), "got complex64$"),
        (lambda: checks.check_wav(WAV[0, 0], ("B", 1, "S")), r"got \[64\]: use wav\[None, None\]$"),
        (lambda: checks.check_wav(WAV[0], ("B", 1, "S")), r"got \[1, 64\]: use wav\[None\]$"),
        (lambda: checks.check_wav(WAV[:, 0], ("B", 1, "S")), r"\[2, 64\]: use wav\[:, None\] for"),
        (lambda: checks.check_wav(WAV[0].T, ("B", 1, "S")), r"\[64, 1\]: use wav.T\[None\]$"),
        (lambda: checks.check_wav(STEREO, ("B", 2, "S")), r"got \[2, 9\]: use wav\[None\]$"),
        (lambda: checks.check_wav(STEREO.T, ("B", 2, "S")), r"got \[9, 2\]: use wav.T\[None\]$"),
        (lambda: checks.check_wav(STEREO[0], ("B", 2, "S")), r"\[B, 2, S\], got \[9\]$"),
        (lambda: checks.check_wav("a.wav", ("B", 1, "S")), "wav must be an array, .* got str"),
        (lambda: checks.check_wav(Tensor(None), ("B", 1, "S")),
         r"got Tensor \(Can't call numpy\(\) on Tensor that requires grad.\)$"),
        (lambda: checks.check_codes(CODES[0], ("B", "Q", "T"), 16), r"use codes\[None\] for one"),
        (lambda: checks.check_codes(CODES[0, 0], ("B", "Q", "T"), 16), r"\[B, Q, T\], got \[4\]$"),
        (lambda: checks.check_codes(CODES * 1.0, ("B", "Q", "T"), 16), "integers, got float64$"),
        (lambda: checks.check_codes(CODES > 0, ("B", "Q", "T"), 16), "integers, got bool$"),
        (lambda: checks.check_codes([[[2**70]]], ("B", "Q", "T"), 16), "integers, got object"),
        (lambda: checks.check_recordings("wav", [WAV[0], WAV[0, 0]], (1, "S")), r"wav 1 must have"),
    ],
)  # fmt: skip
def test_what_to_do_is_said(check, message):
    with pytest.raises(ValueError, match=message):
        check()


def test_what_is_like_an_array_is_accepted(micro):
    expected = moss_tok.encode(micro, WAV, np.array([64, 20])).codes
    for kind in (np.ndarray.tolist, Tensor, jnp.asarray):
        found = moss_tok.encode(micro, kind(WAV), kind(np.array([64, 20]))).codes
        np.testing.assert_array_equal(found, expected)
    wav = moss_tok.decode(micro, CODES).wav
    for dtype in (np.int8, np.int64, np.uint8, np.uint32, np.uint64):
        np.testing.assert_array_equal(moss_tok.decode(micro, CODES.astype(dtype)).wav, wav)
    int16 = np.int16(1000 * WAV)
    codes = moss_tok.encode(micro, int16 / 32768).codes  # as the message says
    np.testing.assert_array_equal(codes, moss_tok.encode(micro, np.float32(int16 / 32768)).codes)


@pytest.mark.parametrize("dtype", [np.int64, np.uint32])
def test_traced_codes_and_lengths_are_clamped(micro, rng, dtype):
    """Constants of a traced function are traced, too."""
    codes = rng.integers(-9, 30, CODES.shape).astype(dtype)
    codes[0, 0, :2] = np.iinfo(dtype).min, np.iinfo(dtype).max
    lengths = np.array([-5, 99])
    valid = np.clip(codes, 0, 15).astype(np.int32)
    expected = moss_tok.decode(micro, valid, np.array([0, 4]))
    found = jax.jit(lambda codec: moss_tok.decode(codec, codes, lengths))(micro)
    np.testing.assert_allclose(found.wav, expected.wav, atol=1e-5)
    assert found.lengths.tolist() == expected.lengths.tolist() == [0, 64]


def test_traced_nan_stays_in_its_item(micro):
    wav = changed(WAV, (1, 0, 5), np.nan)
    expected = moss_tok.encode(micro, WAV).codes
    for encode in (
        jax.jit(lambda codec, wav: moss_tok.encode(codec, wav).codes),
        jax.vmap(lambda codec, wav: moss_tok.encode(codec, wav[None]).codes[0], (None, 0)),
        jax.jit(lambda codec, _: moss_tok.encode(codec, jnp.asarray(wav)).codes),
    ):
        np.testing.assert_array_equal(encode(micro, wav)[0], expected[0])


def test_tracing_is_not_changed_by_the_checks(micro, monkeypatch):
    """The same operations as without looking at values, and no callback to the host."""
    lengths = np.array([9, 4])
    traced = {
        "encode": lambda codec, wav, codes, n: moss_tok.encode(codec, wav, n),
        "decode": lambda codec, wav, codes, n: moss_tok.decode(codec, codes, n),
        "encode_step": lambda codec, wav, codes, n: encode_step(codec, wav, n),
        "decode_step": lambda codec, wav, codes, n: decode_step(codec, codes, n),
    }
    arguments = (micro, WAV, CODES, lengths)
    found = {name: str(jax.make_jaxpr(call)(*arguments)) for name, call in traced.items()}
    monkeypatch.setattr(checks, "_valid_parts", lambda *args: [])
    monkeypatch.setattr(checks, "_host_values", lambda *args: None)
    for name, call in traced.items():
        assert str(jax.make_jaxpr(call)(*arguments)) == found[name]
        assert "callback" not in found[name]


def test_arrays_on_an_accelerator_are_not_waited_for(monkeypatch):
    """All but lengths, which are few; there is none here, so the devices' name is changed."""
    wav = jnp.asarray(WAV) * np.nan
    codes = jnp.asarray(CODES) + 99
    gpu = SimpleNamespace(platform="gpu")
    monkeypatch.setattr(type(wav), "devices", lambda self: [gpu])
    checks.check_wav(wav, ("B", 1, "S"))
    checks.check_codes(codes, ("B", "Q", "T"), 16)
    with pytest.raises(ValueError, match=r"lengths must be 0\.\.4, got 5\.\.5"):
        checks.check_codes(codes, ("B", "Q", "T"), 16, jnp.array([5, 5]))
    with pytest.raises(ValueError, match="not finite"):
        checks.check_wav(np.asarray(wav), ("B", 1, "S"))
