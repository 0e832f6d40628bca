"""Audio of texts: codes from a speech model, decoded by the codec, whole or while sampled."""

from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from moss_tok.audio import files
from moss_tok.codec import pretrained as codecs
from moss_tok.codec.inference import Codec, decode_one, encode
from moss_tok.codec.live import DecoderStream
from moss_tok.speech import generate
from moss_tok.speech.config import SpeechConfig
from moss_tok.speech.layout import Request
from moss_tok.speech.sampling import DEFAULT, FIRST_IDEOGRAPH, Sampling
from moss_tok.speech.steps import Speech

_SILENCE_DB = -60.0  # a prompt below this level is silent
MAX_SEED = 2**31 - 1


class SpokenAudio(NamedTuple):
    """Speech.

    Attributes:
      wav: [C, S] at the codec's sample rate.
      ended: Whether the model ended it; False: it reached the longest length for its text.
    """

    wav: np.ndarray
    ended: bool


class Block(NamedTuple):
    """A part of speech that is being sampled.

    Attributes:
      codes: [q, T], the codes that were sampled.
      wav: [C, S], the audio that was decoded.
    """

    codes: np.ndarray
    wav: np.ndarray


def check_codec(config: SpeechConfig, codec: Codec) -> None:
    """Raises ValueError unless a codec is the one that a speech model learned the codes of.

    The fingerprint is compared if the model has one and the codec has its encoder.
    """
    quantizer = codec.config.quantizer
    size = (quantizer.num_quantizers, quantizer.codebook_size)
    if size[0] < config.num_quantizers or size[1] != config.codebook_size:
        raise ValueError(
            f"the codec has {size[0]} quantizers of {size[1]} codes, the speech model needs "
            f"{config.num_quantizers} of {config.codebook_size}"
        )
    if not config.codec or "encoder" not in codec.params:
        return
    part = {name: codec.params[name] for name in ("encoder", "quantizer")}
    found = codecs.fingerprint(Codec(part, codec.config))
    if found != config.codec:
        raise ValueError(
            f"the speech model speaks codes of codec {config.codec}, this codec is {found}"
        )


def encode_prompt(codec: Codec, path: str) -> np.ndarray:
    """The codes [Q, T] of a recording of a speaker.

    Raises:
      ValueError: It cannot be read, or is silent.
    """
    wav = files.read(path, codec.config.sample_rate, codec.config.num_channels)
    check_prompt(wav, path)
    codes, lengths = encode(codec, wav[None])
    return np.asarray(codes)[0, :, : int(lengths[0])]


def check_prompt(wav: np.ndarray, name: str) -> None:
    """Raises ValueError if a recording [C, S] of a speaker is silent."""
    if not wav.shape[1] or files.level_db(wav) < _SILENCE_DB:
        raise ValueError(f"{name}: the prompt is silent")


def with_prompt(
    config: SpeechConfig, text: str, codes: np.ndarray, prompt_text: str, **details: str
) -> Request:
    """The request to say a text in the voice of a recording.

    The plain layout puts the recording and its text in front. The chat layout continues the
    recording if its text is known, else it is the reference of the form.
    """
    if config.layout == "plain":
        return Request(text, codes, prompt_text, details=details)
    if not prompt_text:
        return Request(text, codes, details=details)
    joint = "" if ord(prompt_text[-1]) >= FIRST_IDEOGRAPH or prompt_text[-1].isspace() else " "
    return Request(f"{prompt_text}{joint}{text}", beginning=codes, details=details)


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
      codec: The codec that it learned the codes of.
      requests: What to say.
      sampling: How codes are sampled.
      seed: Random seed. Item i of a seed has its own random numbers.
      num_quantizers: Sample and decode only the first 1..Q quantizers; default: Q.
      first_item: Number of the first item.

    Returns:
      The speech of each request.

    Raises:
      ValueError: As `generate.generate`, or it is another codec.
    """
    check_codec(speech.config, codec)
    found = generate.generate(speech, requests, sampling, seed, num_quantizers, first_item)
    spoken = []
    for request, result in zip(requests, found, strict=True):
        codes = result.codes
        skipped = 0
        if request.beginning is not None:
            beginning = request.beginning[: len(codes)]
            skipped = beginning.shape[1] * codec.config.hop_length
            codes = np.concatenate([beginning, codes], axis=1)
        wav = decode_one(codec, codes.astype(np.int32))
        spoken.append(SpokenAudio(wav[:, skipped:], result.ended))
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
      codec: The codec that it learned the codes of.
      request: What to say.
      sampling: How codes are sampled.
      seed: Random seed.
      num_quantizers: Sample and decode only the first 1..Q quantizers; default: Q.
      item: Number of the item.
      block_frames: Most frames of a block, 1..16.

    Returns:
      Blocks that together are the audio of `speak` for the same seed and item.

    Raises:
      ValueError: As `speak`; before the first block.
    """
    blocks = stream_blocks(
        speech, codec, request, sampling, seed, num_quantizers, item, block_frames
    )
    return (block.wav for block in blocks)


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
    """`stream` with the codes of each block."""
    check_codec(speech.config, codec)
    number = generate.check_num_quantizers(speech.config, num_quantizers)
    blocks = generate.frames(speech, request, sampling, seed, number, item, block_frames)
    player = DecoderStream(codec, number, chunk_frames=[block_frames])
    beginning = request.beginning
    return _play(player, blocks, None if beginning is None else beginning[:number], number)


def _play(
    player: DecoderStream,
    blocks: Iterator[np.ndarray],
    beginning: np.ndarray | None,
    number: int,
) -> Generator[Block, None, None]:
    with player:
        if beginning is not None:
            player.push(beginning.astype(np.int32))
        for codes in blocks:
            yield Block(codes, player.push(codes))
        last = player.finish()
        if last.shape[1]:
            yield Block(np.zeros((number, 0), np.int32), last)
