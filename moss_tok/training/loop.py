"""The training run, in the order in which things happen."""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import tqdm

from moss_tok.audio import files, manifest
from moss_tok.codec.inference import Codec
from moss_tok.config import (
    FREE_FIELDS,
    CodecConfig,
    TrainConfig,
    load_codec_config,
    parse_json_object,
)
from moss_tok.data import pipeline, synthetic
from moss_tok.evaluation import report, sweep
from moss_tok.training import checkpoints, losses, writer
from moss_tok.training.state import TrainState, init_state
from moss_tok.training.step import train_step

_CONFIG_NAME = "train_config.json"


def train(config: TrainConfig) -> None:
    """Runs or resumes training in `config.workdir`, then evaluates and reconstructs unseen audio.

    Raises:
      ValueError: A wrong setting or bad data, before anything is written; or a workdir of a run
        with other settings.
    """
    codec = load_codec_config(config.model)
    num_samples = _segment_samples(config, codec)
    workdir = Path(config.workdir)
    _check_same_run(workdir, config)
    train_items, eval_items = _find_items(config, codec)
    _write_text(workdir / _CONFIG_NAME, json.dumps(dataclasses.asdict(config), indent=2))
    counts = f"{len(train_items)} training and {len(eval_items)} evaluation files"
    _say(f"{counts}; workdir {workdir}")
    with checkpoints.Checkpoints(workdir, codec, config.keep_checkpoints) as saver:
        state = _start(config, codec, saver)
        start = int(state.step)
        batches = pipeline.batches(
            train_items,
            batch_size=config.batch_size,
            num_samples=num_samples,
            sample_rate=codec.sample_rate,
            num_channels=codec.num_channels,
            seed=config.seed,
            start=start,
        )
        with writer.MetricsWriter(workdir, start) as log:
            state = _run(config, codec, state, batches, saver, log)
    _finish(config, Codec(state.params, codec, config.compute), eval_items, workdir)


def _segment_samples(config: TrainConfig, codec: CodecConfig) -> int:
    frames = int(config.segment_seconds * codec.frame_rate + 1e-6)
    longest = max(window for window, _ in losses.MEL_SCALES)
    if frames * codec.hop_length < longest:
        raise ValueError(
            f"segment_seconds must be at least {longest / codec.sample_rate:.3f} for the longest "
            f"mel window, got {config.segment_seconds}"
        )
    return frames * codec.hop_length


def _check_same_run(workdir: Path, config: TrainConfig) -> None:
    """Refuses a workdir whose run differs in a setting that defines the result."""
    path = workdir / _CONFIG_NAME
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"workdir {workdir} is no folder")
    if not path.exists():
        return
    try:
        before = parse_json_object(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    now = dataclasses.asdict(config)
    differences = [
        f"{name} was {before.get(name)!r}, now {value!r}"
        for name, value in now.items()
        if name not in FREE_FIELDS and before.get(name) != value
    ]
    if differences:
        raise ValueError(f"workdir {workdir} holds another run: {'; '.join(differences)}")


def _find_items(
    config: TrainConfig, codec: CodecConfig
) -> tuple[list[manifest.AudioItem], list[manifest.AudioItem]]:
    """Training and evaluation files; creates the workdir once it is known that there are any."""
    sources = [config.train_data, config.eval_data or config.train_data]
    found = [manifest.find_items(s) if s else [] for s in sources]
    if config.train_data:
        _check_items(config, *found)
    workdir = Path(config.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    if not all(sources):
        source = synthetic.write_dataset(workdir / "synthetic", codec.sample_rate)
        found = [items or manifest.find_items(source) for items in found]
    train_items = [item for item in found[0] if item.split == "train"]
    eval_items = [item for item in found[1] if item.split == "test"]
    return train_items, eval_items[: config.num_eval_clips]


def _check_items(config: TrainConfig, train_items: list[Any], eval_items: list[Any]) -> None:
    """Finds now what would otherwise end the run, perhaps after its last step."""
    if all(item.split != "train" for item in train_items):
        raise ValueError(f"{config.train_data}: no files of the split 'train'")
    for item in [i for i in eval_items if i.split == "test"][: config.num_eval_clips]:
        if not item.path.is_file():
            raise ValueError(f"{item.path}: no such file")


def _start(config: TrainConfig, codec: CodecConfig, saver: checkpoints.Checkpoints) -> TrainState:
    step = saver.latest_step()
    if step is None:
        return jax.jit(init_state, static_argnums=(0, 1))(config, codec)
    _say(f"going on from step {step}")
    like = jax.eval_shape(lambda: init_state(config, codec))
    return saver.restore(step, like)


def _run(config, codec, state, batches, saver, log) -> TrainState:
    """Steps until num_steps; logs and saves on the way."""
    start, terminal = int(state.step), sys.stderr.isatty()
    began, since = time.perf_counter(), start
    bar = tqdm.tqdm(
        total=config.num_steps, initial=start, disable=not terminal, unit="step", desc="training"
    )
    for step in range(start + 1, config.num_steps + 1):
        state, metrics = train_step(config, codec, state, next(batches))
        bar.update()
        if step % config.log_every == 0 or step == config.num_steps:
            values = {name: float(value) for name, value in metrics.items()}
            seconds = time.perf_counter() - began
            values |= _rates(config, step - since, seconds)
            log.write(step, values)
            bar.set_postfix(loss=f"{values['loss']:.2f}")
            if not terminal:
                _say(_line(step, config.num_steps, values))
            began, since = time.perf_counter(), step
        if step % config.checkpoint_every == 0 or step == config.num_steps:
            saver.save(state)
    bar.close()
    return state


def _rates(config: TrainConfig, steps: int, seconds: float) -> dict[str, float]:
    rate = steps / seconds
    audio = rate * config.batch_size * config.segment_seconds
    return {"steps_per_second": rate, "audio_seconds_per_second": audio}


def _line(step: int, num_steps: int, values: dict[str, float]) -> str:
    left = (num_steps - step) / values["steps_per_second"]
    return (
        f"step {step}/{num_steps} loss {values['loss']:.3f} "
        f"reconstruction {values['reconstruction_loss']:.3f} "
        f"commitment {values['commitment_loss']:.3f} "
        f"perplexity {values['codebook_perplexity']:.0f} "
        f"{values['audio_seconds_per_second']:.0f} s of audio per s, {left / 60:.1f} min left"
    )


def _finish(config: TrainConfig, codec: Codec, items: list[Any], workdir: Path) -> None:
    """Curves, one reconstruction per domain of unseen audio, and a table over bitrates."""
    report.save_curves(workdir / "curves.png", writer.read_metrics(workdir))
    _say(f"loss curves: {workdir / 'curves.png'}")
    if not items:
        return
    clips = sweep.read_clips(items, codec)
    _save_samples(codec, clips, workdir)
    most = codec.config.quantizer.num_quantizers
    numbers = [n for n in (1, 2, 4, 8, 16, 32) if n < most] + [most]
    terminal = sys.stderr.isatty()
    with tqdm.tqdm(total=len(clips), disable=not terminal, unit="clip", desc="evaluating") as bar:
        table = sweep.evaluate(codec, clips, numbers, lambda done: bar.update())
    text = sweep.format_table(table)
    for name, content in (
        ("evaluation.json", json.dumps(table, indent=2)),
        ("evaluation.md", text),
    ):
        data = (content + "\n").encode()
        files.write_atomically(workdir / name, lambda file, data=data: file.write(data))
    _say(f"unseen audio, {len(clips)} clips (mel_loss: lower is better; stoi: higher):\n{text}")


def _save_samples(codec: Codec, clips: list[sweep.Clip], workdir: Path) -> None:
    folder, rate = workdir / "samples", codec.config.sample_rate
    folder.mkdir(exist_ok=True)
    most = codec.config.quantizer.num_quantizers
    longest = {}
    for clip in clips:
        if clip.domain not in longest or clip.wav.size > longest[clip.domain].wav.size:
            longest[clip.domain] = clip
    for domain, clip in sorted(longest.items()):
        wav_hat = sweep.reconstruct(codec, clip.wav, [most])[most]
        for kind, wav in (("input", clip.wav), ("output", wav_hat)):
            files.write(folder / f"{domain}_{kind}.wav", wav, rate)
        picture = folder / f"{domain}.png"
        report.save_spectrograms(picture, {"input": clip.wav, "output": wav_hat}, rate)
        _say(f"listen: {folder}/{domain}_input.wav, {domain}_output.wav; see {picture}")


def _write_text(path: Path, text: str) -> None:
    files.write_atomically(path, lambda file: file.write((text + "\n").encode()))


def _say(text: str) -> None:
    tqdm.tqdm.write(text)
    sys.stdout.flush()
