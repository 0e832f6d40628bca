"""The commands of `moss-tok`: their names, what they do, and their parsers."""

import argparse
import importlib
from types import ModuleType
from typing import NoReturn

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
    "doctor": "print versions, devices and missing extras, and test the installation",
    "completion": "print a script that completes moss-tok commands in a shell",
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits with code 2."""
        self.exit(2, f"error: {' '.join(message.split())} (see {self.prog} --help)\n")


def load(name: str) -> ModuleType:
    """The module of a command."""
    return importlib.import_module(f"moss_tok.cli.{name}")


def build_parser(name: str) -> Parser:
    """The parser of a command; its help ends with the command's EXAMPLE."""
    command = load(name)
    parser = Parser(
        prog=f"moss-tok {name}",
        description=command.__doc__,
        epilog=f"example:\n  {command.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    return parser
