"""Generates the codes of texts, in batches of similar length, or block by block."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from moss_tok.batching import batch_by_shape
from moss_tok.codec.inference import bucket_frames
from moss_tok.speech import layout
from moss_tok.speech.config import SpeechConfig
from moss_tok.speech.layout import Positions, Request
from moss_tok.speech.sampling import DEFAULT, Sampling, check_seed, longest_speech
from moss_tok.speech.steps import BLOCK_FRAMES, Speech, State, begin, sample_frames

_BATCH_SIZE = 16  # texts that are spoken at once
_BUCKETS_PER_OCTAVE = 2  # lengths; a program is compiled for each
_MIN_PROMPT = 16  # positions; shorter prompts are padded, so that fewer programs are compiled
_MIN_CACHE = 64  # positions


@dataclasses.dataclass(frozen=True)
class Spoken:
    """The codes of speech.

    Attributes:
      codes: [q, T] int32, of the first q quantizers.
      ended: Whether the model ended the speech; if False, it was cut at the longest duration for
        its text.
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
      seed: Random seed; each item has its own random numbers.
      num_quantizers: Sample only the first 1..Q quantizers, with the same compiled program;
        default: Q.
      first_item: Number of the first request; request i is item `first_item + i`.

    Returns:
      The speech of each request. It does not include the `beginning` of a request.

    Raises:
      ValueError: A text cannot be said (see `layout.check_request`); a text and its prompt are
        longer than the model's context; or seed or num_quantizers is out of range.
    """
    check_seed(seed)
    num_quantizers = check_num_quantizers(speech.config, num_quantizers)
    prompts = [_make_prompt(speech, request) for request in requests]
    shapes = [prompt.shape for prompt in prompts]
    spoken: dict[int, Spoken] = {}
    for _, rows, padded_rows in batch_by_shape(shapes, _BATCH_SIZE):
        batch = [prompts[row] for row in padded_rows]
        items = [first_item + row for row in padded_rows]
        state = _begin_batch(speech, batch, items, seed, num_quantizers)
        results = _sample_all(speech, state, sampling, num_quantizers)
        spoken.update(zip(rows, results, strict=False))
    return [spoken[row] for row in range(len(requests))]


def blocks(
    speech: Speech,
    request: Request,
    sampling: Sampling = DEFAULT,
    seed: int = 0,
    num_quantizers: int | None = None,
    item: int = 0,
    block_frames: int = 1,
) -> Iterator[Spoken]:
    """Yields blocks of at most `block_frames` frames while they are sampled.

    The blocks together are the codes that `generate` returns for the same seed and item. Each says
    whether the model has ended the speech; the last one may have no frames. The errors are those of
    `generate`, and are raised before the first block.
    """
    check_seed(seed)
    num_quantizers = check_num_quantizers(speech.config, num_quantizers)
    if not 1 <= block_frames <= BLOCK_FRAMES:
        raise ValueError(f"block_frames must be 1..{BLOCK_FRAMES}, got {block_frames}")
    prompt = _make_prompt(speech, request)
    state = _begin_batch(speech, [prompt], [item], seed, num_quantizers)
    return _sample_blocks(speech, state, sampling, num_quantizers, block_frames)


def _sample_blocks(
    speech: Speech, state: State, sampling: Sampling, num_quantizers: int, block_frames: int
) -> Iterator[Spoken]:
    """Yields the blocks of a single sequence until it is done."""
    while not bool(state.done[0]):
        state, codes, counts = sample_frames(speech, state, num_quantizers, block_frames, sampling)
        block = np.asarray(codes)[0, :num_quantizers, : int(counts[0])]
        yield Spoken(block, bool(state.ended[0]))


def check_request(speech: Speech, request: Request) -> None:
    """Raises ValueError if `generate` would refuse a request."""
    _make_prompt(speech, request)


def check_num_quantizers(config: SpeechConfig, num_quantizers: int | None) -> int:
    """Returns the number of quantizers to sample; ValueError if it is out of range."""
    if num_quantizers is None:
        return config.num_quantizers
    if not 1 <= num_quantizers <= config.num_quantizers:
        raise ValueError(f"num_quantizers must be 1..{config.num_quantizers}, got {num_quantizers}")
    return num_quantizers


@dataclasses.dataclass(frozen=True)
class _Prompt:
    """A prompt that has been checked.

    Attributes:
      positions: The prompt.
      max_frames: Longest speech after it.
      shape: Positions of its padded prompt and of its cache.
    """

    positions: Positions
    max_frames: int
    shape: tuple[int, int]


def _make_prompt(speech: Speech, request: Request) -> _Prompt:
    """The prompt of a request; ValueError if it cannot be said or is too long."""
    config = speech.config
    layout.check_request(config, speech.tokenizer, request)
    positions = layout.prompt(config, speech.tokenizer, request)
    size = len(positions.text)
    room = config.max_positions - size
    if room < 1:
        has_prompt = request.reference is not None or request.beginning is not None
        parts = "the prompt and the text have" if has_prompt else "the text has"
        raise ValueError(
            f"{parts} {size} positions, the context of this model is {config.max_positions}"
        )
    new_text = request.text.removeprefix(request.beginning_text)
    max_frames = min(longest_speech(config, new_text), room)
    prompt_size = bucket_frames(max(size, _MIN_PROMPT), _BUCKETS_PER_OCTAVE)
    cache_size = bucket_frames(max(prompt_size + max_frames, _MIN_CACHE), _BUCKETS_PER_OCTAVE)
    return _Prompt(positions, max_frames, (prompt_size, cache_size))


def _begin_batch(
    speech: Speech,
    prompts: Sequence[_Prompt],
    items: Sequence[int],
    seed: int,
    num_quantizers: int,
) -> State:
    """The state after prompts of one shape."""
    config = speech.config
    num_positions, cache_size = prompts[0].shape
    text = np.zeros((len(prompts), num_positions), np.int32)
    codes_shape = (len(prompts), config.num_quantizers, num_positions)
    codes = np.full(codes_shape, config.codebook_size, np.int32)
    lengths = np.zeros(len(prompts), np.int32)
    max_frames = np.zeros(len(prompts), np.int32)
    for row, prompt in enumerate(prompts):
        size = len(prompt.positions.text)
        text[row, :size] = prompt.positions.text
        codes[row, :, :size] = prompt.positions.codes
        lengths[row] = size
        max_frames[row] = prompt.max_frames
    keys = _item_keys(seed, np.array(items, np.uint32))
    return begin(speech, text, codes, lengths, max_frames, keys, num_quantizers, cache_size)


@jax.jit
def _item_keys(seed: int, items: jax.Array) -> jax.Array:
    """A random key per item, [B]."""
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(items)


def _sample_all(
    speech: Speech, state: State, sampling: Sampling, num_quantizers: int
) -> list[Spoken]:
    """Samples until every sequence of a batch is done."""
    blocks: list[list[np.ndarray]] = [[] for _ in state.max_frames]
    while not bool(state.done.all()):
        state, codes, counts = sample_frames(speech, state, num_quantizers, BLOCK_FRAMES, sampling)
        codes = np.asarray(codes)
        for row, num_frames in enumerate(np.asarray(counts)):
            blocks[row].append(codes[row, :num_quantizers, :num_frames])
    spoken = []
    for row_blocks, ended in zip(blocks, np.asarray(state.ended), strict=True):
        spoken.append(Spoken(np.concatenate(row_blocks, axis=1), bool(ended)))
    return spoken
