"""The protocol of objectives. The other modules of training use objectives only through it.

An objective is one module in `moss_tok/objectives/` and one entry in the registry there. The class
`Objective` has the default methods.

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
Arrays = dict[str, jax.Array]
Params = dict[str, Any]  # parameters, a tree per part of the model
Extra = dict[str, Any]  # state that an objective carries from step to step, by name
Trees = dict[str, Any]  # "params" and, with an average, "ema"
Say = Callable[[str], Any]  # prints a line
# (total, name of a unit) -> context whose value is called after each unit
Progress = Callable[[int, str], AbstractContextManager[Callable[[], None]]]


class Term(NamedTuple):
    """One term of the loss.

    Attributes:
      value: [B] float32, per item.
      weight: Its factor in the loss.
    """

    value: jax.Array
    weight: float


class Learned(NamedTuple):
    """Result of `Objective.train_extra`, which trains models in the extra state.

    Attributes:
      extra: Updated entries of the state's `extra`.
      terms: Losses by name, [M, B], per item.
      norms: Gradient norms by name, scalars.
    """

    extra: Extra
    terms: Arrays
    norms: Arrays


class Update(NamedTuple):
    """The argument of `Objective.finish`: the results of a step.

    Attributes:
      key: Random key of the step.
      step: Number of the step, a scalar.
      batch: The prepared batch.
      seen: The second result of `outputs` for all microbatches [M, B, ...].
      extra: The state's `extra`.
      trees: "params" and, with an average, "ema".
    """

    key: jax.Array
    step: jax.Array
    batch: Batch
    seen: Any
    extra: Extra
    trees: Trees


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation.

    Attributes:
      table: Metric averages {domain: {system: {metric: mean}}}.
      text: The same as readable text.
      samples: Audio to listen to, {domain: {name: wav [C, S]}}.
      sample_rate: Sample rate of the samples, Hz.
    """

    table: dict[str, dict[str, dict[str, float]]]
    text: str
    samples: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)
    sample_rate: int = 0


class TrainingData(Protocol):
    """Training batches, each a function of its number, and evaluation data.

    Attributes:
      batch_seconds: Seconds of audio in a batch.
    """

    batch_seconds: float

    def describe(self) -> str:
        """The amount of data, as text."""

    def batches(self, start: int, rows: Sequence[int]) -> Iterator[Batch]:
        """Endless batches from number `start` on, only `rows` of each; the iterator has `close()`.

        A batch may have "failed" [B, tries, 2]: (source, index) of recordings that could not be
        read, else -1.
        """

    def failure(self, source: int, index: int) -> str:
        """Why a recording could not be read."""


class Objective:
    """A loss with its models, data and evaluation: hashable, static under `jax.jit`."""

    term_names: ClassVar[tuple[str, ...]] = ()  # all terms of the loss
    masked_terms: ClassVar[tuple[str, ...]] = ()  # terms that only some items have
    norm_names: ClassVar[tuple[str, ...]] = ()  # gradient norms that `train_extra` returns
    param_folders: ClassVar[tuple[str, ...]] = ()  # parameters saved in their own folder
    extra_folders: ClassVar[tuple[str, ...]] = ()  # extra state saved in its own folder
    group_rates: ClassVar[dict[str, float]] = {"network": 1.0}  # learning-rate factors

    # ------------------------------------------------------------------- parameters and state

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters in boxes with logical axis names."""
        raise NotImplementedError

    def init_extra(self, key: jax.Array) -> Extra:
        """Extra state that is carried from step to step; partitioned parts of it are in boxes."""
        del key
        return {}

    def init_extra_optimizers(
        self,
        config: OptimizerConfig,
        extra: Extra,
    ) -> Extra:
        """Optimizer states for `extra`, without boxes."""
        del config, extra
        return {}

    def trained(self, params: Params) -> Params:
        """The subtree of the parameters that is trained."""
        return params

    def group(self, path: tuple[str, ...]) -> str:
        """The group, a key of `group_rates`, of the parameter at `path`."""
        del path
        return "network"

    # ------------------------------------------------------------------- the step, pure functions

    def item_shapes(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shapes and dtypes of the arrays of one item of a batch, by name."""
        raise NotImplementedError

    def prepare(self, key: jax.Array, step: jax.Array, batch: Batch) -> Batch:
        """Adds random draws to a whole batch, before it is split into microbatches."""
        del key, step
        return batch

    def masks(self, batch: Batch) -> Arrays:
        """For each of `masked_terms`, bool [B]: the items that have it, for its average."""
        del batch
        return {}

    def outputs(self, params: Params, part: Batch) -> tuple[Arrays, Any]:
        """Model outputs for a microbatch: those that get gradients, and those for `finish`."""
        raise NotImplementedError

    def terms(self, part: Batch, outputs: Arrays) -> dict[str, Term]:
        """Loss terms of a microbatch."""
        raise NotImplementedError

    def output_gradient(
        self,
        extra: Extra,
        part: Batch,
        outputs: Arrays,
        num_parts: int,
    ) -> tuple[Arrays, Arrays]:
        """Gradient of the mean loss with respect to outputs; terms and "loss" per item, [B]."""
        del extra

        def mean_loss(outputs):
            loss, values = combine(self.terms(part, outputs), part)
            return loss.mean() / num_parts, values | {"loss": loss}

        return jax.grad(mean_loss, has_aux=True)(outputs)

    def train_extra(
        self,
        config: OptimizerConfig,
        extra: Extra,
        parts: Batch,
        outputs: Arrays,
    ) -> Learned:
        """Trains models in `extra` on the outputs of all microbatches [M, B, ...]."""
        del config, extra, parts, outputs
        return Learned({}, {}, {})

    def finish(self, update: Update) -> tuple[Extra, Trees]:
        """Runs after the update; returns changed entries of `extra`, and the `trees`."""
        return {}, update.trees

    # ------------------------------------------------------------------- on the host

    def files(self) -> dict[str, str]:
        """Text files of a checkpoint, by name."""
        raise NotImplementedError

    def start(
        self,
        init_from: str,
        params: Any,
        extra: Any,
        say: Say,
    ) -> tuple[Params, Extra]:
        """Parameters and extra state that a new run starts from; other entries are initialized.

        Args:
          init_from: The flag init_from; may be empty.
          params: Parameters as ShapeDtypeStructs with shardings.
          extra: Extra state as ShapeDtypeStructs with shardings.
          say: Prints a line of text.
        """
        raise NotImplementedError

    def find_data(self, config: TrainConfig, mirror: storage.Mirror, say: Say) -> TrainingData:
        """Opens the data; creates the workdir after checking that all data exists."""
        raise NotImplementedError

    def summary(self, extra: Extra) -> dict[str, Any]:
        """Values of the extra state for a line of metrics.jsonl."""
        del extra
        return {}

    def progress(self, values: dict[str, Any]) -> str:
        """Text for the progress line, in addition to losses, from values of metrics.jsonl."""
        del values
        return ""

    def good_signs(self) -> str:
        """Values of the progress line that show that the model learns; printed once."""
        return ""

    def evaluate(
        self,
        params: Params,
        data: TrainingData,
        say: Say,
        progress: Progress,
    ) -> Evaluation | None:
        """Scores the model on held-out recordings; None if there are none."""
        raise NotImplementedError


def combine(terms: dict[str, Term], part: Batch) -> tuple[jax.Array, Arrays]:
    """The loss of each item [B], and the values of its terms.

    Terms with a mask are scaled up, so that their mean over all items of the batch is the mean over
    the items that have them.
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
