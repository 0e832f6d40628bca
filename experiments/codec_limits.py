"""What limits a codec: its bits, or the length of the past that it uses?

    python experiments/codec_limits.py --data=data/speech.jsonl

Of each recording of the split "test" that lasts at least 7 s, the first 7 s are used. The first
table has distances of the last of these seconds, if the codec gets only so much of what comes
before. The second one has distances of all 7 s with the first quantizers and without quantization,
and the share of the variance of the latents that the quantizers leave. The third one says how much
louder or quieter the reconstruction from all quantizers is than the recording, by octave.
"""

import sys
from collections.abc import Sequence

import jax
import numpy as np

import moss_tok
from moss_tok.cli.commands import Parser
from moss_tok.codec.inference import Codec
from moss_tok.codec.model import CodecModel
from moss_tok.data import sources
from moss_tok.errors import exit_code
from moss_tok.evaluation import metrics, sweep

SECONDS = 7
PASTS = (0.0, 0.5, 1.0, 2.0, 4.0, 6.0)  # s
METRICS = ("mel_loss", "stft", "sisdr")
MAX_RECORDINGS = 30
OCTAVES = (125, 250, 500, 1000, 2000, 4000, 8000)  # edges, Hz


def read_recordings(codec: Codec, data: str) -> list[np.ndarray]:
    """The first seconds [C, S] of the long recordings; ValueError if there is none."""
    num_samples = SECONDS * codec.config.sample_rate
    wavs = []
    for clip in sweep.read_clips(sources.evaluation_items(data, 10**6), codec):
        if clip.wav.shape[1] >= num_samples and len(wavs) < MAX_RECORDINGS:
            wavs.append(clip.wav[:, :num_samples])
    if not wavs:
        raise ValueError(f"{data}: no recording of the split 'test' lasts {SECONDS} s")
    return wavs


def mean_distances(pairs: Sequence[tuple[np.ndarray, np.ndarray]], sample_rate: int) -> str:
    """Means of the metrics over pairs of an original and a reconstruction, as cells of a table."""
    rows = []
    for wav, wav_hat in pairs:
        values, _ = metrics.compute_each(wav, wav_hat, sample_rate, METRICS)
        rows.append([values[name] for name in METRICS])
    return " | ".join(f"{value:.3f}" for value in np.mean(rows, axis=0))


def unquantized_latents(model: CodecModel, wav: jax.Array) -> jax.Array:
    """Latents [1, T, D] of [1, C, S] that skip the quantizers, but not the projections."""
    x = model.latents(wav)
    config = model.config.quantizer
    if config.input_dim != config.rvq_dim:
        x = model.quantizer.input_projection(x)
    if config.output_dim != config.rvq_dim:
        x = model.quantizer.output_projection(x)
    return x


def print_pasts(codec: Codec, wavs: Sequence[np.ndarray]) -> None:
    """Prints the first table."""
    rate = codec.config.sample_rate
    print(f"| past, s | {' | '.join(METRICS)} |\n|---|---|---|---|")
    for past in PASTS:
        # A multiple of a frame, so that the frames are those of the whole recording.
        start = round((SECONDS - 1 - past) * codec.config.frame_rate) * codec.config.hop_length
        pairs = []
        for wav in wavs:
            codes = moss_tok.encode(codec, wav[None, :, start:]).codes
            wav_hat = np.asarray(moss_tok.decode(codec, codes).wav)[0, :, : wav.shape[1] - start]
            pairs.append((wav[:, -rate:], wav_hat[:, -rate:]))
        print(f"| {past:g} | {mean_distances(pairs, rate)} |", flush=True)


def print_bits(codec: Codec, wavs: Sequence[np.ndarray]) -> None:
    """Prints the second table."""
    limit = codec.config.quantizer.num_quantizers
    numbers = [number for number in (1, 2, 4, 8, 16, 32) if number <= limit]
    pairs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    shares: dict[str, list[float]] = {}
    to_latents = jax.jit(lambda codec, wav: codec.apply(wav, method=unquantized_latents))
    to_audio = jax.jit(lambda codec, latents: codec.apply(latents, method="audio"))
    for wav in wavs:
        exact = to_latents(codec, wav[None])
        codes = moss_tok.encode(codec, wav[None]).codes
        variants = {"none": exact}
        for number in numbers:
            variants[str(number)] = codec.apply(codes[:, :number], method="dequantize")
        for name, latents in variants.items():
            wav_hat = np.asarray(to_audio(codec, latents))[0, :, : wav.shape[1]]
            pairs.setdefault(name, []).append((wav, wav_hat))
            error = np.var(exact - latents, axis=1).sum() / np.var(exact, axis=1).sum()
            shares.setdefault(name, []).append(error)
    print(f"| quantizers | {' | '.join(METRICS)} | variance left |\n|---|---|---|---|---|")
    for name in [*map(str, numbers), "none"]:
        distances = mean_distances(pairs[name], codec.config.sample_rate)
        print(f"| {name} | {distances} | {np.mean(shares[name]):.3f} |")


def octave_levels(wav: np.ndarray, sample_rate: int) -> np.ndarray:
    """The level [octaves] of audio [C, S] between two `OCTAVES`, dB."""
    power = np.square(np.abs(np.fft.rfft(wav))).mean(axis=0)
    frequencies = np.fft.rfftfreq(wav.shape[1], 1 / sample_rate)
    sums, _ = np.histogram(frequencies, OCTAVES, weights=power)
    return 10 * np.log10(np.maximum(sums, 1e-10))


def print_levels(codec: Codec, wavs: Sequence[np.ndarray]) -> None:
    """Prints the third table."""
    rate = codec.config.sample_rate
    differences = []
    for wav in wavs:
        codes = moss_tok.encode(codec, wav[None]).codes
        wav_hat = np.asarray(moss_tok.decode(codec, codes).wav)[0, :, : wav.shape[1]]
        differences.append(octave_levels(wav_hat, rate) - octave_levels(wav, rate))
    print("| octave, Hz | level, dB |\n|---|---|")
    for low, high, level in zip(OCTAVES, OCTAVES[1:], np.mean(differences, axis=0), strict=False):
        print(f"| {low} to {high} | {level:+.1f} |")


def print_tables(codec: Codec, data: str) -> None:
    """Prints the three tables."""
    wavs = read_recordings(codec, data)
    print(f"{len(wavs)} recordings\n")
    print_pasts(codec, wavs)
    print()
    print_bits(codec, wavs)
    print()
    print_levels(codec, wavs)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures a codec; returns 2 after a user error."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="the flag train_data of train.py")
    parser.add_argument("--checkpoint", help="default: the codec in the package")
    args = parser.parse_args(argv)
    return exit_code(lambda: print_tables(moss_tok.load(args.checkpoint), args.data))


if __name__ == "__main__":
    sys.exit(main())
