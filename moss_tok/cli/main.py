"""Entry point of `moss-tok`: finds the command, and turns user errors into one line."""

import argparse
import importlib
import io
import sys
from collections.abc import Sequence

from moss_tok.audio import notes
from moss_tok.cli import arguments

COMMANDS = {
    "encode": "audio file to codes (.npz)",
    "decode": "codes (.npz) to audio file",
    "reconstruct": "audio file through the codec and back",
    "stream": "live: PCM to codes, codes to PCM, or a file through both",
    "convert": "official Hugging Face layout to a checkpoint, or back",
    "evaluate": "data sets at several bitrates: files, scores, tables",
    "report": "a page of a training run or an evaluation, to look and listen",
    "export": "a function as a StableHLO artifact that runs without moss_tok",
    "tokenize": "a data set to shards of codes",
    "transcribe": "what is said in audio or codes, by a checkpoint with a language model",
    "prepare": "folder or manifest into ArrayRecord shards for training",
    "info": "modules, parameters, rates and bitrates of a checkpoint or preset",
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> None:
        """Prints the message and exits with code 2."""
        self.exit(2, f"error: {' '.join(message.split())} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code: 2 for a user's error, 1 if some files failed."""
    argv = list(sys.argv[1:] if argv is None else argv)
    listing = "\n".join(f"  {name:<12} {what}" for name, what in COMMANDS.items())
    parser = Parser(
        prog="moss-tok",
        usage="moss-tok COMMAND ...",
        description=f"A causal Transformer audio codec.\n\ncommands:\n{listing}",
        epilog="moss-tok COMMAND --help says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", help=argparse.SUPPRESS)
    name = parser.parse_args(argv[:1]).command
    if name not in COMMANDS:
        parser.error(f"unknown command {name!r}; accepted: {', '.join(COMMANDS)}")
    command = importlib.import_module(f"moss_tok.cli.{name}")
    parser = Parser(prog=f"moss-tok {name}", description=command.__doc__, allow_abbrev=False)
    command.add_arguments(parser)
    args = parser.parse_args(argv[1:])
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


def _print_any_name() -> None:
    """Lets standard output take names of files that its encoding cannot write, as escapes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _flush() -> None:
    """Raises OSError where what was printed has no room; at exit nobody would be told."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        arguments.print_nowhere()
        raise
