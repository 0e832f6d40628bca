"""Tokenizers: UTF-8 bytes, or any Hugging Face tokenizer.json."""

import dataclasses
import functools
import json
from typing import Protocol

from moss_tok import extras, storage
from moss_tok.json_files import shorten

# Names of the token that ends a text, in several families of models.
_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")


class Tokenizer(Protocol):
    """Converts text to tokens and back.

    Attributes:
      vocab_size: Number of tokens, V.
      end_id: The token that ends a text; `encode` never returns it.
      json: Content of its tokenizer.json; "" for bytes.
    """

    vocab_size: int
    end_id: int
    json: str

    def encode(self, text: str) -> list[int]:
        """Tokens of a text."""

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens."""

    def token_id(self, name: str) -> int | None:
        """The token called `name`; None without one."""


@dataclasses.dataclass(frozen=True)  # all instances are equal, so programs are compiled once
class ByteTokenizer:
    """One token per byte of UTF-8, and a token that ends a text."""

    vocab_size = 257
    end_id = 256
    json = ""

    def encode(self, text: str) -> list[int]:
        """Tokens of a text."""
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens; invalid UTF-8 becomes U+FFFD."""
        data = bytes(token for token in tokens if token < 256)
        return data.decode(errors="replace")

    def token_id(self, name: str) -> int | None:
        """None: bytes have no names."""
        del name


class FileTokenizer:
    """The tokenizer of a tokenizer.json; if it has no token that ends a text, one is added."""

    def __init__(self, text: str, name: str):
        """Parses `text`, the content of the file `name`.

        Raises:
          ValueError: The text is not a tokenizer.json, or the package tokenizers is not installed.
        """
        try:
            import tokenizers
        except ImportError as error:
            raise ValueError(f"{name} needs tokenizers: {extras.install('language')}") from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exceptions
            reason = storage.pointer_hint(name) or error
            raise ValueError(f"{name}: not a tokenizer.json ({reason})") from error
        self._tokenizer.no_padding()  # the file may turn padding and truncation on
        self._tokenizer.no_truncation()
        ids = self._tokenizer.get_vocab().values()  # they may have gaps
        self._size = 1 + max(ids, default=-1)
        self.end_id = self._size
        for token in _END_TOKENS:
            end_id = self._tokenizer.token_to_id(token)
            if end_id is not None:
                self.end_id = end_id
                break
        self.vocab_size = max(self._size, 1 + self.end_id)
        self.json = text

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without special tokens."""
        try:
            tokens = self._tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises plain Exceptions
            raise ValueError(f"the tokenizer cannot take {shorten(text)}: {error}") from error
        return [token for token in tokens if token != self.end_id]

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens, without special tokens."""
        known = [token for token in tokens if token < self._size]
        return self._tokenizer.decode(known)

    def token_id(self, name: str) -> int | None:
        """The token called `name`; None without one."""
        return self._tokenizer.token_to_id(name)

    @functools.cached_property
    def unknown_id(self) -> int | None:
        """The token that stands for characters that the tokenizer lacks; None without one."""
        model = json.loads(self.json)["model"]
        name = model.get("unk_token")  # Unigram models have unk_id
        return model.get("unk_id") if name is None else self.token_id(name)


def missing_characters(tokenizer: Tokenizer, text: str) -> str:
    """The characters of a text that the tokenizer lacks, each once; white space never counts."""
    if isinstance(tokenizer, ByteTokenizer):
        return ""
    unknown = getattr(tokenizer, "unknown_id", None)
    missing = ""
    for character in dict.fromkeys(text):
        if character.isspace():
            continue
        tokens = tokenizer.encode(character)
        if not tokens or unknown in tokens:
            missing += character
    return missing


def load_beside(path: storage.Path) -> Tokenizer:
    """The tokenizer.json of a checkpoint; bytes if the checkpoint has none."""
    return load(path) if path.is_file() else ByteTokenizer()


def load(path: str | storage.Path) -> Tokenizer:
    """Loads a tokenizer.

    Args:
      path: A tokenizer.json or a folder with one; "bytes" or "" for bytes.

    Raises:
      ValueError: There is no such file, or it is not a tokenizer.
    """
    if str(path) in ("", "bytes"):
        return ByteTokenizer()
    file = storage.to_path(path)
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise ValueError(f"{path}: no such tokenizer.json; accepted: a file, a folder, or bytes")
    try:
        return FileTokenizer(file.read_text(), str(file))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not a tokenizer.json ({error})") from error
