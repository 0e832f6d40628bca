"""A program as users write it, for mypy: what the public names take and return. It is never run."""

from collections.abc import Iterator
from pathlib import Path
from typing import assert_type

import jax
import numpy as np

import moss_tok
from moss_tok import language, speech
from moss_tok.audio import files
from moss_tok.data import read_codes


def encode_and_decode() -> None:
    """Arrays of numpy or jax go in, arrays of jax come out."""
    codec = moss_tok.load(Path("runs/quickstart"), component="all")
    assert_type(codec, moss_tok.Codec)
    assert_type(codec.config.sample_rate, int)
    wav = files.read("speech.flac", codec.config.sample_rate, codec.config.num_channels)
    codes, lengths = moss_tok.encode(codec, wav[None], np.array([5]), num_quantizers=8)
    assert_type(codes, jax.Array)
    assert_type(lengths, jax.Array)
    assert_type(moss_tok.decode(codec, np.asarray(codes), lengths).wav, jax.Array)
    assert_type(moss_tok.preset("nano"), moss_tok.CodecConfig)
    assert_type(codec.config.num_frames(48000), int)
    assert_type(codec.config.num_frames(lengths), jax.Array)
    assert_type(moss_tok.__version__, str)


def streams(codec: moss_tok.Codec, microphone: Iterator[np.ndarray]) -> None:
    """The classes, and the pure steps."""
    with moss_tok.EncoderStream(codec, num_quantizers=8) as coder:
        for block in microphone:
            coder.push(block, sample_rate=24000)
        coder.finish()
    with moss_tok.DecoderStream(codec, source=iter([np.zeros((8, 1), int)])) as player:
        for wav in player:
            assert_type(wav, np.ndarray)
    state = moss_tok.init_encoder_stream(codec, 1)
    state, codes = moss_tok.encode_step(codec, state, np.zeros((1, 1, 1920)), np.array([1920]))
    assert_type(state, moss_tok.StreamState)
    assert_type(codes, jax.Array)
    moss_tok.reset_streams(state, np.array([True]))


def texts(codec: moss_tok.Codec, codes: np.ndarray, wav: np.ndarray) -> None:
    """Recognition and synthesis."""
    reader = language.load("runs/asr")
    sampling = language.Sampling(temperature=0.5, max_tokens=100)
    assert_type(language.transcribe(codec, reader, codes, sampling=sampling), list[str])
    assert_type(language.transcribe_wavs(codec, reader, [wav]), list[str])
    speaker = speech.load("runs/tts")
    request = speech.Request("four seven two")
    assert_type(speech.speak(speaker, codec, [request])[0].wav, np.ndarray)
    for block in speech.stream(speaker, codec, request):
        assert_type(block, np.ndarray)
    for item in read_codes("codes"):
        print(item)
