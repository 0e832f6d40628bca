"""Decodes tokenized recordings at few and at many quantizers, for a recogniser to learn from.

    python experiments/codec_copies.py codes/ copies/ --checkpoint=CODEC

CODES is an output of `moss-tok tokenize`. OUT gets a FLAC of each recording, as the codec sounds
with 1, 2, 4, 8 or 16 quantizers (in turn), and a manifest.jsonl with the metadata of the
recordings.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import moss_tok
from moss_tok.audio import files
from moss_tok.batching import batch_by_shape
from moss_tok.cli.commands import Parser
from moss_tok.codec import pretrained
from moss_tok.codec.inference import Codec, bucket_frames, decode_batch
from moss_tok.data import read_codes
from moss_tok.data.codes import CodeSource, Item
from moss_tok.errors import exit_code

NUMBERS = (1, 2, 4, 8, 16)  # of quantizers
_BATCH = 32
_BUCKETS_PER_OCTAVE = 2  # lengths; a program is compiled for each


def decode_all(codec: Codec, codes: Sequence[np.ndarray], number: int) -> list[np.ndarray]:
    """Audio [C, S] of the first `number` of the codes [q, T], with few programs for all numbers."""
    limit = codec.config.quantizer.num_quantizers
    sizes = [bucket_frames(array.shape[1], _BUCKETS_PER_OCTAVE) for array in codes]
    wavs: list[np.ndarray] = [np.zeros((0, 0))] * len(codes)
    for size, rows, padded_rows in batch_by_shape(sizes, _BATCH):
        batch = [np.pad(codes[row], ((0, limit - len(codes[row])), (0, 0))) for row in padded_rows]
        decoded = decode_batch(codec, batch, number, num_frames=size)
        for row, wav in zip(rows, decoded, strict=False):
            wavs[row] = wav
    return wavs


def check_codes(codec: Codec, codes: CodeSource) -> None:
    """Raises ValueError unless codes are of this codec, with all quantizers that are decoded."""
    fingerprint = pretrained.fingerprint(codec)
    if codes.settings["codec"] != fingerprint:
        raise ValueError(
            f"{codes.folder} holds codes of codec {codes.settings['codec']}, --checkpoint is codec "
            f"{fingerprint}"
        )
    needed = min(max(NUMBERS), codec.config.quantizer.num_quantizers)
    for item in codes:
        if len(item.codes) < needed:
            raise ValueError(
                f"{codes.folder}, {item.id}: has {len(item.codes)} quantizers, needs {needed}"
            )


def write_copies(codec: Codec, items: Sequence[Item], folder: Path) -> None:
    """Writes the audio and the manifest."""
    folder.mkdir(parents=True)
    rate = codec.config.sample_rate
    lines: dict[int, str] = {}
    for turn, number in enumerate(NUMBERS):
        indices = range(turn, len(items), len(NUMBERS))
        codes = [items[index].codes.astype(np.int32) for index in indices]
        for index, wav in zip(indices, decode_all(codec, codes, number), strict=True):
            path = folder / f"{index:05}.flac"
            files.write(path, wav, rate)
            row = items[index].metadata | {"path": path.name, "duration_s": wav.shape[1] / rate}
            lines[index] = json.dumps(row) + "\n"
    files.write_text(folder / "manifest.jsonl", "".join(lines[i] for i in range(len(items))))


def main(argv: Sequence[str] | None = None) -> int:
    """Writes OUT; returns 2 after a user error."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("codes", help="output of moss-tok tokenize")
    parser.add_argument("output", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument("--checkpoint", help="the codec (default: the one in the package)")
    args: argparse.Namespace = parser.parse_args(argv)

    def run() -> None:
        codec = moss_tok.load(args.checkpoint, component="decoder")
        encoder = moss_tok.load(args.checkpoint, component="encoder")  # that of the fingerprint
        codes = read_codes(args.codes)
        check_codes(encoder, codes)
        items = list(codes)
        write_copies(codec, items, args.output)
        print(f"{args.output / 'manifest.jsonl'}: {len(items)} recordings")

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
