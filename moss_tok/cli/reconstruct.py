"""Sends an audio file, or a folder of them, through the codec and back."""

import argparse
import functools
from pathlib import Path
from typing import Any

from moss_tok.cli import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "input", metavar="IN", help="wav, flac, ogg or mp3; any rate, any channels; or a folder"
    )
    parser.add_argument("output", metavar="OUT.wav", help="wav, flac or ogg; or a folder")
    arguments.add_codec(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    import moss_tok
    from moss_tok.audio import files

    if not Path(args.input).is_dir():
        files.check_output(args.output)
    codec = moss_tok.load(args.checkpoint)
    num_quantizers = codec.config.check_num_quantizers(args.num_quantizers)
    reconstruct = functools.partial(_reconstruct, codec, num_quantizers)
    return arguments.each_file(args.input, args.output, (*files.SUFFIXES, ".wav"), reconstruct)


def _reconstruct(codec: Any, num_quantizers: int, source: Path, output: Path) -> str:
    import numpy as np

    from moss_tok.audio import files
    from moss_tok.codec import inference
    from moss_tok.evaluation import metrics

    config = codec.config
    wav = files.read(source, config.sample_rate, config.num_channels)
    codes = inference.encode_one(codec, wav, num_quantizers)
    wav_hat = inference.decode_one(codec, codes)[:, : wav.shape[1]]
    files.write(output, wav_hat, config.sample_rate)
    pair = wav, np.clip(wav_hat, -1, 1)
    distance, _ = metrics.compute_each(*pair, config.sample_rate, ("mel_loss",))
    said = f", mel distance {distance['mel_loss']:.3f}" if distance else ""  # of 65 ms or more
    bitrate = f"{config.bitrate(num_quantizers):.0f} bit/s"
    return f"{output}: {bitrate} ({num_quantizers} quantizers){said}"
