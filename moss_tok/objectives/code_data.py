"""Training data of codes, from folders of `moss-tok tokenize`."""

import dataclasses
import math
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
        mean_seconds = 0.0
        for recordings, weight in zip(self.sets, self.weights, strict=True):
            num_frames = float(recordings.num_frames.mean())
            mean_seconds += weight / total * num_frames / self.shape.frame_rate
        return self.config.batch_size * mean_seconds

    def describe(self) -> str:
        """The amount of data, as text."""
        num_training = sum(map(len, self.sets))
        num_evaluation = len(self.held_out())
        return f"{num_training} training recordings, {num_evaluation} evaluation recordings"

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
        total = sum(map(len, self.test_sets))
        every = max(1, math.ceil(total / self.num_eval))
        items = []
        number = 0
        for recordings in self.test_sets:
            for index in recordings.indices:
                if number % every == 0:
                    items.append(recordings.source[int(index)])
                number += 1
        return items


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
      check_sets: Raises ValueError if one of the training sets has nothing to learn from.

    Returns:
      The sets for training, their weights, and the sets for evaluation.

    Raises:
      ValueError: A source does not exist, there are no evaluation recordings, or a check fails.
    """
    data = config.data
    if not data.train_data:
        raise ValueError("train_data must name codes of moss-tok tokenize or JSON lines, got none")
    sources, weights = code_batches.find_sources(data.train_data)
    held_out = sources
    if data.eval_data:
        held_out, _ = code_batches.find_sources(data.eval_data)
    check_sources([*sources, *held_out])
    sets = [read_set(source, "train") for source in sources]
    check_sets(sets)
    set_weights = []
    for recordings, weight in zip(sets, weights, strict=True):
        if weight is None:
            weight = len(recordings)
        set_weights.append(weight)
    test_sets = []
    if config.run.num_eval_clips:
        test_sets = [read_set(source, "test") for source in held_out]
        if data.eval_data and not any(map(len, test_sets)):
            raise ValueError(f"eval_data {data.eval_data}: no recordings of the split 'test'")
    storage.to_path(config.run.workdir).mkdir(parents=True, exist_ok=True)
    return tuple(sets), tuple(set_weights), tuple(test_sets)


def find_data(config: TrainConfig, shape: CodeShape, say: Say) -> CodeData:
    """Opens folders of codes, see `find_sets`.

    Raises:
      ValueError: The codes are of another codec than `init_from`, or there is no text to learn.
    """
    parts = find_sets(
        config,
        lambda sources: _check_codec(config, sources),
        lambda source, split: code_batches.read_set(source, split, shape),
        lambda sets: _check_texts(sets, shape, say),
    )
    return CodeData(config.data, *parts, config.run.num_eval_clips, shape, config.run.seed)


def _check_codec(config: TrainConfig, code_sources: Sequence[Source]) -> None:
    """Checks that all codes are of the codec of `init_from`, unless the run is resumed.

    Raises:
      ValueError: They are of another codec.
    """
    if checkpoint.saved_steps(storage.to_path(config.run.workdir)):
        return
    codec = pretrained.load(config.run.init_from, "encoder")  # the component of the fingerprint
    fingerprint = pretrained.fingerprint(codec)
    for source in code_sources:
        if "codec" not in source.settings:
            raise ValueError(
                f"{source.folder} does not say of which codec its codes are; use an output of "
                "moss-tok tokenize"
            )
        if source.settings["codec"] != fingerprint:
            raise ValueError(
                f"{source.folder} holds codes of codec {source.settings['codec']}, "
                f"init_from {config.run.init_from} is codec {fingerprint}"
            )


def _check_texts(sets: Sequence[CodeSet], shape: CodeShape, say: Say) -> None:
    """Prints how many texts are used. Raises ValueError if a set has no recordings."""
    max_seconds = shape.max_frames / shape.frame_rate
    num_used = 0
    num_texts = 0
    for recordings in sets:
        if not len(recordings):
            raise ValueError(
                f"{recordings.source.folder}: no recording of the split 'train' of at most "
                f"segment_seconds {max_seconds:.3g} has a text of at most max_text_tokens "
                f"{shape.max_text_tokens}"
            )
        num_used += len(recordings)
        num_texts += recordings.num_texts
    say(
        f"{num_used} of {num_texts} texts are used: no longer than max_text_tokens "
        f"{shape.max_text_tokens}, of recordings no longer than {max_seconds:.3g} s"
    )
