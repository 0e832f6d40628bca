"""Artefacts that mel distances do not show: a comb at frame rates, missing pitch, false treble.

    python experiments/artefacts.py --checkpoint=runs/quickstart --data=corpus/manifest.jsonl

comb: long-term power of speech at multiples of a rate, 2 to 8 kHz, relative to the power between
them, in dB (mean and largest); 0 in recordings. pitch: in voiced frames of the recording, level at
multiples of its pitch relative to the level halfway between them, in dB; 24 in recordings, 0 in
noise. treble: power above 8 kHz relative to the power below, in dB, for recordings that end there.
pesq: wide band, if that package is installed.
"""

import argparse
import sys

import librosa
import numpy as np
import soxr

import moss_tok
from moss_tok.codec.config import PatchConfig
from moss_tok.data import sources
from moss_tok.errors import exit_code
from moss_tok.evaluation import sweep

try:
    import pesq
except ImportError:
    pesq = None

_MIN_SECONDS = 2.0  # shorter clips have no long-term spectrum


def comb(wavs: list[np.ndarray], sample_rate: int, rate: float) -> tuple[float, float]:
    """Mean and largest excess (dB) at multiples of `rate` (Hz) in the mean spectrum of [S]."""
    size = 1 << int(np.ceil(np.log2(0.6 * sample_rate)))
    window = np.hanning(size)
    power = np.zeros(size // 2 + 1)
    for wav in wavs:
        for start in range(0, wav.size - size + 1, size // 2):
            power += np.abs(np.fft.rfft(wav[start : start + size] * window)) ** 2
    frequencies = np.arange(power.size) * sample_rate / size
    excess = []
    for line in np.arange(np.ceil(2000 / rate) * rate, min(8000, 0.45 * sample_rate), rate):
        distance = np.abs(frequencies - line)
        near = distance <= min(4, rate / 8)
        far = (distance >= rate / 4) & (distance <= rate / 2)
        excess.append(10 * np.log10(power[near].mean() / power[far].mean()))
    return float(np.mean(excess)), float(np.max(excess))


def pitch_of(wav: np.ndarray, sample_rate: int) -> np.ndarray:
    """Pitch (Hz) of [S] every 512 samples; NaN in unvoiced frames."""
    pitch, voiced, confidence = librosa.pyin(
        wav.astype(float), fmin=70, fmax=400, sr=sample_rate, frame_length=2048, hop_length=512
    )
    return np.where(voiced & (confidence > 0.5), pitch, np.nan)


def pitch_contrast(pitches: list[np.ndarray], wavs: list[np.ndarray], sample_rate: int) -> float:
    """Mean level (dB) at harmonics 2 to 8 relative to halfway to the next, in voiced frames."""
    contrasts = []
    for pitch, wav in zip(pitches, wavs, strict=True):
        spectrum = np.abs(librosa.stft(wav, n_fft=4096, win_length=2048, hop_length=512))
        level = 20 * np.log10(spectrum + 1e-4)
        for t in np.flatnonzero(np.isfinite(pitch)):
            k = np.array([2, 3, 4, 5, 6, 8])
            bins = pitch[t] * 4096 / sample_rate
            on = level[np.round(k * bins).astype(int), t]
            off = level[np.round((k + 0.5) * bins).astype(int), t]
            contrasts.append(np.mean(on) - np.mean(off))
    return float(np.mean(contrasts))


def treble(references: list[np.ndarray], wavs: list[np.ndarray], sample_rate: int) -> float:
    """Mean level (dB) of [S] signals above 8 kHz over below, for references that have none."""
    levels = []
    for reference, wav in zip(references, wavs, strict=True):
        if _treble(reference, sample_rate) < -45:
            levels.append(_treble(wav, sample_rate))
    return float(np.mean(levels)) if levels else float("nan")


def _treble(wav: np.ndarray, sample_rate: int) -> float:
    power = (np.abs(librosa.stft(wav, n_fft=1024)) ** 2).sum(1)
    frequencies = np.arange(power.size) * sample_rate / 1024
    above = power[frequencies > 8300].sum()
    below = power[frequencies < 7800].sum()
    return 10 * np.log10((above + 1e-12) / (below + 1e-12))


def mean_pesq(references: list[np.ndarray], wavs: list[np.ndarray], sample_rate: int) -> float:
    """Mean wide-band PESQ of [S] signals."""
    scores = []
    for reference, wav in zip(references, wavs, strict=True):
        reference = soxr.resample(reference, sample_rate, 16000)
        wav = soxr.resample(wav, sample_rate, 16000)
        scores.append(pesq.pesq(16000, reference, wav, "wb"))
    return float(np.mean(scores))


def measure(codec: moss_tok.Codec, data: str, numbers: list[int]) -> dict[str, dict[str, float]]:
    """Figures by system, for the speech of the test split of `data`."""
    rate = codec.config.sample_rate
    items = [i for i in sources.evaluation_items(data, 10**6) if i.domain == "speech"]
    items = [i for i in items if i.duration_seconds >= _MIN_SECONDS]
    wavs: dict[str, list[np.ndarray]] = {}
    for clip in sweep.read_clips(items, codec):
        wavs.setdefault("recording", []).append(clip.wav.mean(0))
        for n, wav in sweep.reconstruct(codec, clip.wav, numbers).items():
            wavs.setdefault(sweep.system_name(n), []).append(wav.mean(0))
    pitches = [pitch_of(wav, rate) for wav in wavs["recording"]]
    rates = _patch_rates(codec)
    result = {}
    for system, signals in wavs.items():
        figures = {"pitch": pitch_contrast(pitches, signals, rate)}
        for r in rates:
            figures[f"comb {r:g} Hz"], figures[f"comb {r:g} Hz, largest"] = comb(signals, rate, r)
        figures["treble"] = treble(wavs["recording"], signals, rate)
        if pesq:
            figures["pesq"] = mean_pesq(wavs["recording"], signals, rate)
        result[system] = figures
    return result


def _patch_rates(codec: moss_tok.Codec) -> list[float]:
    rates = codec.config.stage_rates("encoder")
    modules = codec.config.encoder
    return [r for m, r in zip(modules, rates, strict=True) if isinstance(m, PatchConfig)]


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True)
    args = parser.parse_args()
    codec = moss_tok.load(args.checkpoint)
    result = measure(codec, args.data, [1, codec.config.quantizer.num_quantizers])
    columns = list(next(iter(result.values())))
    print("| | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for system, figures in result.items():
        cells = [f"{figures[c]:.{2 if c == 'pesq' else 1}f}" for c in columns]
        print(f"| {system} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    sys.exit(exit_code(main))
