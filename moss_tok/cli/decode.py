"""Decodes codes into an audio file."""

import argparse

from moss_tok.cli import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("input", metavar="IN.npz", help="codes, as `moss-tok encode` writes them")
    parser.add_argument("output", metavar="OUT.wav", help="wav, flac or ogg")
    arguments.add_codec(parser)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    import moss_tok
    from moss_tok.audio import files
    from moss_tok.cli import codes

    files.check_output(args.output)
    codec = moss_tok.load(args.checkpoint, component="decoder")
    config = codec.config
    file = codes.read(args.input, config)
    given = file.codes.shape[0]
    config.check_num_quantizers(args.num_quantizers)
    if args.num_quantizers is not None and args.num_quantizers > given:
        raise ValueError(f"num_quantizers must be 1..{given}, the file has no more")
    rows = file.codes[: args.num_quantizers]
    wav = moss_tok.decode(codec, rows[None]).wav[0, :, : file.num_samples]
    files.write(args.output, wav, config.sample_rate)
    print(f"{args.output}: {wav.shape[-1] / config.sample_rate:.2f} s from {rows.shape[0]} x "
          f"{rows.shape[1]} codes")  # fmt: skip
