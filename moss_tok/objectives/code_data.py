"""Folders of codes as the data of a run."""

import dataclasses
from collections.abc import Iterator, Sequence

from moss_tok import checkpoint, storage
from moss_tok.codec import pretrained
from moss_tok.data import code_batches
from moss_tok.data.code_batches import CodeSet, CodeShape
from moss_tok.data.codes import CodeSource, Item
from moss_tok.data.config import CodeDataConfig
from moss_tok.training.config import TrainConfig
from moss_tok.training.objective import Batch, Say


@dataclasses.dataclass(frozen=True)
class CodeData:
    """The recordings with texts of a mixture of folders, and some to evaluate on."""

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
        total = sum(weight for weight in self.weights)
        mean = 0.0
        for part, weight in zip(self.sets, self.weights, strict=True):
            mean += weight / total * float(part.num_frames.mean()) / self.shape.frame_rate
        return self.config.batch_size * mean

    def describe(self) -> str:
        """How much there is."""
        number = sum(map(len, self.sets))
        return f"{number} training recordings, {len(self.held_out())} evaluation recordings"

    def batches(self, start: int, rows: Sequence[int]) -> Iterator[Batch]:
        """See `code_batches.batches`."""
        return code_batches.batches(
            self.config, self.sets, self.weights, self.shape, self.seed, start, rows
        )

    def failure(self, source: int, index: int) -> str:
        """Why a recording could not be read."""
        found = self.sets[source].source
        try:
            found[index]
        except Exception as error:  # what ArrayRecord and msgpack raise on damaged files
            return f"{found.folder}[{index}]: {error}"
        return f"{found.folder}[{index}]: could not be read"

    def held_out(self) -> list[Item]:
        """Recordings of the test splits, at most so many as the run asks for."""
        pairs = [(part, int(index)) for part in self.test_sets for index in part.indices]
        step = max(1, -(-len(pairs) // max(1, self.num_eval)))
        return [part.source[index] for part, index in pairs[::step]] if self.num_eval else []


def find_data(config: TrainConfig, shape: CodeShape, say: Say) -> CodeData:
    """Opens the folders, and creates the workdir once it is known that all of it exists.

    Raises:
      ValueError: No such folder, codes of another codec than `init_from`, or no text to learn from.
    """
    data = config.data
    found, weights = code_batches.find_sources(data.train_data)
    held_out = found
    if data.eval_data:
        held_out, _ = code_batches.find_sources(data.eval_data)
    _check_codec(config, [*found, *held_out])
    sets = tuple(code_batches.read_set(source, "train", shape) for source in found)
    _check_texts(sets, shape, say)
    weights = [len(part) if w is None else w for part, w in zip(sets, weights, strict=True)]
    test_sets = tuple(code_batches.read_set(source, "test", shape) for source in held_out)
    if data.eval_data and config.run.num_eval_clips and not any(map(len, test_sets)):
        raise ValueError(f"eval_data {data.eval_data}: no recordings of the split 'test'")
    storage.to_path(config.run.workdir).mkdir(parents=True, exist_ok=True)
    return CodeData(
        data, sets, tuple(weights), test_sets, config.run.num_eval_clips, shape, config.run.seed
    )


def _check_codec(config: TrainConfig, found: Sequence[CodeSource]) -> None:
    """Compares fingerprints, unless the run began before: then they were compared."""
    if checkpoint.saved_steps(storage.to_path(config.run.workdir)):
        return
    codec = pretrained.load(config.run.init_from, "encoder")  # as `moss-tok tokenize` does
    fingerprint = pretrained.fingerprint(codec)
    for source in found:
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
