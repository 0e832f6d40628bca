"""Entry point of `moss-tok`: runs a command, and prints user errors as one line."""

import argparse
import contextlib
import io
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from moss_tok.audio import notes
from moss_tok.cli import arguments, commands
from moss_tok.cli.commands import COMMANDS, build_parser
from moss_tok.errors import exit_code
from moss_tok.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code: 2 for a user error, 1 if some files failed."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = _parse_command(argv[:1])
    command = commands.load(name)
    args = build_parser(name).parse_args(argv[1:])
    notes.forget()
    _print_any_name()

    def run() -> int:
        code = command.run(args) or 0
        _flush()
        return code

    with _removing_partial_files():
        try:
            code = exit_code(run, "take shorter audio or fewer files at a time")
        except KeyboardInterrupt:
            return 130
    if code:
        with contextlib.suppress(OSError):  # the error has been printed
            _flush()
    return code


@contextlib.contextmanager
def _removing_partial_files() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP end a command as Ctrl-C does, so that it removes partial files."""

    def stop(number: int, frame: Any) -> None:
        del frame
        sys.exit(128 + number)

    before = {}
    with contextlib.suppress(ValueError):  # not in the main thread
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _parse_command(argv: Sequence[str]) -> str:
    """The command's name; prints the list of commands for --help."""
    listing = "\n".join(f"  {name:<12} {summary}" for name, summary in COMMANDS.items())
    parser = commands.Parser(
        prog="moss-tok",
        usage="moss-tok COMMAND ...",
        description=f"A causal Transformer audio codec.\n\ncommands:\n{listing}",
        epilog="Run moss-tok COMMAND --help for a command's arguments and an example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"moss-tok {__version__}")
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
