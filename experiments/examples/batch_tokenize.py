"""A folder of recordings to codes: padded batches, one call of `encode` each, a .npz per recording.

    python experiments/examples/batch_tokenize.py experiments/starter codes/

Recordings of similar length share a batch. They are padded to one length, and `lengths` says how
much of each is audio, so the codes are those of every recording alone. `moss-tok decode` reads the
files. For large data sets, bad files and several machines there is `moss-tok tokenize`. Prints a
line per batch: its recordings, its length and the share of padding.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import command
import numpy as np

import moss_tok
from moss_tok.audio import files, manifest
from moss_tok.codec import codes as code_files
from moss_tok.codec.inference import bucket_frames


def read_batch(paths: Sequence[Path], config) -> tuple[np.ndarray, np.ndarray]:
    """Recordings as wav [B, C, S], padded with zeros to one of few lengths, and lengths [B]."""
    wavs = [files.read(path, config.sample_rate, config.num_channels) for path in paths]
    lengths = np.array([wav.shape[1] for wav in wavs])
    # Few lengths, because every new shape is compiled.
    num_samples = config.hop_length * bucket_frames(config.num_frames(int(lengths.max())))
    wav = np.zeros((len(wavs), config.num_channels, num_samples), np.float32)
    for row, recording in enumerate(wavs):
        wav[row, :, : lengths[row]] = recording
    return wav, lengths


def main(argv: Sequence[str] | None = None) -> None:
    """Encodes a folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="folder of recordings")
    parser.add_argument("output", type=Path, help="folder for .npz files; must not exist yet")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--num_quantizers", type=int, help="codes per frame; default: all")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {args.batch_size}")
    if args.output.exists():
        raise ValueError(f"{args.output} exists already: choose a new folder")
    codec = moss_tok.load(component="encoder")
    codec.config.check_num_quantizers(args.num_quantizers)
    items = manifest.find_items(args.folder)
    items.sort(key=lambda item: item.duration_seconds)
    for start in range(0, len(items), args.batch_size):
        paths = [item.path for item in items[start : start + args.batch_size]]
        wav, lengths = read_batch(paths, codec.config)
        encoded = moss_tok.encode(codec, wav, lengths, args.num_quantizers)
        for path, codes, num_frames, num_samples in zip(
            paths, np.asarray(encoded.codes), np.asarray(encoded.lengths), lengths, strict=True
        ):
            # The suffix stays, because a.wav and a.flac may be different recordings.
            target = args.output / f"{path.relative_to(args.folder)}.npz"
            target.parent.mkdir(parents=True, exist_ok=True)
            code_files.write(target, codes[:, :num_frames], int(num_samples), codec)
        seconds = wav.shape[-1] / codec.config.sample_rate
        padding = 1 - lengths.mean() / wav.shape[-1]
        print(
            f"{len(paths)} recordings of up to {seconds:.2f} s, {padding:.0%} padding", flush=True
        )
    print(f"{args.output}: {len(items)} files")


if __name__ == "__main__":
    command.run(main)
