"""Settings of the data that a run trains on: segments of audio, or codes."""

import dataclasses
import re

from moss_tok import settings, storage
from moss_tok.settings import count, setting


@dataclasses.dataclass(frozen=True)
class AudioDataConfig:
    """Segments of recordings, and how they are changed at random."""

    train_data: str = setting(
        "",
        "folders, manifests or *.array_record of audio, or folders of codes that moss-tok "
        "tokenize wrote, SOURCE[:WEIGHT],...; empty: synthetic sounds",
    )
    eval_data: str = setting(
        "", "the same for evaluation (its test split); empty: train_data's", free=True
    )
    batch_size: int = count(8, "segments per step", at_least=1)
    segment_seconds: float = setting(
        0.96, "length of a segment, rounded down to whole frames", above=0, at_most=600
    )
    silence_db: float = setting(
        -60.0, "segments whose level (dB re full scale, RMS) is below are drawn again", at_most=0
    )
    augment_gain_db: float = setting(
        0.0, "random gain of up to that many dB up or down", at_least=0, at_most=60
    )
    augment_loudness_db: tuple[float, float] | None = setting(
        None,
        "LOW:HIGH: segments are set to a random level (dB re full scale, RMS) in between",
        kind=settings.decibel_range(-100, 0),
    )
    augment_equalizer_db: float = setting(
        0.0, "random gain of up to that many dB up or down by octave", at_least=0, at_most=60
    )
    augment_noise_db: tuple[float, float] | None = setting(
        None,
        "LOW:HIGH: random noise, white to pink, at a random signal-to-noise ratio in between",
        kind=settings.decibel_range(-20, 100),
    )
    augment_speed: float = setting(
        0.0,
        "recordings are played up to this share faster or slower, which moves pitch, too",
        at_least=0,
        at_most=0.5,
    )
    augment_shift_seconds: float = setting(
        0.0,
        "up to so much silence before what leaves room for it",
        at_least=0,
        at_most=600,
    )
    max_failed_share: float = setting(
        0.1, "stop if more than this share of reads fails", at_least=0, at_most=1, free=True
    )
    num_workers: int = count(0, "processes that read data; 0: threads", free=True)

    def __post_init__(self):
        settings.check(self)


@dataclasses.dataclass(frozen=True)
class CodeDataConfig:
    """Codes that `moss-tok tokenize` wrote; batches are packed by length."""

    train_data: str = setting("", "folders of codes, SOURCE[:WEIGHT],...")
    eval_data: str = setting(
        "", "the same for evaluation (its test split); empty: train_data's", free=True
    )
    batch_size: int = count(8, "recordings per step", at_least=1)
    segment_seconds: float = setting(
        0.96, "longest recording, rounded down to whole frames", above=0, at_most=600
    )
    max_failed_share: float = setting(
        0.1, "stop if more than this share of reads fails", at_least=0, at_most=1, free=True
    )

    def __post_init__(self):
        settings.check(self)


PLAN = "plan.json"  # what a folder of codes has
_WEIGHT = re.compile(r":[^:/]*$")


def data_settings(train_data: str) -> type:
    """The settings class for sources SOURCE[:WEIGHT],...: of codes if they are such folders.

    Raises:
      ValueError: Codes and audio in one mixture.
    """
    kinds = {}
    for part in train_data.split(","):
        name = part.strip()
        without_weight = _WEIGHT.sub("", name)
        kinds[name] = any(_is_code_folder(x) for x in (name, without_weight) if x)
    if len(set(kinds.values())) > 1:
        codes = next(name for name, is_codes in kinds.items() if is_codes)
        audio = next(name for name, is_codes in kinds.items() if not is_codes)
        raise ValueError(f"train_data mixes codes ({codes}) and audio ({audio}); give one kind")
    return CodeDataConfig if any(kinds.values()) else AudioDataConfig


def _is_code_folder(name: str) -> bool:
    return (storage.to_path(name) / PLAN).is_file()
