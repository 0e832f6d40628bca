"""Held-out loss of a training run, per recording, at each of its checkpoints.

    python experiments/scaling/heldout.py WORKDIR RESULT.json NUM_STEPS

The loss is the audio part of the training loss (log mel, loudness and waveform, with the weights
and the precision of the run, but all mel windows at once) on segments of the test split of the
run's data. Recordings are balanced over domains. study.py runs this after train.py.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

import moss_tok
from moss_tok import checkpoint
from moss_tok.audio import files
from moss_tok.codec.inference import Codec
from moss_tok.data import sources
from moss_tok.errors import exit_code
from moss_tok.evaluation import sweep
from moss_tok.json_files import read_json_object
from moss_tok.objectives import flops, losses
from moss_tok.objectives.config import build_objective, configure
from moss_tok.training.config import TrainConfig

RECORDINGS_PER_DOMAIN = 16
SEGMENTS_PER_RECORDING = 2
NUM_QUANTIZERS = (1, 4, 16)
_BATCH_SIZE = 8


@dataclasses.dataclass(frozen=True)
class Segments:
    """Held-out audio.

    Attributes:
      wav: [N, C, S] float32.
      recordings: [N] int, the recording of each segment.
      domains: The domain of each recording.
    """

    wav: np.ndarray
    recordings: np.ndarray
    domains: list[str]


def read_run(workdir: Path) -> TrainConfig:
    """The settings of a run. Raises ValueError if there is none."""
    path = workdir / checkpoint.RUN_CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{workdir}: no run of train.py")
    return configure(**read_json_object(path))


def read_segments(train_data: str, codec: Codec, num_samples: int, silence_db: float) -> Segments:
    """Whole segments of recordings of the test split, without silent ones.

    Raises:
      ValueError: There is no such recording.
    """
    by_domain: dict[str, list[Any]] = {}
    for item in sources.evaluation_items(train_data, 10**6):
        by_domain.setdefault(sources.open_item(item).domain, []).append(item)
    wavs = []
    recordings = []
    domains = []
    for domain in sorted(by_domain):
        items = _evenly(by_domain[domain], RECORDINGS_PER_DOMAIN)
        for clip in sweep.read_clips(items, codec):
            segments = _cut(clip.wav, num_samples, silence_db)
            if not segments:
                continue
            wavs += segments
            recordings += [len(domains)] * len(segments)
            domains.append(domain)
    if not wavs:
        raise ValueError(f"{train_data}: no recording of the split 'test' that fills a segment")
    return Segments(np.stack(wavs), np.array(recordings), domains)


def _evenly(items: list[Any], maximum: int) -> list[Any]:
    """At most `maximum` of the items, evenly spread."""
    number = min(maximum, len(items))
    indices = np.linspace(0, len(items) - 1, number).round().astype(int)
    return [items[index] for index in indices]


def _cut(wav: np.ndarray, num_samples: int, silence_db: float) -> list[np.ndarray]:
    """The first segments [C, S] of a recording that are not silent."""
    segments = []
    for start in range(0, wav.shape[1] - num_samples + 1, num_samples):
        segment = wav[:, start : start + num_samples]
        if files.level_db(segment) >= silence_db:
            segments.append(segment)
    return segments[:SEGMENTS_PER_RECORDING]


def make_loss(config: TrainConfig) -> Any:
    """A jitted function (codec, wav [B, C, S], mask [B, Q]) -> loss [B]."""
    settings = config.objective

    @jax.jit
    def loss(codec, wav, mask):
        _, quantized = codec.apply(wav, mask, method="quantize")
        wav_hat = codec.apply(quantized.latents, method="audio")
        lengths = np.full(wav.shape[0], wav.shape[-1])
        spectral = losses.reconstruction_losses(
            wav, wav_hat, lengths, codec.config.sample_rate, settings.mel_windows,
            settings.mel_floor_db,
        )  # fmt: skip
        total = settings.reconstruction_weight * spectral["reconstruction_loss"]
        total += settings.loudness_weight * spectral["loudness_loss"]
        if settings.spectrum_weight:
            spectrum = losses.spectrum_loss(wav, wav_hat, lengths, settings.mel_windows)
            total += settings.spectrum_weight * spectrum
        return total + settings.waveform_weight * losses.waveform_loss(wav, wav_hat, lengths)

    return loss


def measure(codec: Codec, segments: Segments, loss: Any, num_quantizers: int) -> list[float]:
    """The loss of every recording, the mean over its segments."""
    limit = codec.config.quantizer.num_quantizers
    in_use = np.arange(limit) < num_quantizers
    mask = np.broadcast_to(in_use, (_BATCH_SIZE, limit))
    values = []
    for start in range(0, len(segments.wav), _BATCH_SIZE):
        wav = segments.wav[start : start + _BATCH_SIZE]
        padding = _BATCH_SIZE - len(wav)
        padded = np.concatenate([wav, np.repeat(wav[:1], padding, 0)])
        values += np.asarray(loss(codec, padded, mask)).tolist()[: len(wav)]
    sums = np.bincount(segments.recordings, values)
    means = sums / np.bincount(segments.recordings)
    return [round(float(mean), 5) for mean in means]


def measure_run(workdir: Path, num_steps: int) -> dict[str, Any]:
    """Losses of checkpoints up to `num_steps`, and of the last one with fewer quantizers, too."""
    config = read_run(workdir)
    objective = build_objective(config)
    loss = make_loss(config)
    steps = [step for step in checkpoint.saved_steps(workdir) if step <= num_steps]
    if num_steps not in steps:
        raise ValueError(f"{workdir}: no checkpoint of step {num_steps}")
    segments = None
    by_step: dict[int, dict[int, list[float]]] = {}
    for step in steps:
        folder = workdir / checkpoint.STEPS_FOLDER / checkpoint.step_name(step)
        codec = moss_tok.load(folder, compute=config.devices.compute)
        if segments is None:
            data = config.data.train_data, codec, objective.num_samples, config.data.silence_db
            segments = read_segments(*data)
        chosen = NUM_QUANTIZERS if step == steps[-1] else NUM_QUANTIZERS[-1:]
        by_step[step] = {n: measure(codec, segments, loss, n) for n in chosen}
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(codec.params)),
        "flops_per_step": config.data.batch_size * flops.item_flops(objective),
        "domains": segments.domains,
        "losses": by_step,
    }


def main() -> None:
    """Writes the result of one run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("num_steps", type=int, help="last checkpoint to measure")
    args = parser.parse_args()
    result = measure_run(args.workdir, args.num_steps)
    files.write_text(args.result, json.dumps(result) + "\n")


if __name__ == "__main__":
    sys.exit(exit_code(main))
