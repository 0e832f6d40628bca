"""Training data of audio segments, and the scores of a codec on held-out recordings."""

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
from moss_tok.data import pipeline, sources
from moss_tok.data.config import AudioDataConfig
from moss_tok.data.pipeline import SegmentShape
from moss_tok.evaluation import sweep, transcription
from moss_tok.language.generate import Language
from moss_tok.language.text import Tokenizer
from moss_tok.objectives import text
from moss_tok.objectives.config import TextSettings
from moss_tok.training.config import TrainConfig
from moss_tok.training.objective import Batch, Params, Progress, Say

_NUM_EXAMPLES = 5  # texts that are shown beside the error rates


@dataclasses.dataclass(frozen=True)
class AudioData:
    """Training segments of a mixture of recordings, and evaluation recordings."""

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
        """The amount of data, as text."""
        return f"{len(self.mixture)} training segments, {len(self.items)} evaluation recordings"

    def batches(self, start: int, rows: Sequence[int]) -> Iterator[Batch]:
        """See `pipeline.batches`."""
        return pipeline.batches(self.config, self.mixture, self.shape, self.seed, start, rows)

    def failure(self, source: int, index: int) -> str:
        """Why a recording could not be read."""
        recordings = self.mixture.sources[source]
        try:
            recording = recordings[index]
            files.read_segment(recording.audio, 0.0, recording.duration_seconds, 16000)
        except ValueError as error:
            return str(error)
        return f"{recordings.name(index)}: could not be read"


def codec_of_run(config: TrainConfig) -> CodecConfig:
    """The codec of the newest checkpoint in the workdir, else of `init_from`, else of `model`."""
    model = getattr(config.objective, "codec", config.objective).model
    codec = checkpoint.read_newest(storage.to_path(config.run.workdir), pretrained.load_config)
    if codec is not None:
        return codec
    if not config.run.init_from:
        return load_codec_config(model or "tiny")
    codec = pretrained.load_config(config.run.init_from)
    if model:
        ignored = {"official_json": "", "layout": ""}
        if vars(codec) | ignored != vars(load_codec_config(model)) | ignored:
            raise ValueError(f"init_from {config.run.init_from} holds another model than {model}")
    return codec


def segment_samples(config: AudioDataConfig, codec: CodecConfig, longest_window: int = 1) -> int:
    """S of a batch: samples of `segment_seconds`, rounded down to whole frames.

    Raises:
      ValueError: The segment has no whole frame, or is shorter than `longest_window` (samples).
    """
    num_frames = int(config.segment_seconds * codec.frame_rate + 1e-6)
    if num_frames * codec.hop_length < longest_window:
        minimum_seconds = codec.num_frames(longest_window) / codec.frame_rate
        raise ValueError(
            f"segment_seconds must be at least {minimum_seconds:g}, whole frames in which the "
            f"longest mel window fits, got {config.segment_seconds}"
        )
    return num_frames * codec.hop_length


def find_data(
    config: TrainConfig,
    shape: SegmentShape,
    texts: TextSettings | None,
    mirror: storage.Mirror,
    say: Say,
) -> AudioData:
    """Opens training and evaluation data; creates the workdir after checking that both exist.

    Without `train_data`, synthetic sounds are written to the workdir.

    Raises:
      ValueError: A source does not exist, is broken, or has nothing to train on.
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
        manifest = _synthetic_manifest(workdir, mirror, shape.sample_rate)
        mixture = sources.training_mixture(manifest, seconds)
        if items is None:
            items = _evaluation_items(config, manifest)
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
    from moss_tok.data import synthetic  # SciPy's filters take a second to import

    manifest = str(workdir / "synthetic" / synthetic.MANIFEST)
    if sharding.is_main_process() and not storage.to_path(manifest).exists():
        synthetic.write_dataset(mirror.local / "synthetic", sample_rate)
        mirror.send()
    sharding.barrier("synthetic data")
    return manifest


def score_audio(
    codec: Codec,
    clips: Sequence[sweep.Clip],
    progress: Progress,
) -> tuple[sweep.Table, str]:
    """Distances of reconstructions at several bitrates, as a table and as text."""
    with progress(len(clips), "clip") as done:
        table = sweep.evaluate(codec, clips, sweep.bitrates(codec.config), done)
    note = "mel_loss, stft: lower is better; stoi: higher"
    return table, f"{len(clips)} clips ({note}):\n{sweep.format_table(table)}"


def score_text(
    codec: Codec,
    language: Language,
    recordings: Sequence[np.ndarray],
    texts: Sequence[str],
) -> tuple[sweep.Table, str]:
    """Error rates of recognised texts, as a table and as text with some examples.

    Args:
      codec: The codec.
      language: The language model.
      recordings: Audio [C, S] or codes [q, T].
      texts: Their reference texts; recordings with an empty one are skipped.
    """
    scored = []
    references = []
    for recording, reference in zip(recordings, texts, strict=True):
        if reference:
            scored.append(recording)
            references.append(reference)
    if not transcription.has_words(references):
        return {}, ""
    numbers = sorted({1, codec.config.quantizer.num_quantizers})
    rates, recognised = transcription.evaluate(codec, language, scored, references, numbers)
    table = {"text": rates}
    lines = [
        f"{len(references)} clips with texts (wer, cer: lower is better):",
        sweep.format_table(table),
        "",
    ]
    every = max(1, len(references) // _NUM_EXAMPLES)
    for index in range(0, len(references), every)[:_NUM_EXAMPLES]:
        lines.append(f"  said {references[index]!r}, recognised {recognised[index]!r}")
    return table, "\n".join(lines)


def score_clips_text(
    codec: Codec,
    language: Language,
    clips: Sequence[sweep.Clip],
) -> tuple[sweep.Table, str]:
    """`score_text` of clips."""
    wavs = [clip.wav for clip in clips]
    texts = [clip.text for clip in clips]
    return score_text(codec, language, wavs, texts)


def split_params(params: Params) -> tuple[Params, Any | None]:
    """The parameters of the codec, and of the language model, if there is one."""
    codec = dict(params)
    language = codec.pop(text.FOLDER, None)
    return codec, language


def segment_shape(
    num_samples: int,
    codec: CodecConfig,
    tokenizer: Tokenizer | None,
    texts: TextSettings,
) -> SegmentShape:
    """Shape of the segments that a codec is trained on."""
    return SegmentShape(
        num_samples=num_samples,
        sample_rate=codec.sample_rate,
        num_channels=codec.num_channels,
        tokenizer=tokenizer,
        max_text_tokens=texts.max_text_tokens,
    )
