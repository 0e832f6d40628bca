"""Segments of audio as the data of a run, and how a codec is scored on held-out recordings."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from moss_tok import checkpoint, sharding, storage
from moss_tok.audio import files
from moss_tok.audio.manifest import AudioItem
from moss_tok.codec import pretrained
from moss_tok.codec.config import CodecConfig
from moss_tok.codec.inference import Codec
from moss_tok.codec.presets import load_codec_config
from moss_tok.data import pipeline, sources, synthetic
from moss_tok.data.config import AudioDataConfig
from moss_tok.data.pipeline import SegmentShape
from moss_tok.evaluation import sweep, transcription
from moss_tok.language.generate import Language
from moss_tok.language.text import Tokenizer
from moss_tok.objectives import text
from moss_tok.objectives.config import TextSettings
from moss_tok.training.config import TrainConfig
from moss_tok.training.objective import Batch, Progress, Say


@dataclasses.dataclass(frozen=True)
class AudioData:
    """Segments of a mixture of recordings, and recordings to evaluate on."""

    config: AudioDataConfig
    mixture: sources.Mixture
    items: list[AudioItem]
    shape: SegmentShape
    seed: int

    @property
    def batch_seconds(self) -> float:
        """Seconds of audio in a batch."""
        return self.config.batch_size * self.shape.num_samples / self.shape.sample_rate

    def describe(self) -> str:
        """How much there is."""
        return f"{len(self.mixture)} training segments, {len(self.items)} evaluation recordings"

    def batches(self, start: int, rows: Sequence[int]) -> Iterator[Batch]:
        """See `pipeline.batches`."""
        return pipeline.batches(self.config, self.mixture, self.shape, self.seed, start, rows)

    def failure(self, source: int, index: int) -> str:
        """Why a recording could not be read."""
        found = self.mixture.sources[source]
        try:
            recording = found[index]
            files.read_segment(recording.audio, 0.0, recording.duration_seconds, 16000)
        except ValueError as error:
            return str(error)
        return f"{found.name(index)}: could not be read"


def codec_of_run(config: TrainConfig) -> CodecConfig:
    """The codec of the newest checkpoint, of `init_from`, or of `model`."""
    model = getattr(config.objective, "codec", config.objective).model
    workdir = storage.to_path(config.run.workdir)
    steps = checkpoint.saved_steps(workdir)
    for step in reversed(steps):  # the newest may be broken, see `Checkpoints.restore_latest`
        folder = workdir / checkpoint.STEPS_FOLDER / checkpoint.step_name(step)
        try:
            return pretrained.load_config(folder)
        except (ValueError, OSError):
            if step == steps[0]:
                raise
    if not config.run.init_from:
        return load_codec_config(model or "tiny")
    codec = pretrained.load_config(config.run.init_from)
    if model:
        wanted = load_codec_config(model)
        blank = {"official_json": "", "layout": ""}
        if {**vars(codec), **blank} != {**vars(wanted), **blank}:
            raise ValueError(f"init_from {config.run.init_from} holds another model than {model}")
    return codec


def segment_samples(config: AudioDataConfig, codec: CodecConfig, longest_window: int = 1) -> int:
    """S of a batch: `segment_seconds` in whole frames.

    Raises:
      ValueError: There is none, or the longest window (samples) of a loss does not fit in.
    """
    frames = int(config.segment_seconds * codec.frame_rate + 1e-6)
    if frames * codec.hop_length < longest_window:
        least = -(-longest_window // codec.hop_length) / codec.frame_rate
        raise ValueError(
            f"segment_seconds must be at least {least:g}, whole frames in which the longest mel "
            f"window fits, got {config.segment_seconds}"
        )
    return frames * codec.hop_length


def find_data(
    config: TrainConfig,
    shape: SegmentShape,
    texts: TextSettings | None,
    mirror: storage.Mirror,
    say: Say,
) -> AudioData:
    """What to train on and to evaluate; creates the workdir once it is known that both exist.

    Without `train_data`, synthetic sounds are made in the workdir.

    Raises:
      ValueError: A source that does not exist, is broken, or has nothing to train on.
    """
    data = config.data
    seconds = shape.num_samples / shape.sample_rate
    mixture = sources.training_mixture(data.train_data, seconds) if data.train_data else None
    items = _evaluation_items(config, data.eval_data or data.train_data)
    if texts is not None and shape.tokenizer is not None:
        text.check_texts(texts, mixture, shape.tokenizer, seconds, say)
    workdir = storage.to_path(config.run.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    if mixture is None:
        made = _synthetic_manifest(workdir, mirror, shape.sample_rate)
        mixture = sources.training_mixture(made, seconds)
        if items is None:
            items = _evaluation_items(config, made)
    return AudioData(data, mixture, items, shape, config.run.seed)


def _evaluation_items(config: TrainConfig, source: str) -> list[AudioItem] | None:
    if not source:
        return None
    items = sources.evaluation_items(source, config.run.num_eval_clips)
    if config.data.eval_data and config.run.num_eval_clips and not items:
        raise ValueError(f"eval_data {source}: no files of the split 'test'")
    for item in items:
        if not item.path.is_file():
            raise ValueError(f"{item.path}: no such file")
    return items


def _synthetic_manifest(workdir: storage.Path, mirror: storage.Mirror, sample_rate: int) -> str:
    made = str(workdir / "synthetic" / synthetic.MANIFEST)
    if sharding.is_main_process() and not storage.to_path(made).exists():
        synthetic.write_dataset(mirror.local / "synthetic", sample_rate)
        mirror.send()
    sharding.barrier("synthetic data")
    return made


def score_audio(
    codec: Codec, clips: Sequence[sweep.Clip], progress: Progress
) -> tuple[sweep.Table, str]:
    """Distances of reconstructions over bitrates, as a table and as text."""
    with progress(len(clips), "clip") as done:
        table = sweep.evaluate(codec, clips, sweep.bitrates(codec.config), done)
    note = "mel_loss, stft: lower is better; stoi: higher"
    return table, f"{len(clips)} clips ({note}):\n{sweep.format_table(table)}"


def score_text(
    codec: Codec, language: Language, recordings: Sequence[np.ndarray], texts: Sequence[str]
) -> tuple[sweep.Table, str]:
    """Error rates of what is understood of recordings with texts, and some of it.

    Args:
      codec: The codec.
      language: The language model.
      recordings: Audio [C, S] or codes [q, T].
      texts: What is said in them; those without a text are left out.
    """
    pairs = [(x, said) for x, said in zip(recordings, texts, strict=True) if said]
    recordings = [x for x, _ in pairs]
    texts = [said for _, said in pairs]
    if not transcription.has_words(texts):
        return {}, ""
    numbers = sorted({1, codec.config.quantizer.num_quantizers})
    rates, understood = transcription.evaluate(codec, language, recordings, texts, numbers)
    table = {"text": rates}
    shown = list(zip(texts, understood, strict=True))[:: max(1, len(texts) // 5)][:5]
    lines = [f"  said {said!r}, understood {found!r}" for said, found in shown]
    title = f"{len(texts)} clips with texts (wer, cer: lower is better):"
    return table, "\n".join([title, sweep.format_table(table), "", *lines])


def split_params(params: dict[str, Any]) -> tuple[dict[str, Any], Any | None]:
    """The parameters of the codec, and of the language model, if there is one."""
    codec = {name: tree for name, tree in params.items() if name != text.FOLDER}
    return codec, params.get(text.FOLDER)


def segment_shape(
    num_samples: int, codec: CodecConfig, tokenizer: Tokenizer | None, texts: TextSettings
) -> SegmentShape:
    """What segments are cut into for a codec."""
    return SegmentShape(
        num_samples, codec.sample_rate, codec.num_channels, tokenizer, texts.max_text_tokens
    )
