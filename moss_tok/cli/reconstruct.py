"""Sends an audio file through the codec and back; prints the bitrate and the mel distance."""

import argparse

from moss_tok.cli import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("input", metavar="IN", help="wav, flac, ogg or mp3; any rate, any channels")
    parser.add_argument("output", metavar="OUT.wav", help="wav, flac or ogg")
    arguments.add_codec(parser)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    import numpy as np

    import moss_tok
    from moss_tok.audio import files
    from moss_tok.evaluation import metrics

    files.check_output(args.output)
    codec = moss_tok.load(args.checkpoint)
    config = codec.config
    num_quantizers = config.check_num_quantizers(args.num_quantizers)
    wav = files.read(args.input, config.sample_rate, config.num_channels)
    codes = moss_tok.encode(codec, wav[None], num_quantizers=num_quantizers).codes
    wav_hat = np.asarray(moss_tok.decode(codec, codes).wav[0, :, : wav.shape[-1]])
    files.write(args.output, wav_hat, config.sample_rate)
    distance = metrics.compute(wav, np.clip(wav_hat, -1, 1), config.sample_rate, ("mel_loss",))
    print(
        f"{args.output}: {config.bitrate(num_quantizers):.0f} bit/s "
        f"({num_quantizers} quantizers), mel distance {distance['mel_loss']:.3f}"
    )
