"""Quality of a codec over bitrates and domains, beside two baselines anybody can beat."""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from moss_tok.audio import files
from moss_tok.audio.manifest import TASKS, AudioItem
from moss_tok.codec.config import CodecConfig
from moss_tok.codec.inference import Codec, decode_one, encode
from moss_tok.data import sources
from moss_tok.evaluation import metrics

_MAX_SECONDS = 20.0
_MIN_STOI_SECONDS = 1.0  # STOI looks at 0.4 s at a time; of a single short word it says nothing


@dataclasses.dataclass(frozen=True)
class Clip:
    """A reference recording: [C, S] float32, its domain, and what is said in it, if known."""

    wav: np.ndarray = dataclasses.field(repr=False)
    domain: str
    text: str = ""


# Metric averages: {domain: {system: {metric: mean}}}.
Table = dict[str, dict[str, dict[str, float]]]


def read_clips(
    items: Sequence[AudioItem], codec: Codec, say: Callable[[str], Any] = print
) -> list[Clip]:
    """Reads at most 20 seconds of each item as the codec wants it; `say` is told of bad ones.

    Raises:
      ValueError: None can be read.
    """
    rate, channels = codec.config.sample_rate, codec.config.num_channels
    clips = []
    for item in items:
        try:
            recording = sources.open_item(item)
            wav = files.read_segment(recording.audio, 0.0, _MAX_SECONDS, rate)
        except ValueError as error:
            say(f"warning: {error}; not evaluated")
        else:
            whole = recording.task == TASKS[0] and recording.duration_seconds <= _MAX_SECONDS
            text = recording.text if whole else ""
            clips.append(Clip(files.to_channels(wav, channels), recording.domain, text))
    if not clips:
        raise ValueError("none of the evaluation recordings can be read")
    return clips


def bitrates(config: CodecConfig) -> list[int]:
    """Numbers of quantizers to evaluate: powers of two, and all."""
    most = config.quantizer.num_quantizers
    return [n for n in (1, 2, 4, 8, 16, 32) if n < most] + [most]


def samples(codec: Codec, clips: Sequence[Clip]) -> dict[str, dict[str, np.ndarray]]:
    """The longest clip of each domain, and its reconstructions at up to three bitrates."""
    longest: dict[str, Clip] = {}
    for clip in clips:
        if clip.domain not in longest or clip.wav.size > longest[clip.domain].wav.size:
            longest[clip.domain] = clip
    numbers = bitrates(codec.config)
    chosen = sorted({numbers[0], numbers[len(numbers) // 2], numbers[-1]}, reverse=True)
    found = {}
    for domain, clip in sorted(longest.items()):
        wavs = reconstruct(codec, clip.wav, chosen)
        found[domain] = {"input": clip.wav} | {system_name(n): wavs[n] for n in chosen}
    return found


def system_name(num_quantizers: int) -> str:
    """What tables call the codec with that many quantizers."""
    return f"{num_quantizers} quantizer{'s' if num_quantizers > 1 else ''}"


def reconstruct(codec: Codec, wav: np.ndarray, numbers: Sequence[int]) -> dict[int, np.ndarray]:
    """Reconstructions [C, S] of one clip [C, S] from the first n quantizers, for each n."""
    size = wav.shape[-1]
    doublings = max(0, math.ceil(math.log2(size / codec.config.sample_rate)))
    padded = np.pad(wav, ((0, 0), (0, codec.config.sample_rate * 2**doublings - size)))
    codes = np.asarray(encode(codec, padded[None], np.array([size])).codes)[0]
    # What follows the clip does not matter: the decoder is causal.
    return {n: np.clip(decode_one(codec, codes, n)[:, :size], -1, 1) for n in numbers}


def evaluate(
    codec: Codec,
    clips: Sequence[Clip],
    numbers: Sequence[int],
    progress: Callable[[], Any] = lambda: None,
) -> Table:
    """Scores silence, spectrum-shaped noise, and the codec with 1 .. Q quantizers.

    STOI is the mean over speech of at least a second.

    Args:
      codec: The codec.
      clips: References.
      numbers: Of quantizers; each is a system called "n quantizers".
      progress: Called after each clip.
    """
    rate = codec.config.sample_rate
    found = collections.defaultdict(list)
    with ThreadPoolExecutor(2) as pool:  # numpy's transforms release the interpreter
        futures = []
        for clip in clips:
            wavs = {"silence": np.zeros_like(clip.wav), "shaped noise": shaped_noise(clip.wav)}
            for n, wav in reconstruct(codec, clip.wav, numbers).items():
                wavs[system_name(n)] = wav
            for system, wav in wavs.items():
                future = pool.submit(_score, clip, wav, rate)
                futures.append((clip.domain, system, future))
            progress()
        for domain, system, future in futures:
            found[domain, system].append(future.result())
    table: Table = {}
    for (domain, system), rows in found.items():
        names = sorted({m for row in rows for m in row})
        means = {m: float(np.mean([r[m] for r in rows if m in r])) for m in names}
        table.setdefault(domain, {})[system] = means
    return table


def _score(clip: Clip, wav: np.ndarray, rate: int) -> dict[str, float]:
    long_enough = clip.wav.shape[-1] >= _MIN_STOI_SECONDS * rate
    names = ("mel_loss", "stft")
    if clip.domain == "speech" and long_enough:
        names += ("stoi",)
    return metrics.compute_each(clip.wav, wav, rate, names)[0]


def shaped_noise(wav: np.ndarray, seed: int = 0) -> np.ndarray:
    """Noise [C, S] with the mean spectrum of `wav` [C, S]: its phases are drawn at random."""
    spectrum = np.abs(np.fft.rfft(wav))
    phases = np.random.default_rng(seed).uniform(0, 2 * np.pi, spectrum.shape)
    noise = np.fft.irfft(spectrum * np.exp(1j * phases), wav.shape[-1])
    return np.clip(noise, -1, 1).astype(np.float32)


def format_table(table: Table) -> str:
    """The table as Markdown, a row per system."""
    columns = [(d, m) for d in sorted(table) for m in next(iter(table[d].values()))]
    lines = [
        "| | " + " | ".join(f"{d} {m}" for d, m in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for system in next(iter(table.values())):
        cells = [f"{table[d][system][m]:.3f}" for d, m in columns]
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
