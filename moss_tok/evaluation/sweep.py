"""Quality of a codec over bitrates and domains, beside two trivial baselines."""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from moss_tok import summary
from moss_tok.audio import files
from moss_tok.audio.manifest import TASKS, AudioItem
from moss_tok.codec.config import CodecConfig
from moss_tok.codec.inference import Codec, decode_one, encode
from moss_tok.data import sources
from moss_tok.evaluation import metrics

_MAX_SECONDS = 20.0
_MIN_STOI_SECONDS = 1.0  # STOI uses windows of 0.4 s: on a single short word it means nothing


@dataclasses.dataclass(frozen=True)
class Clip:
    """A reference recording: [C, S] float32, its domain, and its transcript if known."""

    wav: np.ndarray = dataclasses.field(repr=False)
    domain: str
    text: str = ""


# Metric averages: {domain: {system: {metric: mean}}}.
Table = dict[str, dict[str, dict[str, float]]]


def read_clips(
    items: Sequence[AudioItem],
    codec: Codec,
    say: Callable[[str], Any] = print,
) -> list[Clip]:
    """Reads at most 20 seconds of each item, at the codec's sample rate and channels.

    Args:
      items: Recordings.
      codec: The codec.
      say: Receives a warning for each recording that cannot be read.

    Raises:
      ValueError: No recording can be read.
    """
    config = codec.config
    clips = []
    for item in items:
        try:
            recording = sources.open_item(item)
            wav = files.read_segment(recording.audio, 0.0, _MAX_SECONDS, config.sample_rate)
        except ValueError as error:
            say(f"warning: {error}; not evaluated")
            continue
        # The transcript of a longer recording does not fit its first 20 seconds.
        is_whole = recording.duration_seconds <= _MAX_SECONDS
        has_transcript = recording.task == TASKS[0] and is_whole
        text = recording.text if has_transcript else ""
        wav = files.to_channels(wav, config.num_channels)
        clips.append(Clip(wav, recording.domain, text))
    if not clips:
        raise ValueError("none of the evaluation recordings can be read")
    return clips


def bitrates(config: CodecConfig) -> list[int]:
    """Numbers of quantizers to evaluate: powers of two, and all quantizers."""
    numbers = []
    number = 1
    while number < min(config.quantizer.num_quantizers, 64):
        numbers.append(number)
        number *= 2
    return [*numbers, config.quantizer.num_quantizers]


def samples(codec: Codec, clips: Sequence[Clip]) -> dict[str, dict[str, np.ndarray]]:
    """The longest clip of each domain, and its reconstructions at up to three bitrates."""
    longest: dict[str, Clip] = {}
    for clip in clips:
        known = longest.get(clip.domain)
        if known is None or clip.wav.size > known.wav.size:
            longest[clip.domain] = clip
    numbers = bitrates(codec.config)
    middle = numbers[len(numbers) // 2]
    chosen = sorted({numbers[0], middle, numbers[-1]}, reverse=True)
    wavs = {}
    for domain, clip in sorted(longest.items()):
        wavs[domain] = {"input": clip.wav}
        for number, wav in reconstruct(codec, clip.wav, chosen).items():
            wavs[domain][system_name(number)] = wav
    return wavs


def system_name(num_quantizers: int) -> str:
    """Name in tables of the codec with this number of quantizers, such as "2 quantizers"."""
    return summary.count(num_quantizers, "quantizer")


def reconstruct(codec: Codec, wav: np.ndarray, numbers: Sequence[int]) -> dict[int, np.ndarray]:
    """Reconstructions [C, S] of one clip [C, S] from the first n quantizers, for each n."""
    size = wav.shape[-1]
    # Padding to 1, 2, 4, ... seconds saves compiles. It changes nothing: the decoder is causal.
    seconds = size / codec.config.sample_rate
    doublings = max(0, math.ceil(math.log2(seconds)))
    padded_size = codec.config.sample_rate * 2**doublings
    padded = np.pad(wav, ((0, 0), (0, padded_size - size)))
    encoded = encode(codec, padded[None], np.array([size]))
    codes = np.asarray(encoded.codes)[0]
    reconstructions = {}
    for number in numbers:
        wav_hat = decode_one(codec, codes, number)[:, :size]
        reconstructions[number] = np.clip(wav_hat, -1, 1)
    return reconstructions


def evaluate(
    codec: Codec,
    clips: Sequence[Clip],
    numbers: Sequence[int],
    progress: Callable[[], Any] = lambda: None,
) -> Table:
    """Scores silence, spectrum-shaped noise, and the codec at several numbers of quantizers.

    STOI is the mean over speech of at least a second.

    Args:
      codec: The codec.
      clips: References.
      numbers: Numbers of quantizers; each is a system called "n quantizers".
      progress: Called after each clip.
    """
    sample_rate = codec.config.sample_rate
    futures = []
    scores = collections.defaultdict(list)
    with ThreadPoolExecutor(2) as pool:  # NumPy's transforms release the interpreter lock
        for clip in clips:
            wavs = {
                "silence": np.zeros_like(clip.wav),
                "shaped noise": shaped_noise(clip.wav),
            }
            for number, wav in reconstruct(codec, clip.wav, numbers).items():
                wavs[system_name(number)] = wav
            for system, wav in wavs.items():
                future = pool.submit(_score, clip, wav, sample_rate)
                futures.append((clip.domain, system, future))
            progress()
        for domain, system, future in futures:
            scores[domain, system].append(future.result())
    table: Table = {}
    for (domain, system), rows in scores.items():
        table.setdefault(domain, {})[system] = _means(rows)
    return table


def _means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means of the metrics over the clips for which they are defined."""
    values = collections.defaultdict(list)
    for row in rows:
        for name, value in row.items():
            values[name].append(value)
    return {name: float(np.mean(values[name])) for name in sorted(values)}


def _score(clip: Clip, wav: np.ndarray, rate: int) -> dict[str, float]:
    names = ("mel_loss", "stft")
    long_enough = clip.wav.shape[-1] >= _MIN_STOI_SECONDS * rate
    if clip.domain == "speech" and long_enough:
        names += ("stoi",)
    values, _ = metrics.compute_each(clip.wav, wav, rate, names)
    return values


def shaped_noise(wav: np.ndarray, seed: int = 0) -> np.ndarray:
    """Noise [C, S] with the magnitude spectrum of `wav` [C, S] and random phases."""
    spectrum = np.abs(np.fft.rfft(wav))
    generator = np.random.default_rng(seed)
    phases = generator.uniform(0, 2 * np.pi, spectrum.shape)
    noise = np.fft.irfft(spectrum * np.exp(1j * phases), wav.shape[-1])
    return np.clip(noise, -1, 1).astype(np.float32)


def format_table(table: Table) -> str:
    """The table as Markdown, a row per system."""
    columns = []
    heads = []
    for domain in sorted(table):
        first_means = next(iter(table[domain].values()))
        for metric in first_means:
            columns.append((domain, metric))
            heads.append(f"{domain} {metric}")
    lines = [
        "| | " + " | ".join(heads) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for system in next(iter(table.values())):
        cells = [f"{table[domain][system][metric]:.3f}" for domain, metric in columns]
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
