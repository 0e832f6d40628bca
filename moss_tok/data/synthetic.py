"""A small set of synthetic sounds, so that a clean machine can train without any data.

Four kinds: harmonic tones (music), sweeps and noise bursts (sound), vowel-like formants (speech).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.signal

from moss_tok.audio import files
from moss_tok.json_files import format_json_lines

MANIFEST = "manifest.jsonl"
_SECONDS = 4.0
# Three formants in Hz each.
_VOWELS = (
    (730, 1090, 2440),
    (270, 2290, 3010),
    (300, 870, 2240),
    (530, 1840, 2480),
    (570, 840, 2410),
)


def write_dataset(folder: Path, sample_rate: int, num_clips: int = 240, seed: int = 0) -> Path:
    """Writes `num_clips` FLAC files and manifest.jsonl into `folder`; returns the manifest.

    A folder that has its manifest already is left alone. Every tenth clip is in the test split.
    """
    manifest = folder / MANIFEST
    if manifest.exists():
        return manifest
    folder.mkdir(parents=True, exist_ok=True)
    kinds = sorted(_KINDS)
    rows = []
    for i in range(num_clips):
        kind = kinds[i % len(kinds)]
        rng = np.random.default_rng([seed, i])
        make, domain = _KINDS[kind]
        name = f"{kind}-{i:04d}.flac"
        files.write(folder / name, _finish(make(rng, sample_rate), rng)[None], sample_rate)
        split = "test" if i // len(kinds) % 10 == 9 else "train"
        rows.append({"path": name, "split": split, "domain": domain, "duration_s": _SECONDS})
    files.write_text(manifest, format_json_lines(rows))
    return manifest


def _finish(wav: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    wav = wav + 1e-4 * rng.standard_normal(wav.size)  # no recording is free of noise
    peak = rng.uniform(0.1, 0.6)
    return (wav * peak / np.abs(wav).max()).astype(np.float32)


def _time(sample_rate: int) -> np.ndarray:
    return np.arange(int(_SECONDS * sample_rate)) / sample_rate


def _notes(rng: np.random.Generator, sample_rate: int) -> np.ndarray:
    """Overlapping notes with decaying harmonics."""
    t = _time(sample_rate)
    wav = np.zeros(t.size)
    for onset in np.sort(rng.uniform(0, _SECONDS - 0.3, rng.integers(4, 12))):
        f0 = 55 * 2 ** (rng.integers(0, 48) / 12)
        brightness = rng.uniform(0.8, 2.5)
        decay = rng.uniform(1, 6)
        seconds = np.maximum(t - onset, 0)  # since the onset
        attack = np.minimum(seconds / 0.01, 1)
        envelope = np.where(t >= onset, attack * np.exp(-decay * seconds), 0)
        num_harmonics = int(min(30, sample_rate / 2.2 / f0))
        for k in range(1, num_harmonics + 1):
            harmonic = np.sin(2 * np.pi * f0 * k * seconds)
            wav += envelope * harmonic / k**brightness
    return wav


def _sweep(rng: np.random.Generator, sample_rate: int) -> np.ndarray:
    """A sweep between two frequencies, up or down, with a slow tremolo."""
    logarithms = rng.uniform(np.log(80), np.log(sample_rate / 2.5), 2)
    first, last = np.sort(np.exp(logarithms))
    if rng.random() >= 0.5:
        first, last = last, first
    t = _time(sample_rate)
    wav = scipy.signal.chirp(t, first, _SECONDS, last, method="logarithmic")
    tremolo = 1 + 0.5 * np.sin(2 * np.pi * rng.uniform(0.5, 6) * t)
    return wav * tremolo


def _vowels(rng: np.random.Generator, sample_rate: int) -> np.ndarray:
    """A pulse train with vibrato through formant filters; syllables with pauses."""
    t = _time(sample_rate)
    f0 = rng.uniform(90, 250)
    f0 = f0 * (1 + 0.03 * np.sin(2 * np.pi * rng.uniform(3, 7) * t))  # vibrato
    f0 *= 1 + 0.15 * np.interp(t, np.linspace(0, _SECONDS, 8), rng.uniform(-1, 1, 8))
    phase = np.cumsum(f0) / sample_rate
    pulses = np.diff(np.floor(phase), prepend=0)
    source = pulses + 0.02 * rng.standard_normal(t.size)
    wav = np.zeros_like(t)
    edges = np.linspace(0, t.size, rng.integers(8, 16)).astype(int)
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        if rng.random() < 0.2:
            continue
        piece = source[start:end]
        scale = rng.uniform(0.9, 1.15)
        for formant in _VOWELS[rng.integers(len(_VOWELS))]:
            b, a = scipy.signal.iirpeak(formant * scale, 6, fs=sample_rate)
            piece = piece + 4 * scipy.signal.lfilter(b, a, piece)
        wav[start:end] = piece * scipy.signal.windows.tukey(end - start, 0.3)
    return wav


def _bursts(rng: np.random.Generator, sample_rate: int) -> np.ndarray:
    """Bursts of band-passed noise over a faint background."""
    t = _time(sample_rate)
    wav = 0.01 * rng.standard_normal(t.size)
    for onset in rng.uniform(0, _SECONDS - 0.2, rng.integers(2, 10)):
        low = np.exp(rng.uniform(np.log(60), np.log(sample_rate / 5)))
        band = [low, min(low * rng.uniform(1.3, 4), sample_rate / 2.1)]
        sos = scipy.signal.butter(2, band, "bandpass", fs=sample_rate, output="sos")
        noise = scipy.signal.sosfilt(sos, rng.standard_normal(t.size))
        seconds = np.maximum(t - onset, 0)  # since the onset
        decay = np.exp(-rng.uniform(2, 30) * seconds)
        wav += np.where(t >= onset, noise * decay, 0)
    return wav


_KINDS: dict[str, tuple[Callable[[np.random.Generator, int], np.ndarray], str]] = {
    "bursts": (_bursts, "sound"),
    "notes": (_notes, "music"),
    "sweep": (_sweep, "sound"),
    "vowels": (_vowels, "speech"),
}
