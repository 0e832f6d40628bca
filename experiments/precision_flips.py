"""Changes of codes and audio quality when tokenization is faster and less precise.

    python experiments/precision_flips.py --checkpoint=runs/quickstart --data=corpus/manifest.jsonl

Encodes the test clips at each `--precision` of `moss-tok tokenize` and compares with `highest`:
the share of codes that differ, of the first quantizer, the first four and all, and the mel_loss
and STOI (speech) of the decoded audio. A CPU computes float32 products exactly at any precision, so
`high` is emulated there as on a TPU: the three largest of the four products of the bfloat16 halves
of both factors.
"""

import argparse
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import moss_tok
from moss_tok.codec.inference import Codec, decode_one, encode_one
from moss_tok.data import sources
from moss_tok.errors import exit_code
from moss_tok.evaluation import metrics, sweep
from moss_tok.nn.compute import PRECISIONS

_EINSUM = jnp.einsum


def einsum_of_halves(spec: str, x: jax.Array, y: jax.Array, precision=None, **kwargs) -> jax.Array:
    """`jnp.einsum` that at "high" computes a float32 product by three bfloat16 products."""
    if precision != "high":
        return _EINSUM(spec, x, y, precision=precision, **kwargs)
    x_high, x_low = _halves(x)
    y_high, y_low = _halves(y)
    pairs = (x_high, y_low), (x_low, y_high), (x_high, y_high)
    return sum(_EINSUM(spec, a, b, precision="highest", **kwargs) for a, b in pairs)


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return high, jax.lax.reduce_precision(x - high, exponent_bits=8, mantissa_bits=7)


def encode_all(codec: Codec, clips: list[sweep.Clip], precision: str) -> list[np.ndarray]:
    """Codes [Q, T] of each clip."""
    codec = Codec(codec.params, codec.config, PRECISIONS[precision])
    with mock.patch.object(jnp, "einsum", einsum_of_halves if _emulated() else _EINSUM):
        return [encode_one(codec, clip.wav) for clip in clips]


def _emulated() -> bool:
    return jax.default_backend() == "cpu"


def quality(codec: Codec, clips: list[sweep.Clip], codes: list[np.ndarray]) -> tuple[float, float]:
    """Mean mel_loss, and mean STOI of speech of a second or more."""
    rate = codec.config.sample_rate
    distances = []
    stois = []
    for clip, x in zip(clips, codes, strict=True):
        wav = decode_one(codec, x)[:, : clip.wav.shape[1]]
        is_speech = clip.domain == "speech" and clip.wav.shape[1] >= rate
        names = ("mel_loss", "stoi") if is_speech else ("mel_loss",)
        scores = metrics.compute(clip.wav, wav, rate, names)
        distances.append(scores["mel_loss"])
        if is_speech:
            stois.append(scores["stoi"])
    return float(np.mean(distances)), float(np.mean(stois))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True, help="manifest; its test split is used")
    args = parser.parse_args()
    codec = moss_tok.load(args.checkpoint)
    clips = sweep.read_clips(sources.evaluation_items(args.data, 10**6), codec)
    exact = encode_all(codec, clips, "highest")
    print(f"{len(clips)} clips, {sum(x.shape[1] for x in exact)} frames")
    print("| precision | 1st quantizer | first 4 | all | mel_loss | stoi |")
    print("|---" * 6 + "|")
    for precision in PRECISIONS:
        codes = encode_all(codec, clips, precision)
        differ = np.concatenate([a != b for a, b in zip(exact, codes, strict=True)], axis=1)
        flips = " | ".join(f"{differ[:n].mean():.3%}" for n in (1, 4, None))
        mel, stoi = quality(codec, clips, codes)
        print(f"| {precision} | {flips} | {mel:.4f} | {stoi:.4f} |")


if __name__ == "__main__":
    sys.exit(exit_code(main))
