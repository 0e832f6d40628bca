"""What a run optimizes: the protocol that loop, step, state, checkpoints and writer serve.

They name no domain. An objective is one file in `moss_tok/objectives/` and one line in its
registry; this class gives the defaults.

Shapes: a batch is a dict of arrays [B, ...]; a part of it is a microbatch [B / M, ...].
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import numpy as np

from moss_tok import storage
from moss_tok.training.config import OptimizerConfig, TrainConfig

Batch = dict[str, Any]
Say = Callable[[str], Any]  # prints a line
# total, what a unit is called -> context whose value is called after each unit
Progress = Callable[[int, str], AbstractContextManager[Callable[[], None]]]


class Term(NamedTuple):
    """One term of the loss of each item.

    Attributes:
      value: [B] float32.
      weight: What it is multiplied with in the loss.
    """

    value: jax.Array
    weight: float


class Learned(NamedTuple):
    """What `Objective.train_extra` returns.

    Attributes:
      extra: Updated entries of the state's `extra`.
      terms: Loss of each item by name, [M, B].
      norms: Gradient norms by name, scalars.
    """

    extra: dict[str, Any]
    terms: dict[str, jax.Array]
    norms: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
      table: Metric averages {domain: {system: {metric: mean}}}.
      text: The same to read.
      samples: Audio to listen to, {domain: {name: wav [C, S]}}.
      sample_rate: Of the samples, in Hz.
    """

    table: dict[str, dict[str, dict[str, float]]]
    text: str
    samples: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)
    sample_rate: int = 0


class TrainingData(Protocol):
    """Batches as a function of their number, and what is evaluated on.

    Attributes:
      batch_seconds: Seconds of audio in a batch.
    """

    batch_seconds: float

    def describe(self) -> str:
        """How much there is, in words."""

    def batches(self, start: int, rows: Sequence[int]) -> Iterator[Batch]:
        """Endless batches from number `start` on, of these rows of each; it has `close()`.

        A batch may have "failed" [B, tries, 2]: (source, index) of what could not be read, or -1.
        """

    def failure(self, source: int, index: int) -> str:
        """Why a recording could not be read."""


class Objective:
    """A loss, what it trains, and what it needs: a hashable object, static under `jax.jit`."""

    term_names: ClassVar[tuple[str, ...]] = ()  # all terms of the loss
    masked_terms: ClassVar[tuple[str, ...]] = ()  # those that only some items have
    norm_names: ClassVar[tuple[str, ...]] = ()  # of `train_extra`
    param_folders: ClassVar[tuple[str, ...]] = ()  # parameters with a folder of their own
    extra_folders: ClassVar[tuple[str, ...]] = ()  # extra state with a folder of its own
    group_rates: ClassVar[dict[str, float]] = {"network": 1.0}

    # ------------------------------------------------------------------- parameters and state

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Fresh parameters in boxes with logical axis names."""
        raise NotImplementedError

    def init_extra(self, key: jax.Array) -> dict[str, Any]:
        """What else is carried from step to step; what is partitioned is in boxes."""
        del key
        return {}

    def init_extra_optimizers(
        self, config: OptimizerConfig, extra: dict[str, Any]
    ) -> dict[str, Any]:
        """States of optimizers of `extra`, without boxes."""
        del config, extra
        return {}

    def trained(self, params: dict[str, Any]) -> dict[str, Any]:
        """The subtree of the parameters that is trained."""
        return params

    def group(self, path: tuple[str, ...]) -> str:
        """The parameter group, a key of `group_rates`, of the parameter at `path`.

        `group_rates` are factors on the learning rate.
        """
        del path
        return "network"

    # ------------------------------------------------------------------- the step, pure functions

    def item_shapes(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shape and dtype of an item of a batch, by name."""
        raise NotImplementedError

    def prepare(self, key: jax.Array, step: jax.Array, batch: Batch) -> Batch:
        """What is drawn for a whole batch before it is split into microbatches."""
        del key, step
        return batch

    def masks(self, batch: Batch) -> dict[str, jax.Array]:
        """For each of `masked_terms`, bool [B]: which items have it. Its mean is over these."""
        del batch
        return {}

    def outputs(self, params: dict[str, Any], part: Batch) -> tuple[dict[str, jax.Array], Any]:
        """What the loss sees of a microbatch, with gradients; and what `finish` sees, without."""
        raise NotImplementedError

    def terms(self, part: Batch, outputs: dict[str, jax.Array]) -> dict[str, Term]:
        """The terms of the loss of a microbatch."""
        raise NotImplementedError

    def output_gradient(
        self, extra: dict[str, Any], part: Batch, outputs: dict[str, jax.Array], num_parts: int
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Gradient of the mean loss in the outputs; the terms, with "loss", of each item [B]."""
        del extra

        def mean_loss(outputs):
            loss, values = combine(self.terms(part, outputs), part)
            return loss.mean() / num_parts, values | {"loss": loss}

        return jax.grad(mean_loss, has_aux=True)(outputs)

    def train_extra(
        self,
        config: OptimizerConfig,
        extra: dict[str, Any],
        parts: Batch,
        outputs: dict[str, jax.Array],
    ) -> Learned:
        """Trains what is in `extra` on the outputs of all microbatches [M, B, ...]."""
        del config, extra, parts, outputs
        return Learned({}, {}, {})

    def finish(
        self,
        key: jax.Array,
        step: jax.Array,
        batch: Batch,
        seen: Any,
        extra: dict[str, Any],
        trees: dict[str, Any],
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """After the update: changed entries of `extra`, and of `trees` ("params", "ema").

        `seen` is the second result of `outputs`, of all microbatches [M, B, ...].
        """
        del key, step, batch, seen, extra
        return {}, trees

    # ------------------------------------------------------------------- on the host

    def files(self) -> dict[str, str]:
        """Text files of a checkpoint, by name."""
        raise NotImplementedError

    def start(
        self, init_from: str, params: Any, extra: Any, say: Say
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Entries of parameters and extra state that a new run starts with, the rest being fresh.

        Args:
          init_from: As the flag; may be empty.
          params: ShapeDtypeStructs with shardings.
          extra: The same.
          say: Takes a line of text.
        """
        raise NotImplementedError

    def find_data(self, config: TrainConfig, mirror: storage.Mirror, say: Say) -> TrainingData:
        """Finds the data, and creates the workdir once it is known that all of it exists."""
        raise NotImplementedError

    def summary(self, extra: dict[str, Any]) -> dict[str, Any]:
        """Values for a line of metrics.jsonl, of the extra state."""
        del extra
        return {}

    def progress(self, values: dict[str, Any]) -> str:
        """What the line of progress says besides the losses, of a line of metrics.jsonl."""
        del values
        return ""

    def evaluate(
        self, params: dict[str, Any], data: TrainingData, say: Say, progress: Progress
    ) -> Evaluation | None:
        """Scores the model on recordings it has not seen; None where there are none."""
        raise NotImplementedError


def combine(terms: dict[str, Term], part: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of each item [B], and the values of its terms.

    Terms with a mask count so much more that their mean over all items of the batch is the mean
    over those that have them.
    """
    values = {}
    loss = 0.0
    for name, term in terms.items():
        value = term.value
        if name in part.get("term_shares", {}):
            value = value * part["term_shares"][name]
        values[name] = value
        loss = loss + term.weight * value
    return loss, values
