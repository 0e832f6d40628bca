"""Prints a script that completes commands, options and their values, and files in bash or zsh.

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
          "source", "speak", "speaker", "text")  # fmt: skip
# Values by command and option. They are written here because their modules take seconds to import.
VALUES = {
    ("export", "function"): ("encode", "decode", "encode_step", "decode_step"),
    ("export", "weights"): ("beside", "inside"),
    ("prepare", "runner"): ("DirectRunner", "FlinkRunner"),
    ("tokenize", "format"): ("arrayrecord", "jsonl"),
    ("tokenize", "precision"): ("highest", "high", "bfloat16"),
    ("transcribe", "task"): ("transcribe", "transcribe_speakers", "caption"),
}
PRESETS = ("v1", "v2", "nano", "tiny", "tts-1.7b")  # of info, which takes files too
_FUNCTION = "_moss_tok_preset_or_file"
_PREAMBLE = {
    "bash": f"""
{_FUNCTION}() {{
  compgen -W "{" ".join(PRESETS)}" -- "$1"
  compgen -f -- "$1"
}}
""",
    "zsh": f"""
{_FUNCTION}() {{
  _alternative "presets:preset:({" ".join(PRESETS)})" "files:file:_files"
}}
""",
}


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
            action.choices = action.choices or VALUES.get((name, action.dest))
            if action.dest in _FILES:
                takes_presets = (name, action.dest) == ("info", "source")
                complete = dict.fromkeys(_SHELLS, _FUNCTION) if takes_presets else shtab.FILE
                action.complete = complete  # type: ignore[attr-defined]
    return str(shtab.complete(parser, shell, preamble=_PREAMBLE))
