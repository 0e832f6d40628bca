"""Batches of sequences of a speech model, from codes with texts.

They are packed as in `code_batches`. The reference of a recording is a function of the seed and of
the number of the draw, so a resumed run gets the same references.
"""

import collections
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tqdm

from moss_tok.audio import manifest
from moss_tok.data import code_batches
from moss_tok.data.code_batches import Batch, Member, PackedBatches, Source
from moss_tok.data.codes import Item, reference_of
from moss_tok.language.text import Tokenizer
from moss_tok.speech import layout
from moss_tok.speech.config import SpeechConfig
from moss_tok.speech.layout import FORM, Positions, Request

_MIN_POSITIONS = 64  # shorter batches are padded: a program of their own takes long to compile
_TARGET_PARTS = 8  # the number of targets is a multiple of the positions divided by this number


@dataclasses.dataclass(frozen=True)
class SpeechShape:
    """The sizes of batches of sequences, and the limits of the recordings in them.

    Attributes:
      config: The speech model.
      tokenizer: Tokenizer of its texts.
      max_frames: Longest recording; longer ones are not used.
      max_text_tokens: Longest text; recordings with a longer one are not used.
      reference_share: Probability that a sequence begins with a reference, another recording of the
        speaker.
    """

    config: SpeechConfig
    tokenizer: Tokenizer
    max_frames: int
    max_text_tokens: int
    reference_share: float

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.config.frame_rate


@dataclasses.dataclass(frozen=True)
class SpeechSet:
    """The recordings of one split of a source that have a text and are short enough.

    Attributes:
      source: All recordings of the source.
      indices: Index in `source` of each recording of the set.
      num_frames: Frames of each recording of the set.
      sizes: Positions of each recording, with the reference in its own metadata if there is one.
      reference_sizes: Positions that a recording adds to others as their reference; 0 if it cannot
        be one, because it has a reference in its own metadata.
      speakers: Indices in this set of the recordings of each speaker.
      speaker_of: Speaker of each recording; "" if unknown.
      num_texts: Number of recordings of the split with a text.
    """

    source: Source
    indices: np.ndarray
    num_frames: np.ndarray
    sizes: np.ndarray
    reference_sizes: np.ndarray
    speakers: dict[str, np.ndarray]
    speaker_of: tuple[str, ...]
    num_texts: int

    def __len__(self) -> int:
        return len(self.indices)


class Sample(NamedTuple):
    """A recording as a sequence.

    Attributes:
      positions: All positions.
      first: Index of the first frame to predict.
      num_quantizers: Number of quantizers of its codes.
      domain: Domain of the recording.
    """

    positions: Positions
    first: int
    num_quantizers: int
    domain: str


def request_of(item: Item, reference: Item | None = None) -> Request:
    """The request for which a recording is the answer.

    Args:
      item: The recording.
      reference: Another recording of the speaker; None: the one in the metadata of `item`, if any.
    """
    metadata = item.metadata
    text, _ = manifest.read_text(metadata)
    details = {}
    for name in FORM:
        if metadata.get(name) is not None:
            details[name] = str(metadata[name])
    if reference is not None:
        reference_text, _ = manifest.read_text(reference.metadata)
        return Request(text, reference.codes, reference_text, details=details)
    codes = reference_of(metadata)
    if codes is None:
        return Request(text, details=details)
    return Request(text, codes, str(metadata.get("ref_text", "")), details=details)


def read_set(source: Source, split: str, shape: SpeechShape) -> SpeechSet:
    """Reads all recordings once; shows progress.

    Raises:
      ValueError: A recording has a code that the model does not have.
    """
    indices = []
    num_frames = []
    sizes = []
    reference_sizes = []
    speaker_of = []
    speakers: dict[str, list[int]] = collections.defaultdict(list)
    num_texts = 0
    for index, item in enumerate(tqdm.tqdm(source, f"indexing {source.folder}", disable=None)):
        text, _ = manifest.read_text(item.metadata)
        if (item.metadata.get("split") or "train") != split or not text:
            continue
        num_texts += 1
        if not _is_short(item, text, shape):
            continue
        _check_codes(item, source, shape.config)
        reference_size = _reference_size(item, text, shape)
        speaker = str(item.metadata.get("speaker") or "")
        if speaker and reference_size:
            speakers[speaker].append(len(indices))
        indices.append(index)
        num_frames.append(item.codes.shape[1])
        sizes.append(_size(item, shape))
        reference_sizes.append(reference_size)
        speaker_of.append(speaker)
    return SpeechSet(
        source=source,
        indices=np.array(indices, int),
        num_frames=np.array(num_frames, int),
        sizes=np.array(sizes, int),
        reference_sizes=np.array(reference_sizes, int),
        speakers={speaker: np.array(members) for speaker, members in speakers.items()},
        speaker_of=tuple(speaker_of),
        num_texts=num_texts,
    )


def _is_short(item: Item, text: str, shape: SpeechShape) -> bool:
    """Whether a recording has frames, and it and its reference keep the limits of `shape`."""
    if not item.codes.shape[1]:
        return False
    texts = [text]
    recordings = [item.codes]
    reference = reference_of(item.metadata)
    if reference is not None:
        texts.append(request_of(item).reference_text)
        recordings.append(reference)
    num_frames = max(codes.shape[1] for codes in recordings)
    num_tokens = max(len(shape.tokenizer.encode(each)) for each in texts)
    return num_frames <= shape.max_frames and num_tokens <= shape.max_text_tokens


def _size(item: Item, shape: SpeechShape) -> int:
    """Positions of a recording: the prompt, the frames, and the end of speech."""
    prompt = layout.prompt(shape.config, shape.tokenizer, request_of(item))
    return len(prompt.text) + item.codes.shape[1] + 1


def _reference_size(item: Item, text: str, shape: SpeechShape) -> int:
    """See `SpeechSet.reference_sizes`."""
    if reference_of(item.metadata) is not None:
        return 0
    num_frames = item.codes.shape[1]
    return layout.reference_size(shape.config, shape.tokenizer, text, num_frames)


def _check_codes(item: Item, source: Source, config: SpeechConfig) -> None:
    for codes in (item.codes, reference_of(item.metadata)):
        if codes is not None and codes.size and codes.max() >= config.codebook_size:
            raise ValueError(
                f"{source.folder}, {item.id}: has the code {codes.max()}, but the codec has codes "
                f"0..{config.codebook_size - 1}"
            )


class SpeechBatches(PackedBatches):
    """Batches of sequences.

    The third number of a member is the index in the set of its reference, or -1 without one.
    """

    def __init__(
        self,
        sets: Sequence[SpeechSet],
        weights: Sequence[float],
        batch_size: int,
        shape: SpeechShape,
        seed: int,
        rows: Sequence[int] | None = None,
    ):
        """As `PackedBatches`, with sequences of the model in `shape`."""
        super().__init__(sets, weights, batch_size, seed, rows)
        self._shape = shape

    def draw(self, set_number: int, index: int, draw_number: int) -> Member:
        """Draws another recording of the speaker, with probability `reference_share`."""
        recordings = self._sets[set_number]
        same_speaker = recordings.speakers.get(recordings.speaker_of[index], ())
        has_choice = len(same_speaker) > 1 and recordings.reference_sizes[index] > 0
        if self._shape.reference_share and has_choice:
            generator = np.random.default_rng((self._seed, draw_number, 1))
            if generator.random() < self._shape.reference_share:
                others = same_speaker[same_speaker != index]
                return set_number, index, int(generator.choice(others))
        return set_number, index, -1

    def size(self, member: Member) -> int:
        """Number of positions."""
        set_number, index, reference = member
        recordings = self._sets[set_number]
        size = int(recordings.sizes[index])
        if reference >= 0:
            size += int(recordings.reference_sizes[reference])
        return size

    def shape(self, members: Sequence[Member]) -> tuple[int, ...]:
        """(T, F): positions, and how many of them are computed as targets."""
        num_positions = max(map(self.size, members))
        longest = 0  # frames
        for set_number, index, _ in members:
            longest = max(longest, int(self._sets[set_number].num_frames[index]))
        return array_sizes(num_positions, longest)

    def read(self, member: Member) -> Sample:
        """The sequence."""
        set_number, index, reference_index = member
        recordings = self._sets[set_number]
        item = recordings.source[int(recordings.indices[index])]
        reference = None
        if reference_index >= 0:
            reference = recordings.source[int(recordings.indices[reference_index])]
        return sample(self._shape, item, reference)

    def arrays(self, item: Sample | None, shape: tuple[int, ...]) -> Batch:
        """See `batches`."""
        return arrays(self._shape.config, item, shape)


def array_sizes(num_positions: int, num_frames: int) -> tuple[int, int]:
    """Sizes (T, F) of the arrays of a batch: positions, and positions that are computed as targets.

    There are few different sizes, because a step is compiled for each.

    Args:
      num_positions: Positions of the longest sequence.
      num_frames: Frames of the longest recording. The end of speech is one more target.
    """
    padded = code_batches.bucket_size(max(_MIN_POSITIONS, num_positions), 2**31)
    step = math.ceil(padded / _TARGET_PARTS)
    num_targets = math.ceil((num_frames + 1) / step) * step
    return padded, min(num_targets, padded)


def sample(shape: SpeechShape, item: Item, reference: Item | None = None) -> Sample:
    """A recording as a sequence, after a prompt with its text and the reference, if any."""
    prompt = layout.prompt(shape.config, shape.tokenizer, request_of(item, reference))
    speech = layout.speech(shape.config, item.codes)
    positions = Positions(
        np.concatenate([prompt.text, speech.text]),
        np.concatenate([prompt.codes, speech.codes], axis=1),
    )
    num_quantizers = min(item.codes.shape[0], shape.config.num_quantizers)
    domain = str(item.metadata.get("domain"))
    return Sample(positions, len(prompt.text), num_quantizers, domain)


def arrays(config: SpeechConfig, item: Sample | None, shape: tuple[int, ...]) -> Batch:
    """The arrays of a sequence, see `batches`; None becomes a sequence without targets."""
    num_positions, num_targets = shape
    text = np.zeros(num_positions, np.int32)
    codes = np.full((config.num_quantizers, num_positions), config.codebook_size, np.int32)
    first = 1
    length = 1
    num_quantizers = 1
    domain = "other"
    if item is not None:
        first = item.first
        length = len(item.positions.text)
        num_quantizers = item.num_quantizers
        domain = item.domain
        text[:length] = item.positions.text
        codes[:, :length] = item.positions.codes
    return {
        "text": text,
        "codes": codes,
        "first": np.int32(first),
        "length": np.int32(length),
        "num_quantizers": np.int32(num_quantizers),
        "targets": np.zeros(num_targets, np.int8),
        "domain": np.int32(manifest.domain_index(domain)),
    }


def batches(
    sets: Sequence[SpeechSet],
    weights: Sequence[float],
    batch_size: int,
    shape: SpeechShape,
    seed: int = 0,
    start: int = 0,
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Endless batches from number `start` on.

    Args:
      sets: Recordings to draw from.
      weights: The share of each set.
      batch_size: Sequences in a batch.
      shape: Sizes of the arrays.
      seed: Seed of the order and of the references.
      start: Number of batches already consumed.
      rows: Rows of each batch to make; default: all.

    Returns:
      Iterator over {"text": int32 [B, T]; "codes": int32 [B, Q, T]; "first": int32 [B], index of
      the first frame to predict; "length": int32 [B], valid positions, the last of which is the
      end of speech; "num_quantizers": int32 [B]; "targets": zeros [B, F], F positions of each item
      are predicted; "domain", "position", "failed": as in `pipeline.batches`}. It has `close()`.
    """
    packed = SpeechBatches(sets, weights, batch_size, shape, seed, rows)
    return code_batches.iterate(packed, start)
