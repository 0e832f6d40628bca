"""Sequences of a speech model: what comes before the first frame, the frames, and their end.

A position has a token of text and a code per quantizer; the code K stands for none. The layouts:

  plain  [text of the reference] start [its frames] end [text] start [frames] end
         The part of the reference is left out if there is none. The tokenizer may be any.
  chat   user: a form with a reference, a language, an instruction, ... and the text
         assistant: start [frames] end

Training and generation build their prompts by the same function, so they always agree. Speech is
continued by putting its frames after `start`, and its text before the text.

Source of the chat layout: processing_moss_tts.py in moss_tts_local/ of OpenMOSS/MOSS-TTS.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from moss_tok.language.text import Tokenizer, missing_characters
from moss_tok.speech.config import SpeechConfig

# Names of the fields of the form, as the data calls them and as the form does; the text is last.
FORM = {
    "instruction": "Instruction",
    "tokens": "Tokens",
    "quality": "Quality",
    "sound_event": "Sound Event",
    "ambient_sound": "Ambient Sound",
    "language": "Language",
}
# The tokens of the chat layout in the tokenizers of Qwen: message begins, message ends, start,
# end, slot of a frame of speech, slot of a frame of a reference.
CHAT_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|video_pad|>",
    "<|vision_pad|>",
)
_MOST_SHOWN = 40  # characters of a text, in a message about it


@dataclasses.dataclass(frozen=True)
class Request:
    """What to say, and how.

    Attributes:
      text: What to say; if speech is continued, with the text of its beginning in front.
      reference: Codes [q, T] of a recording of the speaker; None without one.
      reference_text: What is said in the reference; the chat layout leaves it out.
      beginning: Codes [q, T] of speech to continue; None without any.
      details: Values of the chat layout's form, by the names in FORM.
    """

    text: str
    reference: np.ndarray | None = None
    reference_text: str = ""
    beginning: np.ndarray | None = None
    details: dict[str, str] = dataclasses.field(default_factory=dict)


class Positions(NamedTuple):
    """A sequence.

    Attributes:
      text: [T] int32 tokens.
      codes: [Q, T] int32; K where there is none.
    """

    text: np.ndarray
    codes: np.ndarray


def is_chat(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer has the tokens of the chat layout."""
    return bool(_chat_tokens(tokenizer))


def _chat_tokens(tokenizer: Tokenizer) -> list[int]:
    """The tokens CHAT_TOKENS, in this order; an empty list if a tokenizer lacks one."""
    tokens = [tokenizer.token_id(name) for name in CHAT_TOKENS]
    known = [token for token in tokens if token is not None]
    return known if len(known) == len(tokens) else []


def token_fields(tokenizer: Tokenizer) -> dict[str, int | str]:
    """Fields of `SpeechConfig` about tokens for a new model with this tokenizer."""
    if tokens := _chat_tokens(tokenizer):
        start, end, slot, user_slot = tokens[2:]
        layout, size = "chat", tokenizer.vocab_size
    else:
        size = tokenizer.vocab_size + 2
        start, slot, end = tokenizer.end_id, size - 2, size - 1
        layout, user_slot = "plain", slot
    return {
        "vocab_size": -(-size // 64) * 64,  # so that devices can split it
        "slot_id": slot,
        "end_id": end,
        "start_id": start,
        "user_slot_id": user_slot,
        "layout": layout,
    }


def check_text(config: SpeechConfig, tokenizer: Tokenizer, text: str) -> None:
    """Raises ValueError unless a model can say a text."""
    shown = repr(text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + "...")
    if not text.strip():
        raise ValueError("the text is empty")
    try:
        tokens = tokenizer.encode(text)
        missing = missing_characters(tokenizer, text)
    except UnicodeEncodeError as error:
        raise ValueError(f"the text {shown} is not valid Unicode") from error
    if missing:
        raise ValueError(f"the text {shown} has characters that the tokenizer lacks: {missing!r}")
    reserved: set[int | None] = {
        config.slot_id,
        config.end_id,
        config.start_id,
        config.user_slot_id,
    }
    reserved |= {tokenizer.token_id(name) for name in CHAT_TOKENS[:2]}
    if reserved & set(tokens):
        raise ValueError(f"the text {shown} has a token that the layout of messages uses")


def prompt(config: SpeechConfig, tokenizer: Tokenizer, request: Request) -> Positions:
    """The positions before the first frame to generate."""
    builder = _Builder(config)
    if config.layout == "chat":
        _add_form(builder, tokenizer, request)
    else:
        if request.reference is not None:
            builder.add_tokens(tokenizer.encode(request.reference_text))
            builder.add_frames(request.reference, config.user_slot_id)
        builder.add_tokens(tokenizer.encode(request.text))
    builder.add_tokens([config.start_id])
    if request.beginning is not None:
        builder.add_codes(request.beginning, config.slot_id)
    return builder.finish()


def speech(config: SpeechConfig, codes: np.ndarray) -> Positions:
    """The positions of frames [q, T] and of their end, which follow a prompt."""
    builder = _Builder(config)
    builder.add_codes(codes, config.slot_id)
    builder.add_tokens([config.end_id])
    return builder.finish()


def reference_size(config: SpeechConfig, tokenizer: Tokenizer, text: str, num_frames: int) -> int:
    """By how many positions a reference makes a prompt longer."""
    none = np.zeros((config.num_quantizers, 0), np.int32)
    with_none = prompt(config, tokenizer, Request("", none, text))
    without = prompt(config, tokenizer, Request(""))
    return len(with_none.text) - len(without.text) + num_frames


def _add_form(builder: "_Builder", tokenizer: Tokenizer, request: Request) -> None:
    """The user's message and the head of the assistant's."""
    head = "<|im_start|>user\n<user_inst>\n- Reference(s):\n"
    lines = [f"\n- {title}:\n{request.details.get(name)}" for name, title in FORM.items()]
    lines.append(f"\n- Text:\n{request.text}\n</user_inst><|im_end|>\n<|im_start|>assistant\n")
    rest = "".join(lines)
    if request.reference is None:
        builder.add_tokens(tokenizer.encode(f"{head}None{rest}"))
        return
    builder.add_tokens(tokenizer.encode(f"{head}[S1]:\n"))
    builder.add_frames(request.reference, builder.config.user_slot_id)
    builder.add_tokens(tokenizer.encode(rest))


class _Builder:
    """Collects positions."""

    def __init__(self, config: SpeechConfig) -> None:
        self.config = config
        self._tokens: list[np.ndarray] = []
        self._codes: list[np.ndarray] = []

    def add_tokens(self, tokens: list[int]) -> None:
        """Adds positions without codes."""
        shape = (self.config.num_quantizers, len(tokens))
        self._tokens.append(np.array(tokens, np.int32))
        self._codes.append(np.full(shape, self.config.codebook_size, np.int32))

    def add_codes(self, codes: np.ndarray, slot: int) -> None:
        """Adds frames [q, T] with the token `slot`; quantizers that they lack have no code."""
        codes = codes[: self.config.num_quantizers]
        num_quantizers, num_frames = codes.shape
        padding = self.config.num_quantizers - num_quantizers
        padded = np.pad(
            codes.astype(np.int32),
            ((0, padding), (0, 0)),
            constant_values=self.config.codebook_size,
        )
        self._tokens.append(np.full(num_frames, slot, np.int32))
        self._codes.append(padded)

    def add_frames(self, codes: np.ndarray, slot: int) -> None:
        """Adds frames between a start and an end."""
        self.add_tokens([self.config.start_id])
        self.add_codes(codes, slot)
        self.add_tokens([self.config.end_id])

    def finish(self) -> Positions:
        """The sequence."""
        return Positions(np.concatenate(self._tokens), np.concatenate(self._codes, axis=1))
