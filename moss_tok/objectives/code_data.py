"""Training data of codes, from folders of `moss-tok tokenize`."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from moss_tok import checkpoint, storage
from moss_tok.codec import pretrained
from moss_tok.data import code_batches
from moss_tok.data.code_batches import CodeSet, CodeShape, Source
from moss_tok.data.codes import Item
from moss_tok.data.config import CodeDataConfig
from moss_tok.training.config import TrainConfig
from moss_tok.training.objective import Batch, Say


@dataclasses.dataclass(frozen=True)
class CodeData:
    """Recordings with texts of a mixture of folders, and evaluation recordings."""

    config: CodeDataConfig
    sets: tuple[CodeSet, ...]
    weights: tuple[float, ...]
    test_sets: tuple[CodeSet, ...]
    num_eval: int
    shape: CodeShape
    seed: int

    @property
    def batch_seconds(self) -> float:
        """Mean seconds of audio in a batch."""
        total = sum(self.weights)
        mean = 0.0
        for part, weight in zip(self.sets, self.weights, strict=True):
            mean += weight / total * float(part.num_frames.mean()) / self.shape.frame_rate
        return self.config.batch_size * mean

    def describe(self) -> str:
        """The amount of data, as text."""
        number = sum(map(len, self.sets))
        return f"{number} training recordings, {len(self.held_out())} evaluation recordings"

    def batches(self, start: int, rows: Sequence[int]) -> Iterator[Batch]:
        """See `code_batches.batches`."""
        return code_batches.batches(
            self.config, self.sets, self.weights, self.shape, self.seed, start, rows
        )

    def failure(self, source: int, index: int) -> str:
        """Why a recording could not be read."""
        codes = self.sets[source].source
        try:
            codes[index]
        except Exception as error:  # ArrayRecord and msgpack raise many types on damaged files
            return f"{codes.folder}[{index}]: {error}"
        return f"{codes.folder}[{index}]: could not be read"

    def held_out(self) -> list[Item]:
        """Recordings of the test splits, evenly spread, at most `num_eval`."""
        if not self.num_eval:
            return []
        pairs = [(part, int(index)) for part in self.test_sets for index in part.indices]
        every = max(1, -(-len(pairs) // self.num_eval))
        return [part.source[index] for part, index in pairs[::every]]


def find_sets(
    config: TrainConfig,
    check_sources: Callable[[Sequence[Source]], None],
    read_set: Callable[[Source, str], Any],
    check_sets: Callable[[Sequence[Any]], None],
) -> tuple[tuple[Any, ...], tuple[float, ...], tuple[Any, ...]]:
    """Opens the sources of a run; creates the workdir after checking that all data exists.

    Args:
      config: The run.
      check_sources: Raises ValueError if one of all sources does not fit.
      read_set: Reads a split of a source.
      check_sets: Raises ValueError if there is nothing to learn from in one of the training sets.

    Returns:
      The sets for training, their weights, and the sets for evaluation.

    Raises:
      ValueError: No such source, no evaluation recordings, or one of the checks.
    """
    data = config.data
    if not data.train_data:
        raise ValueError("train_data must name codes of moss-tok tokenize or JSON lines, got none")
    sources, weights = code_batches.find_sources(data.train_data)
    held_out = sources
    if data.eval_data:
        held_out, _ = code_batches.find_sources(data.eval_data)
    check_sources([*sources, *held_out])
    sets = tuple(read_set(source, "train") for source in sources)
    check_sets(sets)
    weights = [len(part) if w is None else w for part, w in zip(sets, weights, strict=True)]
    test_sets: tuple[Any, ...] = ()
    if config.run.num_eval_clips:
        test_sets = tuple(read_set(source, "test") for source in held_out)
        if data.eval_data and not any(map(len, test_sets)):
            raise ValueError(f"eval_data {data.eval_data}: no recordings of the split 'test'")
    storage.to_path(config.run.workdir).mkdir(parents=True, exist_ok=True)
    return sets, tuple(weights), test_sets


def find_data(config: TrainConfig, shape: CodeShape, say: Say) -> CodeData:
    """Opens folders of codes, see `find_sets`.

    Raises:
      ValueError: Codes of another codec than `init_from`, or no text to learn from.
    """
    parts = find_sets(
        config,
        lambda sources: _check_codec(config, sources),
        lambda source, split: code_batches.read_set(source, split, shape),
        lambda sets: _check_texts(sets, shape, say),
    )
    return CodeData(config.data, *parts, config.run.num_eval_clips, shape, config.run.seed)


def _check_codec(config: TrainConfig, code_sources: Sequence[Source]) -> None:
    """Checks that all codes are of the codec of `init_from`; a resumed run has done so before."""
    if checkpoint.saved_steps(storage.to_path(config.run.workdir)):
        return
    codec = pretrained.load(config.run.init_from, "encoder")  # the component of the fingerprint
    fingerprint = pretrained.fingerprint(codec)
    for source in code_sources:
        if source.settings.get("codec") != fingerprint:
            raise ValueError(
                f"{source.folder} holds codes of codec {source.settings.get('codec')}, "
                f"init_from {config.run.init_from} is codec {fingerprint}"
            )


def _check_texts(sets: Sequence[CodeSet], shape: CodeShape, say: Say) -> None:
    for part in sets:
        if not len(part):
            raise ValueError(
                f"{part.source.folder}: no recording of the split 'train' of at most "
                f"segment_seconds {shape.max_frames / shape.frame_rate:.3g} has a text of at most "
                f"max_text_tokens {shape.max_text_tokens}"
            )
    used = sum(map(len, sets))
    total = sum(part.num_texts for part in sets)
    say(
        f"{used} of {total} texts are used: no longer than max_text_tokens "
        f"{shape.max_text_tokens}, of recordings no longer than "
        f"{shape.max_frames / shape.frame_rate:.3g} s"
    )
