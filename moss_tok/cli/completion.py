"""Prints a script that completes the commands, options and files of moss-tok in bash or zsh.

bash (also needs the package bash-completion; takes effect in new shells):
  mkdir -p ~/.local/share/bash-completion/completions
  moss-tok completion bash > ~/.local/share/bash-completion/completions/moss-tok

zsh (a folder of $fpath, here with a line `fpath+=~/.zfunc` before `compinit` in ~/.zshrc):
  mkdir -p ~/.zfunc
  moss-tok completion zsh > ~/.zfunc/_moss-tok
"""

import argparse

from moss_tok.cli import commands

EXAMPLE = "moss-tok completion bash"

_SHELLS = ("bash", "zsh")
# Options and arguments whose values are files or folders.
_FILES = ("checkpoint", "codec", "dataset", "destination", "folder", "input", "output", "prompt",
          "source", "speak", "text")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("shell", choices=_SHELLS, help="bash or zsh")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    print(script(args.shell))


def script(shell: str) -> str:
    """The script for a shell."""
    import shtab

    parser = commands.Parser(prog="moss-tok", description="A causal Transformer audio codec.")
    parser.add_argument("--version", action="store_true", help="print the version")
    subparsers = parser.add_subparsers()
    for name, summary in commands.COMMANDS.items():
        command = subparsers.add_parser(name, help=summary, description=summary)
        commands.load(name).add_arguments(command)
        for action in command._actions:  # argparse has no public list
            if action.dest in _FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return str(shtab.complete(parser, shell))
