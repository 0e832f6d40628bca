"""Speaks texts: a speech model samples codes, and its codec decodes them."""

from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from moss_tok.audio import files
from moss_tok.codec import pretrained as codecs
from moss_tok.codec.inference import Codec, decode_one, encode_one
from moss_tok.codec.live import DecoderStream
from moss_tok.speech import generate
from moss_tok.speech.config import SpeechConfig
from moss_tok.speech.layout import Request
from moss_tok.speech.sampling import DEFAULT, FIRST_IDEOGRAPH, Sampling
from moss_tok.speech.steps import Speech

_SILENCE_DB = -60.0  # a prompt below this level is silent


class SpokenAudio(NamedTuple):
    """Speech.

    Attributes:
      wav: [C, S] at the codec's sample rate.
      ended: Whether the model ended the speech; if False, it was cut at the longest duration for
        its text.
    """

    wav: np.ndarray
    ended: bool


class Block(NamedTuple):
    """A part of speech that is being sampled.

    Attributes:
      codes: [q, T], the codes that were sampled; T is 0 in the last block.
      wav: [C, S], the audio that was decoded; S may be 0 in the last block.
      ended: None, but in the last block whether the model ended the speech; if False, it was cut at
        the longest duration for its text.
    """

    codes: np.ndarray
    wav: np.ndarray
    ended: bool | None = None


def check_codec(config: SpeechConfig, codec: Codec) -> None:
    """Raises ValueError unless a speech model was trained on the codes of this codec.

    The fingerprints are compared if the model has one and the codec has its encoder.
    """
    num_quantizers = codec.config.quantizer.num_quantizers
    codebook_size = codec.config.quantizer.codebook_size
    if num_quantizers < config.num_quantizers or codebook_size != config.codebook_size:
        raise ValueError(
            f"the codec has {num_quantizers} quantizers of {codebook_size} codes, the speech model "
            f"needs {config.num_quantizers} of {config.codebook_size}"
        )
    if not config.codec or "encoder" not in codec.params:
        return
    params = {name: codec.params[name] for name in ("encoder", "quantizer")}
    fingerprint = codecs.fingerprint(Codec(params, codec.config))
    if fingerprint != config.codec:
        raise ValueError(
            f"the speech model speaks codes of codec {config.codec}, this codec is {fingerprint}"
        )


def encode_prompt(codec: Codec, path: str) -> np.ndarray:
    """The codes [Q, T] of a recording of a speaker.

    Raises:
      ValueError: It cannot be read, or is silent.
    """
    wav = files.read(path, codec.config.sample_rate, codec.config.num_channels)
    check_prompt(wav, path)
    return encode_one(codec, wav)


def check_prompt(wav: np.ndarray, name: str) -> None:
    """Raises ValueError if a recording [C, S] of a speaker is silent."""
    if not wav.shape[1] or files.level_db(wav) < _SILENCE_DB:
        raise ValueError(f"{name}: the prompt is silent")


def with_prompt(
    config: SpeechConfig, text: str, codes: np.ndarray, prompt_text: str, **details: str
) -> Request:
    """The request to say a text in the voice of a recording, given by its codes [Q, T].

    In the plain layout, the recording and its text come first. In the chat layout, the speech
    continues the recording if its text is known; otherwise the recording is the form's reference.
    """
    if config.layout == "plain":
        return Request(text, codes, prompt_text, details=details)
    if not prompt_text:
        return Request(text, codes, details=details)
    has_spaces = ord(prompt_text[-1]) < FIRST_IDEOGRAPH
    separator = " " if has_spaces else ""
    return Request(
        f"{prompt_text}{separator}{text}",
        beginning=codes,
        beginning_text=prompt_text,
        details=details,
    )


def speak(
    speech: Speech,
    codec: Codec,
    requests: Sequence[Request],
    sampling: Sampling = DEFAULT,
    seed: int = 0,
    num_quantizers: int | None = None,
    first_item: int = 0,
) -> list[SpokenAudio]:
    """Speaks texts, in batches of similar length.

        speech = moss_tok.speech.load("runs/tts")
        spoken = moss_tok.speech.speak(speech, codec, [Request("four seven two")])

    Args:
      speech: The model.
      codec: The codec on whose codes it was trained.
      requests: What to say.
      sampling: How codes are sampled.
      seed: Random seed; each item has its own random numbers.
      num_quantizers: Sample and decode only the first 1..Q quantizers; default: Q.
      first_item: Number of the first request; request i is item `first_item + i`.

    Returns:
      The speech of each request.

    Raises:
      ValueError: As `generate.generate`, or the model was trained on codes of another codec.
    """
    check_codec(speech.config, codec)
    num_quantizers = generate.check_num_quantizers(speech.config, num_quantizers)
    for request in requests:
        _check_beginning(request, num_quantizers)
    generated = generate.generate(speech, requests, sampling, seed, num_quantizers, first_item)
    spoken = []
    for request, result in zip(requests, generated, strict=True):
        codes = result.codes
        num_skipped = 0  # samples of the beginning
        if request.beginning is not None:
            beginning = request.beginning[: len(codes)]
            num_skipped = beginning.shape[1] * codec.config.hop_length
            codes = np.concatenate([beginning, codes], axis=1)
        wav = decode_one(codec, codes.astype(np.int32))
        spoken.append(SpokenAudio(wav[:, num_skipped:], result.ended))
    return spoken


def stream(
    speech: Speech,
    codec: Codec,
    request: Request,
    sampling: Sampling = DEFAULT,
    seed: int = 0,
    num_quantizers: int | None = None,
    item: int = 0,
    block_frames: int = 1,
) -> Iterator[np.ndarray]:
    """Yields the audio of a text while its codes are sampled, in blocks [C, S].

        for wav in moss_tok.speech.stream(speech, codec, Request("four seven two")):
            play(wav)

    Args:
      speech: The model.
      codec: The codec on whose codes it was trained.
      request: What to say.
      sampling: How codes are sampled.
      seed: Random seed.
      num_quantizers: Sample and decode only the first 1..Q quantizers; default: Q.
      item: Number of the request in `speak`.
      block_frames: Largest number of frames in a block, 1..16.

    Returns:
      Blocks that together are the audio of `speak` for the same seed and item.

    Raises:
      ValueError: As `speak`, before the first block.
    """
    blocks = stream_blocks(
        speech, codec, request, sampling, seed, num_quantizers, item, block_frames
    )
    return (block.wav for block in blocks if block.wav.shape[1])


def stream_blocks(
    speech: Speech,
    codec: Codec,
    request: Request,
    sampling: Sampling = DEFAULT,
    seed: int = 0,
    num_quantizers: int | None = None,
    item: int = 0,
    block_frames: int = 1,
) -> Generator[Block, None, None]:
    """As `stream`, with the codes of each block; the last one says whether the model ended."""
    check_codec(speech.config, codec)
    num_quantizers = generate.check_num_quantizers(speech.config, num_quantizers)
    _check_beginning(request, num_quantizers)
    blocks = generate.blocks(speech, request, sampling, seed, num_quantizers, item, block_frames)
    decoder = DecoderStream(codec, num_quantizers, chunk_frames=[block_frames])
    return _decode_blocks(decoder, request.beginning, blocks, num_quantizers)


def _decode_blocks(
    decoder: DecoderStream,
    beginning: np.ndarray | None,
    blocks: Iterator[generate.Spoken],
    num_quantizers: int,
) -> Generator[Block, None, None]:
    """Decodes blocks of codes; they continue a beginning [q, T], whose audio is left out."""
    ended = False
    with decoder:
        if beginning is not None:
            decoder.push(beginning[:num_quantizers].astype(np.int32))
        for block in blocks:
            ended = block.ended
            if block.codes.shape[1]:
                yield Block(block.codes, decoder.push(block.codes))
        wav = decoder.finish()
    yield Block(np.zeros((num_quantizers, 0), np.int32), wav, ended)


def _check_beginning(request: Request, num_quantizers: int) -> None:
    """Raises ValueError if a beginning has fewer quantizers than are sampled and decoded."""
    if request.beginning is not None and len(request.beginning) < num_quantizers:
        raise ValueError(
            f"the beginning must have {num_quantizers} or more quantizers, got "
            f"{len(request.beginning)}"
        )
