"""Generates the codes of texts, in batches of similar length, or block by block."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from moss_tok.codec.inference import bucket_frames
from moss_tok.speech import layout
from moss_tok.speech.config import SpeechConfig
from moss_tok.speech.layout import Positions, Request
from moss_tok.speech.sampling import DEFAULT, Sampling, most_frames
from moss_tok.speech.steps import BLOCK_FRAMES, Speech, State, begin, sample_frames

_BATCH_SIZE = 16  # texts that are spoken at once
_BUCKETS_PER_OCTAVE = 2  # lengths; a program is compiled for each
_FEWEST = (16, 64)  # positions of a prompt and of a cache; fewer are not worth a program


@dataclasses.dataclass(frozen=True)
class Spoken:
    """The codes of speech.

    Attributes:
      codes: [q, T] int32, of the first q quantizers.
      ended: Whether the model ended it; False: it reached the longest length for its text.
    """

    codes: np.ndarray
    ended: bool


def generate(
    speech: Speech,
    requests: Sequence[Request],
    sampling: Sampling = DEFAULT,
    seed: int = 0,
    num_quantizers: int | None = None,
    first_item: int = 0,
) -> list[Spoken]:
    """Generates the codes of texts, in batches of similar length.

        spoken = generate(speech, [Request("four seven two")])
        wav = moss_tok.decode(codec, spoken[0].codes[None]).wav

    Args:
      speech: The model.
      requests: What to say.
      sampling: How codes are sampled.
      seed: Random seed. Item i of a seed has its own random numbers.
      num_quantizers: Sample only the first 1..Q quantizers, with the same compiled program;
        default: Q.
      first_item: Number of the first item.

    Returns:
      The speech of each request. Speech that is continued is without its beginning.

    Raises:
      ValueError: A text cannot be said (see `layout.check_text`), or is too long together with its
        reference; num_quantizers is out of range.
    """
    number = check_num_quantizers(speech.config, num_quantizers)
    prompts = [_Prompt.of(speech, request) for request in requests]
    spoken: dict[int, Spoken] = {}
    shapes = [prompt.shape for prompt in prompts]
    for shape in sorted(set(shapes)):
        members = [i for i, other in enumerate(shapes) if other == shape]
        # Only two batch sizes, so that each shape compiles at most twice.
        batch_size = _BATCH_SIZE if len(members) > 1 else 1
        for start in range(0, len(members), batch_size):
            rows = members[start : start + batch_size]
            padded = rows + rows[:1] * (batch_size - len(rows))
            items = [first_item + i for i in padded]
            state = _begin_batch(speech, [prompts[i] for i in padded], items, seed, number)
            found = _collect(speech, state, sampling, number)
            for i, result in zip(rows, found, strict=False):
                spoken[i] = result
    return [spoken[i] for i in range(len(requests))]


def frames(
    speech: Speech,
    request: Request,
    sampling: Sampling = DEFAULT,
    seed: int = 0,
    num_quantizers: int | None = None,
    item: int = 0,
    block_frames: int = 1,
) -> Iterator[np.ndarray]:
    """Yields codes [q, T] of at most `block_frames` frames while they are sampled.

    Together they are the codes of `generate` for the same seed and item. Raises the same errors,
    before the first block.
    """
    number = check_num_quantizers(speech.config, num_quantizers)
    if not 1 <= block_frames <= BLOCK_FRAMES:
        raise ValueError(f"block_frames must be 1..{BLOCK_FRAMES}, got {block_frames}")
    prompt = _Prompt.of(speech, request)
    state = _begin_batch(speech, [prompt], [item], seed, number)
    return _blocks(speech, state, sampling, number, block_frames)


def _blocks(
    speech: Speech, state: State, sampling: Sampling, number: int, block_frames: int
) -> Iterator[np.ndarray]:
    while not bool(state.done[0]):
        state, codes, counts = sample_frames(speech, state, number, block_frames, sampling)
        if counts[0]:
            yield np.asarray(codes)[0, :number, : int(counts[0])]


def check_request(speech: Speech, request: Request) -> None:
    """Raises ValueError unless `generate` could say it."""
    _Prompt.of(speech, request)


def check_num_quantizers(config: SpeechConfig, num_quantizers: int | None) -> int:
    """The number of quantizers to sample; ValueError if it is out of range."""
    if num_quantizers is None:
        return config.num_quantizers
    if not 1 <= num_quantizers <= config.num_quantizers:
        raise ValueError(f"num_quantizers must be 1..{config.num_quantizers}, got {num_quantizers}")
    return num_quantizers


@dataclasses.dataclass(frozen=True)
class _Prompt:
    """A checked prompt, its longest speech, and the shape of its batch: positions, cache."""

    positions: Positions
    limit: int
    shape: tuple[int, int]

    @classmethod
    def of(cls, speech: Speech, request: Request) -> "_Prompt":
        config = speech.config
        layout.check_text(config, speech.tokenizer, request.text)
        if request.reference_text:
            layout.check_text(config, speech.tokenizer, request.reference_text)
        positions = layout.prompt(config, speech.tokenizer, request)
        size = len(positions.text)
        limit = most_frames(config, request.text)
        if request.beginning is not None:
            limit = max(1, limit - request.beginning.shape[1])
        room = config.max_positions - size
        if room < 1:
            parts = "the text" if request.reference is None else "the reference and the text"
            raise ValueError(
                f"{parts} have {size} positions, the context of this model is "
                f"{config.max_positions}"
            )
        limit = min(limit, room)
        bucket = bucket_frames(max(size, _FEWEST[0]), _BUCKETS_PER_OCTAVE)
        cache = bucket_frames(max(bucket + limit, _FEWEST[1]), _BUCKETS_PER_OCTAVE)
        return cls(positions, limit, (bucket, cache))


def _begin_batch(
    speech: Speech, prompts: Sequence[_Prompt], items: Sequence[int], seed: int, number: int
) -> State:
    """The state after prompts of one shape."""
    config = speech.config
    num_positions, cache_size = prompts[0].shape
    text = np.zeros((len(prompts), num_positions), np.int32)
    codes = np.full((len(prompts), config.num_quantizers, num_positions), config.codebook_size)
    for row, prompt in enumerate(prompts):
        size = len(prompt.positions.text)
        text[row, :size] = prompt.positions.text
        codes[row, :, :size] = prompt.positions.codes
    lengths = np.array([len(prompt.positions.text) for prompt in prompts], np.int32)
    limits = np.array([prompt.limit for prompt in prompts], np.int32)
    keys = _item_keys(seed, np.array(items, np.uint32))
    return begin(speech, text, codes.astype(np.int32), lengths, limits, keys, number, cache_size)


@jax.jit
def _item_keys(seed: int, items: jax.Array) -> jax.Array:
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(items)


def _collect(speech: Speech, state: State, sampling: Sampling, number: int) -> list[Spoken]:
    """Samples until every sequence of a batch is done."""
    parts: list[list[np.ndarray]] = [[] for _ in state.limit]
    while not bool(state.done.all()):
        state, codes, counts = sample_frames(speech, state, number, BLOCK_FRAMES, sampling)
        rows = zip(parts, np.asarray(codes), np.asarray(counts), strict=True)
        for part, block, count in rows:
            part.append(block[:number, :count])
    ended = np.asarray(state.ended)
    return [
        Spoken(np.concatenate(part, axis=1), bool(end))
        for part, end in zip(parts, ended, strict=True)
    ]
