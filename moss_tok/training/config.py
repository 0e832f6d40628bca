"""A training run as a tree of settings: selection, run, optimizer, devices, data, objective.

Every leaf is a flag of train.py with the same name; `objectives.config.configure` builds the tree.
"""

import dataclasses
from typing import Any

from moss_tok import settings
from moss_tok.mesh import parse_mesh
from moss_tok.nn.compute import (
    ATTENTION,
    DTYPES,
    MATMUL_PRECISIONS,
    REMAT,
    ComputeConfig,
)
from moss_tok.settings import count, setting, weight


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Where a run is written, what it starts from, how long it is, and when it logs and saves."""

    workdir: str = setting(
        "runs/quickstart",
        "folder or gs:// path for checkpoints, metrics and samples; a run that is already there "
        "is resumed",
        free=True,
    )
    init_from: str = setting(
        "",
        "weights to start from: a checkpoint, a workdir, an official directory or a Hub id; "
        "empty: random initialization",
    )
    seed: int = count(
        0,
        "seed of initial parameters, data order, crops, augmentation and quantizer dropout",
    )
    num_steps: int = count(
        1000,
        "length of the run in optimizer steps, steps before a resume included",
        at_least=1,
        free=True,
    )
    max_skipped_steps: int = count(
        20,
        "the run ends with an error after this many consecutive updates with a NaN or an infinity",
        at_least=1,
        free=True,
    )
    log_every: int = count(
        50, "number of steps between lines of metrics.jsonl", at_least=1, free=True
    )
    checkpoint_every: int = count(
        1000, "number of steps between checkpoints", at_least=1, free=True
    )
    keep_checkpoints: int = count(
        2, "how many of the newest checkpoints are kept", at_least=1, free=True
    )
    keep_every: int = count(
        0,
        "checkpoints at multiples of this number of steps are never deleted; 0: only the newest "
        "keep_checkpoints are kept",
        free=True,
    )
    eval_every: int = count(
        0,
        "number of steps between evaluations on the test split; 0: evaluate only at the end",
        free=True,
    )
    num_eval_clips: int = count(
        100, "maximum number of recordings in an evaluation; 0: no evaluation", free=True
    )
    profile_steps: range = setting(
        range(0),
        "FIRST:LAST: steps to profile; the jax.profiler trace is written to the workdir; empty: "
        "no profile",
        free=True,
        kind=settings.STEPS,
    )

    def __post_init__(self):
        settings.check(self)
        if not self.workdir:
            raise ValueError("workdir must not be empty")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its learning-rate schedule, gradient clipping, and the moving average of weights."""

    learning_rate: float = setting(1e-4, "peak learning rate of AdamW, after warm-up", above=0)
    warmup_steps: int = count(1000, "number of steps of linear learning-rate warm-up")
    decay_steps: int = count(
        0,
        "step at which a cosine decay reaches a learning rate of 0; 0: exponential decay by "
        "decay_per_step instead",
    )
    decay_per_step: float = setting(
        0.999996,
        "the learning rate is multiplied by this at each step after warm-up; 1: constant; ignored "
        "if decay_steps is set",
        above=0,
        at_most=1,
    )
    beta1: float = setting(
        0.8, "AdamW's decay rate of the first moment (beta1)", at_least=0, below=1
    )
    beta2: float = setting(
        0.99, "AdamW's decay rate of the second moment (beta2)", at_least=0, below=1
    )
    weight_decay: float = weight(0.01, "AdamW's weight decay; applies to weight matrices only")
    gradient_clip: float = setting(
        1000.0, "gradients with a larger global norm are scaled down to this norm", above=0
    )
    ema_decay: float = setting(
        0.999,
        "decay rate of the exponential moving average of the weights, which is evaluated and "
        "exported instead of the weights; 0: no average",
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
    """The device mesh, and how a training step is computed."""

    mesh: str = setting(
        "data:-1",
        "number of devices along the axes data, fsdp and tensor, as in data:4,fsdp:8; -1: all "
        "remaining devices; axes that are not named have 1",
        free=True,
    )
    num_microbatches: int = count(
        1,
        "number of parts of a batch that are computed one after another to save memory; must "
        "divide batch_size",
        at_least=1,
    )
    dtype: str = setting(
        "float32",
        "number format of Transformer and discriminator computations: float32 or bfloat16; "
        "parameters stay in float32",
        choices=DTYPES,
    )
    precision: str = setting(
        "default",
        "matmul precision: default (chosen by the device), high, highest, or BF16_BF16_F32 "
        "(bfloat16 operands, float32 sums: fast on CPUs with AMX)",
        choices=MATMUL_PRECISIONS,
    )
    attention: str = setting(
        "auto",
        "attention implementation: auto (chosen by device), dense, blocked, splash (TPU) or "
        "cudnn (NVIDIA GPU)",
        choices=ATTENTION,
    )
    remat: str = setting(
        "none",
        "what the backward pass recomputes in each layer to save memory: none, dots (everything "
        "but matrix products) or full (everything)",
        choices=REMAT,
    )
    unroll_layers: int = count(
        1,
        "number of layers per iteration of the loop over the layers of a stage; more: fewer "
        "copies, longer compilation",
        at_least=1,
    )

    def __post_init__(self):
        settings.check(self)
        parse_mesh(self.mesh)

    @property
    def compute(self) -> ComputeConfig:
        """Compute settings of models during training."""
        return ComputeConfig(
            dtype=self.dtype,
            precision=self.precision,
            attention=self.attention,
            remat=self.remat,
            unroll_layers=self.unroll_layers,
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """All settings of a run.

    Attributes:
      selection: Settings that choose the objective.
      run: See `RunConfig`.
      optimizer: See `OptimizerConfig`.
      devices: See `DevicesConfig`.
      data: Settings of the data; every class of them has `batch_size`.
      objective: Settings of the objective; each objective has its own class.
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
