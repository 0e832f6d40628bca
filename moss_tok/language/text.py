"""Text to tokens and back: UTF-8 bytes, or any Hugging Face tokenizer.json."""

from typing import Protocol

from moss_tok import storage

# What families of models call the token that ends a text.
_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")


class Tokenizer(Protocol):
    """Text to tokens and back.

    Attributes:
      vocab_size: Number of tokens, V.
      end_id: The token that ends a text; `encode` never returns it.
      json: Text of the tokenizer.json that it comes from; "" for bytes.
    """

    vocab_size: int
    end_id: int
    json: str

    def encode(self, text: str) -> list[int]:
        """Tokens of a text."""

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens."""


class ByteTokenizer:
    """A token per byte of UTF-8, and one that ends a text."""

    vocab_size, end_id, json = 257, 256, ""

    def encode(self, text: str) -> list[int]:
        """Tokens of a text."""
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens; bytes that are no UTF-8 become U+FFFD."""
        return bytes(t for t in tokens if t < 256).decode(errors="replace")


class FileTokenizer:
    """What a tokenizer.json describes; where it has no token that ends a text, one is added."""

    def __init__(self, text: str, name: str):
        """Raises ValueError where `text`, of the file `name`, is no tokenizer."""
        try:
            import tokenizers
        except ImportError as error:
            raise ValueError(f"{name} needs: pip install tokenizers") from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exceptions
            reason = storage.pointer_hint(name) or error
            raise ValueError(f"{name}: no tokenizer.json ({reason})") from error
        self._tokenizer.no_padding()  # what the file may ask for
        self._tokenizer.no_truncation()
        ends = (self._tokenizer.token_to_id(token) for token in _END_TOKENS)
        self._size = 1 + max(self._tokenizer.get_vocab().values(), default=-1)  # ids may have gaps
        self.end_id = next((end for end in ends if end is not None), self._size)
        self.vocab_size, self.json = max(self._size, 1 + self.end_id), text

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without special ones."""
        try:
            tokens = self._tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises plain Exceptions
            raise ValueError(f"the tokenizer cannot take {text[:40]!r}: {error}") from error
        return [t for t in tokens if t != self.end_id]

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens, without special ones."""
        return self._tokenizer.decode([t for t in tokens if t < self._size])


def load(path: str | storage.Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json or a folder with one; "" or "bytes": bytes.

    Raises:
      ValueError: No such file, or no tokenizer.
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
        raise ValueError(f"{file}: no tokenizer.json ({error})") from error
