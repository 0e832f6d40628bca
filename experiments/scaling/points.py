"""The family of models, and the training runs (points) of each scaling study."""

import dataclasses
from pathlib import Path

from moss_tok import checkpoint
from moss_tok.codec.config import CodecConfig, ModuleConfig, TransformerConfig, read_codec_config

SMALL_CODEC = Path(__file__).parents[1] / "small_codec.json"

# Widths in eighths of those of small_codec.json, by name; the names are rounded parameter counts.
SIZES = {"1M": 3, "3M": 5, "6M": 8, "15M": 13}
SMALLEST = "1M"  # of which dropout and batch size are studied
DEEP = "deep"  # the smallest with 8 times the layers: 40 blocks per side, 24 in one stage

LEARNING_RATE = 1.5e-3  # of SMALLEST at a batch size of 8
CODEBOOK_LEARNING_RATE = 4.5e-3  # of all models
DEEP_DIVISOR = 3.0  # the deep model learns this many times slower than SMALLEST
BATCH_SIZE = 8
QUANTIZER_DROPOUT = 0.5
DROPOUTS = (0.0, 0.5, 1.0)
BATCH_SIZES = (4, 8, 16, 32)
STREAMS = ("float32", "bfloat16")  # types of the residual streams; products are bfloat16 in both
COOLDOWN = 3  # a cooldown has one step for this many steps before it


@dataclasses.dataclass(frozen=True)
class Point:
    """A training run.

    Attributes:
      name: Name of its workdir.
      size: The model, a key of SIZES, or DEEP.
      num_steps: Length of the run.
      seed: Seed of the run.
      batch_size: Segments per step.
      quantizer_dropout: Share of items that use only the first quantizers.
      trainable: What is trained, "all" or "decoder".
      dtype: Type of the residual streams, "float32" or "bfloat16".
      start: The point whose weights it starts from; None: new weights.
      cools_from: For a cooldown, the step of `start` from which the learning rate falls to 0;
        0: the learning rate is constant.
    """

    name: str
    size: str
    num_steps: int
    seed: int = 0
    batch_size: int = BATCH_SIZE
    quantizer_dropout: float = QUANTIZER_DROPOUT
    trainable: str = "all"
    dtype: str = "float32"
    start: "Point | None" = None
    cools_from: int = 0

    def flags(self, out: Path, train_data: str) -> dict[str, str]:
        """Its flags of train.py beside those of base.flags."""
        quarter = quarters(self.num_steps)[0]
        rate = learning_rate(self.size, self.batch_size)
        codebook_rate = CODEBOOK_LEARNING_RATE * (self.batch_size / BATCH_SIZE) ** 0.5
        flags = {
            "train_data": train_data,
            "num_steps": str(self.num_steps),
            "checkpoint_every": str(quarter),
            "keep_every": str(quarter),
            "seed": str(self.seed),
            "batch_size": str(self.batch_size),
            "quantizer_dropout": f"{self.quantizer_dropout:g}",
            "learning_rate": f"{rate:.4g}",
            "codebook_learning_rate": f"{codebook_rate / rate:.4g}",
            "trainable": self.trainable,
            "dtype": self.dtype,
        }
        if self.cools_from:
            flags |= {
                "checkpoint_every": str(self.num_steps),
                "keep_every": str(self.num_steps),
                "warmup_steps": str(self.num_steps // 10),
                "decay_steps": str(self.num_steps),
            }
        if self.start is None:
            return flags | {"model": str(model_path(out, self.size))}
        steps = out / self.start.name / checkpoint.STEPS_FOLDER
        step = self.cools_from or self.start.num_steps
        return flags | {"init_from": str(steps / checkpoint.step_name(step))}


def learning_rate(size: str, batch_size: int) -> float:
    """The peak learning rate: proportional to 1 / width, and to the root of the batch size."""
    divisor = DEEP_DIVISOR if size == DEEP else SIZES[size] / SIZES[SMALLEST]
    return LEARNING_RATE / divisor * (batch_size / BATCH_SIZE) ** 0.5


def model_path(out: Path, size: str) -> Path:
    """The config of a model of the family."""
    return out / f"{size}.json"


def scaled(config: CodecConfig, eighths: int) -> CodecConfig:
    """The codec with all widths of its Transformers multiplied by `eighths` / 8.

    Depth, number of heads, rates, quantizer and the widths between stages stay the same.
    """
    encoder = tuple(_scaled_module(module, eighths) for module in config.encoder)
    decoder = tuple(_scaled_module(module, eighths) for module in config.decoder)
    return dataclasses.replace(config, encoder=encoder, decoder=decoder)


def _scaled_module(module: ModuleConfig, eighths: int) -> ModuleConfig:
    if not isinstance(module, TransformerConfig):
        return module
    model_dim = module.model_dim * eighths // 8
    return dataclasses.replace(
        module,
        model_dim=model_dim,
        mlp_dim=module.mlp_dim * eighths // 8,
        input_projection=module.input_projection or module.input_dim != model_dim,
        output_projection=module.output_projection or module.output_dim != model_dim,
    )


def deepened(config: CodecConfig, factor: int) -> CodecConfig:
    """The codec with `factor` times as many layers in every stage."""

    def deepen(module: ModuleConfig) -> ModuleConfig:
        if not isinstance(module, TransformerConfig):
            return module
        return dataclasses.replace(module, num_layers=module.num_layers * factor)

    encoder = tuple(deepen(module) for module in config.encoder)
    decoder = tuple(deepen(module) for module in config.decoder)
    return dataclasses.replace(config, encoder=encoder, decoder=decoder)


def write_models(out: Path) -> None:
    """Writes the configs of the family and of the deep model into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    small_codec = read_codec_config(SMALL_CODEC)
    for size, eighths in SIZES.items():
        model_path(out, size).write_text(scaled(small_codec, eighths).to_json())
    deep = deepened(scaled(small_codec, SIZES[SMALLEST]), 8)
    model_path(out, DEEP).write_text(deep.to_json())


def sizes(num_steps: int, num_seeds: int) -> list[Point]:
    """Every size, with every seed, and cooldowns from each quarter of its run."""
    points = []
    for size in SIZES:
        for seed in range(num_seeds):
            baseline = _baseline(size, num_steps, seed)
            points.append(baseline)
            for step in quarters(num_steps):
                points.append(_cooldown(baseline, step))
    return points


def quarters(num_steps: int) -> list[int]:
    """The steps at which a run of constant rate has checkpoints."""
    quarter = max(1, num_steps // 4)
    return list(range(quarter, num_steps + 1, quarter))


def _cooldown(start: Point, step: int) -> Point:
    name = f"cooldown-{start.size}-{step}-seed{start.seed}"
    num_steps = max(2, step // COOLDOWN)
    return Point(name, start.size, num_steps, start.seed, start=start, cools_from=step)


def joint(num_steps: int, num_seeds: int) -> list[Point]:
    """Every size, continued for as many steps, end to end and with a frozen encoder."""
    points = []
    for size in SIZES:
        for seed in range(num_seeds):
            start = _baseline(size, num_steps, seed)
            points.append(start)
            for trainable in ("all", "decoder"):
                name = f"continued-{trainable}-{size}-{num_steps}-seed{seed}"
                points.append(Point(name, size, num_steps, seed, trainable=trainable, start=start))
    return points


def dropout(num_steps: int, num_seeds: int) -> list[Point]:
    """The smallest model with several shares of quantizer dropout."""
    points = []
    for share in DROPOUTS:
        for seed in range(num_seeds):
            if share == QUANTIZER_DROPOUT:
                points.append(_baseline(SMALLEST, num_steps, seed))
                continue
            name = f"dropout{share:g}-{SMALLEST}-seed{seed}"
            points.append(Point(name, SMALLEST, num_steps, seed, quantizer_dropout=share))
    return points


def batch(num_steps: int, num_seeds: int) -> list[Point]:
    """The smallest model with several batch sizes, on the same amount of audio."""
    points = []
    for batch_size in BATCH_SIZES:
        for seed in range(num_seeds):
            if batch_size == BATCH_SIZE:
                points.append(_baseline(SMALLEST, num_steps, seed))
                continue
            name = f"batch{batch_size}-{SMALLEST}-seed{seed}"
            steps = max(1, num_steps * BATCH_SIZE // batch_size)
            points.append(Point(name, SMALLEST, steps, seed, batch_size=batch_size))
    return points


def streams(num_steps: int, num_seeds: int) -> list[Point]:
    """The deep model with float32 and with bfloat16 residual streams."""
    points = []
    for dtype in STREAMS:
        for seed in range(num_seeds):
            name = f"streams-{dtype}-seed{seed}"
            points.append(Point(name, DEEP, num_steps, seed, dtype=dtype))
    return points


def _baseline(size: str, num_steps: int, seed: int) -> Point:
    return Point(f"size-{size}-seed{seed}", size, num_steps, seed)


STUDIES = {"sizes": sizes, "joint": joint, "dropout": dropout, "batch": batch, "streams": streams}
