"""Batches of sequences of a speech model, from codes with texts.

They are packed as those of `code_batches`; which reference a recording gets is a function of the
seed and of the number of its draw, so a resumed run gets the same ones.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tqdm

from moss_tok.audio import manifest
from moss_tok.audio.manifest import DOMAINS
from moss_tok.data import code_batches
from moss_tok.data.code_batches import Batch, Member, PackedBatches, Source
from moss_tok.data.codes import REFERENCE, Item
from moss_tok.language.text import Tokenizer
from moss_tok.speech import layout
from moss_tok.speech.config import SpeechConfig
from moss_tok.speech.layout import FORM, Positions, Request

_TARGET_PARTS = 8  # targets are computed for a multiple of this share of the positions


@dataclasses.dataclass(frozen=True)
class SpeechShape:
    """What recordings are made into.

    Attributes:
      config: The speech model.
      tokenizer: Of its texts.
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
    """The recordings of one split of a source that can be used.

    Attributes:
      source: All recordings.
      indices: Which of them.
      num_frames: Length of each of these.
      sizes: Positions of each with its own reference, or without one.
      reference_sizes: Positions that each adds where it is the reference; 0: it has a reference of
        its own.
      speakers: Places of the recordings of each speaker.
      speaker_of: Speaker of each; "" where unknown.
      num_texts: How many of the split have a text.
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
      num_quantizers: Quantizers that it has codes of.
      domain: Of the recording.
    """

    positions: Positions
    first: int
    num_quantizers: int
    domain: str


def request_of(item: Item, reference: Item | None = None) -> Request:
    """What a recording says and how; `reference` is another recording of the speaker."""
    metadata = item.metadata
    text, _ = manifest.read_text(metadata)
    details = {name: str(metadata[name]) for name in FORM if metadata.get(name) is not None}
    if reference is not None:
        reference_text, _ = manifest.read_text(reference.metadata)
        return Request(text, reference.codes, reference_text, details=details)
    codes = metadata.get(REFERENCE)
    reference_text = str(metadata.get("ref_text", "")) if codes is not None else ""
    return Request(text, codes, reference_text, details=details)


def read_set(source: Source, split: str, shape: SpeechShape) -> SpeechSet:
    """Reads all recordings once; shows progress.

    Raises:
      ValueError: A recording has a code that the model does not have.
    """
    config = shape.config
    rows = []
    speakers: dict[str, list[int]] = {}
    num_texts = 0
    for index, item in enumerate(tqdm.tqdm(source, f"indexing {source.folder}", disable=None)):
        if item.metadata.get("split", "train") != split:
            continue
        text, _ = manifest.read_text(item.metadata)
        num_texts += bool(text)
        num_frames = item.codes.shape[1]
        if not text or not 0 < num_frames <= shape.max_frames:
            continue
        if len(shape.tokenizer.encode(text)) > shape.max_text_tokens:
            continue
        _check_codes(item, source, config)
        size = len(layout.prompt(config, shape.tokenizer, request_of(item)).text) + num_frames + 1
        reference_size = 0
        if REFERENCE not in item.metadata:
            reference_size = layout.reference_size(config, shape.tokenizer, text, num_frames)
        speaker = str(item.metadata.get("speaker") or "")
        if speaker and reference_size:
            speakers.setdefault(speaker, []).append(len(rows))
        rows.append((index, num_frames, size, reference_size, speaker))
    columns = [np.array([row[i] for row in rows], int) for i in range(4)]
    places = {name: np.array(found) for name, found in speakers.items()}
    return SpeechSet(source, *columns, places, tuple(row[4] for row in rows), num_texts)


def _check_codes(item: Item, source: Source, config: SpeechConfig) -> None:
    for codes in (item.codes, item.metadata.get(REFERENCE)):
        if codes is not None and codes.size and codes.max() >= config.codebook_size:
            raise ValueError(
                f"{source.folder}, {item.id}: has the code {codes.max()}, but the codec has codes "
                f"0..{config.codebook_size - 1}"
            )


class SpeechBatches(PackedBatches):
    """Batches of sequences; a member's third number is the place of its reference, or -1."""

    def __init__(
        self,
        sets: Sequence[SpeechSet],
        weights: Sequence[float],
        batch_size: int,
        shape: SpeechShape,
        seed: int,
        rows: Sequence[int] | None = None,
    ):
        """Of these rows of each batch; default: all."""
        super().__init__(sets, weights, batch_size, seed, rows)
        self._shape = shape

    def draw(self, part: int, place: int, number: int) -> Member:
        """Draws another recording of the speaker, with probability `reference_share`."""
        recordings = self._sets[part]
        alike = recordings.speakers.get(recordings.speaker_of[place], ())
        if self._shape.reference_share and len(alike) > 1 and recordings.reference_sizes[place]:
            generator = np.random.default_rng((self._seed, number, 1))
            if generator.random() < self._shape.reference_share:
                return part, place, int(generator.choice(alike[alike != place]))
        return part, place, -1

    def size(self, member: Member) -> int:
        """Positions."""
        part, place, reference = member
        recordings = self._sets[part]
        added = recordings.reference_sizes[reference] if reference >= 0 else 0
        return int(recordings.sizes[place] + added)

    def shape(self, members: Sequence[Member]) -> tuple[int, ...]:
        """T, and how many of them are computed as targets."""
        longest = max(self._sets[part].num_frames[place] for part, place, _ in members)
        return array_sizes(max(map(self.size, members)), int(longest))

    def read(self, member: Member) -> Sample:
        """The sequence."""
        part, place, reference = member
        recordings = self._sets[part]
        item = recordings.source[int(recordings.indices[place])]
        other = None
        if reference >= 0:
            other = recordings.source[int(recordings.indices[reference])]
        return sample(self._shape, item, other)

    def arrays(self, item: Sample | None, shape: tuple[int, ...]) -> Batch:
        """See `batches`."""
        return arrays(self._shape.config, item, shape)


def array_sizes(num_positions: int, num_frames: int) -> tuple[int, int]:
    """Sizes of the arrays of a batch: positions, and those of them that are computed as targets.

    They are few, because a step is compiled for each.

    Args:
      num_positions: Of the longest sequence.
      num_frames: Of the longest recording; its end is predicted, too.
    """
    padded = code_batches.bucket_size(num_positions, 2**31)
    share = -(-padded // _TARGET_PARTS)
    num_targets = -(-(num_frames + 1) // share) * share
    return padded, min(num_targets, padded)


def sample(shape: SpeechShape, item: Item, reference: Item | None = None) -> Sample:
    """A recording, and where given a reference, as a sequence."""
    before = layout.prompt(shape.config, shape.tokenizer, request_of(item, reference))
    after = layout.speech(shape.config, item.codes)
    positions = Positions(
        np.concatenate([before.text, after.text]), np.concatenate([before.codes, after.codes], 1)
    )
    number = min(item.codes.shape[0], shape.config.num_quantizers)
    return Sample(positions, len(before.text), number, str(item.metadata.get("domain")))


def arrays(config: SpeechConfig, item: Sample | None, shape: tuple[int, ...]) -> Batch:
    """The arrays of a sequence, see `batches`; of None, one without targets."""
    num_positions, num_targets = shape
    text = np.zeros(num_positions, np.int32)
    codes = np.full((config.num_quantizers, num_positions), config.codebook_size, np.int32)
    first, size, number, domain = 1, 1, 1, "other"
    if item is not None:
        first, number, domain = item.first, item.num_quantizers, item.domain
        size = len(item.positions.text)
        text[:size] = item.positions.text
        codes[:, :size] = item.positions.codes
    return {
        "text": text,
        "codes": codes,
        "first": np.int32(first),
        "length": np.int32(size),
        "num_quantizers": np.int32(number),
        "targets": np.zeros(num_targets, np.int8),
        "domain": np.int32(DOMAINS.index(domain if domain in DOMAINS else "other")),
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
      sets: What to draw from.
      weights: The share of each.
      batch_size: Sequences in a batch.
      shape: What recordings are made into.
      seed: Of the order and of the references.
      start: Batches already consumed.
      rows: Which rows of each batch to make; default: all.

    Returns:
      Iterator over {"text": int32 [B, T]; "codes": int32 [B, Q, T]; "first": int32 [B], index of
      the first frame to predict; "length": int32 [B], valid positions, the last of which is the
      end of speech; "num_quantizers": int32 [B]; "targets": zeros [B, F], F positions of each item
      are predicted; "domain", "position", "failed": as `pipeline.batches` has them}. It has
      `close()`.
    """
    made = SpeechBatches(sets, weights, batch_size, shape, seed, rows)
    return code_batches.iterate(made, start)
