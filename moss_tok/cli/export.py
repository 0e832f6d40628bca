"""Exports a function of a codec as a StableHLO artifact that runs without moss_tok."""

import argparse

from moss_tok.cli import arguments

EXAMPLE = "moss-tok export runs/quickstart artifact --function encode"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "checkpoint",
        metavar="C",
        help="checkpoint, training workdir, official directory or Hugging Face Hub id",
    )
    parser.add_argument("output", metavar="OUT", help="new directory")
    parser.add_argument(
        "--function", required=True, metavar="F", help="encode, decode, encode_step or decode_step"
    )
    arguments.add_num_quantizers(parser)
    parser.add_argument(
        "--chunk-frames",
        type=int,
        default=1,
        metavar="T",
        help="code frames per call of encode_step or decode_step (default: 1)",
    )
    parser.add_argument(
        "--weights",
        default="beside",
        metavar="W",
        help="beside: in params.safetensors; inside: in the program, up to 1 GB (default: beside)",
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    import moss_tok
    from moss_tok import checkpoint, storage
    from moss_tok.codec import export
    from moss_tok.errors import check_choice

    check_choice("function", args.function, export.FUNCTIONS)
    output = storage.to_local_path(args.output)
    checkpoint.check_destination(output)
    component = "encoder" if args.function.startswith("encode") else "decoder"
    codec = moss_tok.load(args.checkpoint, component=component)
    artifact = export.export(
        codec, args.function, args.num_quantizers, args.chunk_frames, args.weights
    )
    with checkpoint.new_directory(output) as folder:
        export.write(folder, args.function, *artifact)
    print(f"{output}: {args.function} for {', '.join(export.PLATFORMS)}, weights {args.weights}")
