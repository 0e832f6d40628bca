"""Entry point of `moss-tok`: runs a command, and prints user errors as one line."""

import argparse
import importlib
import io
import sys
from collections.abc import Sequence

from moss_tok.audio import notes
from moss_tok.cli import arguments

COMMANDS = {
    "encode": "encode audio to codes (.npz)",
    "decode": "decode codes (.npz) to audio",
    "reconstruct": "encode audio and decode it again",
    "compare": "reconstruct a file at several bitrates, with distances and a picture",
    "demo": "a page on this machine: reconstruct files or live from the microphone",
    "stream": "encode or decode in real time, from standard input to standard output",
    "convert": "convert official Hugging Face weights to a checkpoint, or back",
    "evaluate": "score reconstructions of data sets at several bitrates",
    "report": "write an HTML page about a training run or an evaluation",
    "export": "export a function as a StableHLO artifact that runs without moss_tok",
    "tokenize": "encode a data set to shards of codes",
    "transcribe": "transcribe audio or codes, with a checkpoint that has a language model",
    "speak": "speak a text, or a file of texts, with a checkpoint of a speech model",
    "prepare": "prepare a folder or manifest for training, as ArrayRecord shards",
    "info": "print modules, parameters, rates and bitrates of a checkpoint or preset",
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> None:
        """Prints the message and exits with code 2."""
        self.exit(2, f"error: {' '.join(message.split())} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code: 2 for a user error, 1 if some files failed."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = _parse_command(argv[:1])
    command = importlib.import_module(f"moss_tok.cli.{name}")
    args = build_parser(name).parse_args(argv[1:])
    notes.forget()
    _print_any_name()
    try:
        code = command.run(args) or 0
        _flush()
        return code
    except Exception as error:
        from moss_tok.errors import user_error

        line = user_error(error, "take shorter audio or fewer files at a time")
        if not line:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def build_parser(name: str) -> Parser:
    """The parser of a command; its help ends with the command's EXAMPLE."""
    command = importlib.import_module(f"moss_tok.cli.{name}")
    parser = Parser(
        prog=f"moss-tok {name}",
        description=command.__doc__,
        epilog=f"example:\n  {command.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    return parser


def _parse_command(argv: Sequence[str]) -> str:
    """The command's name; prints the list of commands for --help."""
    listing = "\n".join(f"  {name:<12} {summary}" for name, summary in COMMANDS.items())
    parser = Parser(
        prog="moss-tok",
        usage="moss-tok COMMAND ...",
        description=f"A causal Transformer audio codec.\n\ncommands:\n{listing}",
        epilog="Run moss-tok COMMAND --help for a command's arguments and an example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", help=argparse.SUPPRESS)
    name = parser.parse_args(argv).command
    if name not in COMMANDS:
        parser.error(f"unknown command {name!r}; accepted: {', '.join(COMMANDS)}")
    return name


def _print_any_name() -> None:
    """Prints characters of file names that standard output cannot encode as escapes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _flush() -> None:
    """Flushes standard output here: an error at exit, as of a full disk, would go unnoticed."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        arguments.discard_output()
        raise
