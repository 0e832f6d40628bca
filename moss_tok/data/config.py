"""Settings of the training data: segments of audio, or codes."""

import dataclasses
import re

from moss_tok import settings, storage
from moss_tok.settings import count, setting


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The settings that training on audio and training on codes share."""

    train_data: str = setting(
        "",
        "training data, SOURCE[:WEIGHT],...: folders, manifests or *.array_record shards of audio, "
        "folders of codes from moss-tok tokenize, or JSON lines with audio_codes and text; without "
        "weights, sources count by their size; empty: synthetic sounds",
    )
    eval_data: str = setting(
        "",
        "sources, as in train_data, whose test split is evaluated; empty: the sources of "
        "train_data",
        free=True,
    )
    batch_size: int = count(
        8, "number of segments (of audio) or recordings (of codes) per step", at_least=1
    )
    segment_seconds: float = setting(
        0.96,
        "length of a segment in seconds, or with codes the longest recording to train on; rounded "
        "down to whole code frames",
        above=0,
        at_most=600,
    )
    max_failed_share: float = setting(
        0.1,
        "the run ends with an error if more than this share of reads fails",
        at_least=0,
        at_most=1,
        free=True,
    )

    def __post_init__(self):
        settings.check(self)


@dataclasses.dataclass(frozen=True)
class AudioDataConfig(DataConfig):
    """Segments of recordings, and their random augmentation."""

    silence_db: float = setting(
        -60.0,
        "segments with an RMS level (dB re full scale) below this are replaced by other segments",
        at_most=0,
    )
    augment_gain_db: float = setting(
        0.0,
        "maximum random gain in dB, up or down, of each segment; 0: off",
        at_least=0,
        at_most=60,
    )
    augment_loudness_db: tuple[float, float] | None = setting(
        None,
        "LOW:HIGH: each segment is scaled to a random RMS level (dB re full scale) in this range; "
        "empty: off",
        kind=settings.decibel_range(-100, 0),
    )
    augment_equalizer_db: float = setting(
        0.0,
        "maximum random gain in dB, up or down, of each octave of a segment; 0: off",
        at_least=0,
        at_most=60,
    )
    augment_noise_db: tuple[float, float] | None = setting(
        None,
        "LOW:HIGH: adds random noise, white to pink, at a random signal-to-noise ratio (dB) in "
        "this range; empty: off",
        kind=settings.decibel_range(-20, 100),
    )
    augment_speed: float = setting(
        0.0,
        "maximum random change of speed, as a share: 0.1 plays segments up to 10 % faster or "
        "slower, which also shifts their pitch; 0: off",
        at_least=0,
        at_most=0.5,
    )
    augment_shift_seconds: float = setting(
        0.0,
        "maximum random silence, in seconds, before recordings shorter than a segment; 0: off",
        at_least=0,
        at_most=600,
    )
    num_workers: int = count(
        0, "number of processes that read data; 0: threads of the training process", free=True
    )


@dataclasses.dataclass(frozen=True)
class CodeDataConfig(DataConfig):
    """Codes that `moss-tok tokenize` wrote, or JSON lines; batches are packed by length."""


PLAN = "plan.json"  # identifies a folder of codes
LINES_SUFFIX = ".jsonl"
_HEAD_BYTES = 2**20  # read from a JSONL file; the keys of its first line are in them
_WEIGHT = re.compile(r":[^:/]*$")


def data_settings(train_data: str) -> type:
    """The data settings class for sources SOURCE[:WEIGHT],...: of codes or of audio.

    Raises:
      ValueError: The mixture has both codes and audio.
    """
    codes = []
    audio = []
    for part in train_data.split(","):
        name = part.strip()
        without_weight = _WEIGHT.sub("", name)
        if _holds_codes(name) or _holds_codes(without_weight):
            codes.append(name)
        else:
            audio.append(name)
    if codes and audio:
        raise ValueError(
            f"train_data mixes codes ({codes[0]}) and audio ({audio[0]}); give one kind"
        )
    return CodeDataConfig if codes else AudioDataConfig


def _holds_codes(name: str) -> bool:
    """Whether a source is a folder of `moss-tok tokenize`, or JSON lines with audio_codes."""
    if not name:
        return False
    path = storage.to_path(name)
    if path.suffix != LINES_SUFFIX or not path.is_file():
        return (path / PLAN).is_file()
    with path.open("rb") as file:
        return b'audio_codes"' in file.read(_HEAD_BYTES)
