"""A training run as a tree of settings: selection, run, optimizer, devices, data, objective.

Every leaf is a flag of train.py with the same name; `objectives.config.configure` builds the tree.
"""

import dataclasses
from typing import Any

from moss_tok import settings
from moss_tok.mesh import parse_mesh
from moss_tok.nn.compute import ATTENTION, DTYPES, REMAT, ComputeConfig
from moss_tok.settings import count, setting, weight


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What is run, how long, and what is written when."""

    workdir: str = setting("runs/quickstart", "everything is written here", free=True)
    init_from: str = setting("", "checkpoint, workdir, official directory or Hub id to start from")
    seed: int = count(0, "of parameters, data order, crops and quantizer dropout")
    num_steps: int = count(1000, "steps of the whole run", at_least=1, free=True)
    max_skipped_steps: int = count(
        20, "updates in a row that may be skipped for not being finite", at_least=1, free=True
    )
    log_every: int = count(50, "steps between lines of metrics.jsonl", at_least=1, free=True)
    checkpoint_every: int = count(1000, "steps between checkpoints", at_least=1, free=True)
    keep_checkpoints: int = count(2, "how many of the newest checkpoints stay", 1, free=True)
    keep_every: int = count(0, "checkpoints at multiples of this stay for good; 0: none", free=True)
    eval_every: int = count(0, "steps between evaluations; 0: only at the end", free=True)
    num_eval_clips: int = count(100, "clips of an evaluation, at most; 0: none", free=True)
    profile_steps: range = setting(
        range(0),
        "FIRST:LAST: steps of which a jax.profiler trace goes into the workdir",
        free=True,
        kind=settings.STEPS,
    )

    def __post_init__(self):
        settings.check(self)
        if not self.workdir:
            raise ValueError("workdir must not be empty")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a schedule, clipping by global norm, and an average of the weights."""

    learning_rate: float = setting(1e-4, "highest learning rate of AdamW", above=0)
    warmup_steps: int = count(1000, "steps of linear warm-up")
    decay_steps: int = count(0, "step at which a cosine has taken the learning rate to 0; 0: none")
    decay_per_step: float = setting(
        0.999996, "factor on the learning rate at each step after warm-up", above=0, at_most=1
    )
    beta1: float = setting(0.8, "AdamW's decay of the first moment", at_least=0, below=1)
    beta2: float = setting(0.99, "AdamW's decay of the second moment", at_least=0, below=1)
    weight_decay: float = weight(0.01, "AdamW's weight decay, on matrices only")
    gradient_clip: float = setting(1000.0, "largest global norm of the gradient", above=0)
    ema_decay: float = setting(
        0.999,
        "of the averaged weights that are evaluated and exported; 0: no averaging",
        at_least=0,
        below=1,
    )

    def __post_init__(self):
        settings.check(self)
        if 0 < self.decay_steps <= self.warmup_steps:
            raise ValueError(
                f"decay_steps must be 0 or more than warmup_steps {self.warmup_steps}, "
                f"got {self.decay_steps}"
            )


@dataclasses.dataclass(frozen=True)
class DevicesConfig:
    """How a step is computed, and on which devices."""

    mesh: str = setting(
        "data:-1",
        "devices along data, fsdp and tensor, as in data:4,fsdp:8; -1: the rest",
        free=True,
    )
    num_microbatches: int = count(1, "parts a batch is split into, to save memory", at_least=1)
    dtype: str = setting("float32", "of Transformers and discriminators", choices=DTYPES)
    attention: str = setting("auto", "implementation of attention", choices=ATTENTION)
    remat: str = setting("none", "what the backward pass recomputes", choices=REMAT)

    def __post_init__(self):
        settings.check(self)
        parse_mesh(self.mesh)

    @property
    def compute(self) -> ComputeConfig:
        """How models are computed during training."""
        return ComputeConfig(self.dtype, "default", self.attention, self.remat)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A whole run.

    Attributes:
      selection: Which objective.
      run: See `RunConfig`.
      optimizer: See `OptimizerConfig`.
      devices: See `DevicesConfig`.
      data: Settings of the data, with `batch_size`.
      objective: Settings of the objective; their class belongs to one objective.
    """

    selection: Any
    run: RunConfig
    optimizer: OptimizerConfig
    devices: DevicesConfig
    data: Any
    objective: Any

    def __post_init__(self):
        if self.data.batch_size % self.devices.num_microbatches:
            raise ValueError(
                f"batch_size {self.data.batch_size} must be a multiple of num_microbatches "
                f"{self.devices.num_microbatches}"
            )
