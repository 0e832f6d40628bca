"""Reconstructs an audio file at several bitrates: prints distances, writes audio and a picture.

The lower bitrates are decoded from the first quantizers of the same codes.
"""

import argparse
import contextlib
import re
import tempfile
from pathlib import Path
from typing import Any

from moss_tok.cli import arguments

EXAMPLE = "moss-tok compare speech.flac compared"

_MAX_SECONDS = 30.0
_PICTURE = "spectrograms.png"
_RECONSTRUCTION = re.compile(r"\d+_quantizers?\.wav")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "input", metavar="IN", help="audio file; of a longer one the first 30 s are used"
    )
    parser.add_argument(
        "output",
        metavar="DIR",
        help="folder for original.wav, a file per bitrate and spectrograms.png",
    )
    arguments.add_checkpoint(parser)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    import matplotlib.figure  # noqa: F401  without it, fail before anything is written

    import moss_tok
    from moss_tok.audio import files
    from moss_tok.evaluation import sweep

    output = Path(args.output)
    _check_output(output, Path(args.input))
    seconds = files.duration_seconds(args.input)
    codec = moss_tok.load(args.checkpoint)
    config = codec.config
    wav = files.read_segment(args.input, 0.0, _MAX_SECONDS, config.sample_rate)
    wav = files.to_channels(wav, config.num_channels)
    part = f"the first {_MAX_SECONDS:g} of {seconds:.1f} s" if seconds > _MAX_SECONDS else ""
    print(f"{args.input}: {part or f'{seconds:.1f} s'}; {config.frame_rate:g} frames per second")
    print("mel_loss, stft: distances from the original, lower is better; stoi: intelligibility")
    print("of speech, at most 1. Each quantizer adds detail.", flush=True)
    reconstructions = sweep.reconstruct(codec, wav, sweep.bitrates(config))
    print("\n".join(_table(config, wav, reconstructions)))
    _write(output, config, wav, reconstructions)
    print(f"listen: {output}/*.wav, see {output}/{_PICTURE}")


def _check_output(output: Path, source: Path) -> None:
    """Raises ValueError unless the folder is new, empty or of an earlier comparison of a file."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output}: not a folder")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"no such folder: {output.parent}")
    if output.exists() and any(output.iterdir()) and not (output / _PICTURE).exists():
        raise ValueError(f"{output} is not empty, and has no earlier comparison to replace")
    if source.resolve().parent == output.resolve():
        raise ValueError(f"{source} is in {output}, whose files would be replaced")


def _table(config: Any, wav: Any, reconstructions: dict[int, Any]) -> list[str]:
    """A line of distances per number of quantizers; those that are not defined are left empty."""
    from moss_tok.evaluation import metrics

    names = ("mel_loss", "stft", "stoi")
    lines = [f"{'quantizers':>10} {'bit/s':>8} " + " ".join(f"{name:>9}" for name in names)]
    for number, wav_hat in reconstructions.items():
        values, _ = metrics.compute_each(wav, wav_hat, config.sample_rate, names)
        cells = [f"{values[name]:9.3f}" if name in values else " " * 9 for name in names]
        lines.append(f"{number:>10} {config.bitrate(number):>8.0f} " + " ".join(cells))
    return lines


def _write(output: Path, config: Any, wav: Any, reconstructions: dict[int, Any]) -> None:
    """Replaces the files of an earlier comparison once all new ones are complete."""
    from moss_tok.audio import files
    from moss_tok.evaluation import report, sweep

    audio = {"original.wav": wav}
    pictures = {"original": wav}
    for number, wav_hat in reconstructions.items():
        name = sweep.system_name(number)
        audio[f"{name.replace(' ', '_')}.wav"] = wav_hat
        pictures[f"{name}, {config.bitrate(number):.0f} bit/s"] = wav_hat
    is_new = not output.exists()
    output.mkdir(exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=files.INCOMPLETE, dir=output) as folder:
            report.save_spectrograms(Path(folder, _PICTURE), pictures, config.sample_rate)
            for name, samples in audio.items():
                files.write(Path(folder, name), samples, config.sample_rate)
            for path in output.iterdir():
                if _RECONSTRUCTION.fullmatch(path.name):
                    path.unlink()
            for path in Path(folder).iterdir():
                path.rename(output / path.name)
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):  # not empty: a file could not be moved
                output.rmdir()
        raise
