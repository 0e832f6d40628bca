"""Sequences of a speech model: a prompt, the frames of speech, and the end token.

A position has a token of text and a code per quantizer; the code K means that there is no code. The
layouts are:

  plain  [text of the reference] start [its frames] end [text] start [frames] end
         Without a reference, the sequence begins with [text]. Any tokenizer will do.
  chat   user: a form with a reference, a language, an instruction, ... and the text
         assistant: start [frames] end

Training and generation build their prompts with the same function, so they always agree. To
continue speech, its frames are put after `start`, and what it says is put in front of the text.

Source of the chat layout: processing_moss_tts.py in moss_tts_local/ of OpenMOSS/MOSS-TTS.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from moss_tok.codec.checks import check_code_range, check_integers, check_shape
from moss_tok.json_files import shorten
from moss_tok.language.text import Tokenizer, missing_characters
from moss_tok.speech.config import SpeechConfig

# The fields of the form: their names in the data, and their titles in the form.
FORM = {
    "instruction": "Instruction",
    "tokens": "Tokens",
    "quality": "Quality",
    "sound_event": "Sound Event",
    "ambient_sound": "Ambient Sound",
    "language": "Language",
}
# The tokens of the chat layout in the tokenizers of Qwen.
CHAT_TOKENS = (
    "<|im_start|>",  # a message begins
    "<|im_end|>",  # a message ends
    "<|vision_start|>",  # start
    "<|vision_end|>",  # end
    "<|video_pad|>",  # slot of a frame of speech
    "<|vision_pad|>",  # slot of a frame of a reference
)


@dataclasses.dataclass(frozen=True)
class Request:
    """What to say, and how.

    Attributes:
      text: What to say. If `beginning` is given, the text starts with what the beginning says.
      reference: Codes [q, T] of a recording of the speaker, or None.
      reference_text: What is said in the reference; the chat layout does not use it.
      beginning: Codes [q, T] of speech to continue, or None.
      beginning_text: What is said in the beginning, the start of `text`.
      details: Values of the chat layout's form, by the names in FORM.
    """

    text: str
    reference: np.ndarray | None = None
    reference_text: str = ""
    beginning: np.ndarray | None = None
    beginning_text: str = ""
    details: dict[str, str] = dataclasses.field(default_factory=dict)


class Positions(NamedTuple):
    """A sequence.

    Attributes:
      text: [T] int32 tokens.
      codes: [Q, T] int32; K where there is no code.
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
    tokens = _chat_tokens(tokenizer)
    if tokens:
        layout = "chat"
        size = tokenizer.vocab_size
        start, end, slot, user_slot = tokens[2:]
    else:
        layout = "plain"
        size = tokenizer.vocab_size + 2  # for the slot and the end of speech
        start = tokenizer.end_id
        slot = size - 2
        user_slot = slot
        end = size - 1
    return {
        "vocab_size": -(-size // 64) * 64,  # so that devices can split it
        "slot_id": slot,
        "end_id": end,
        "start_id": start,
        "user_slot_id": user_slot,
        "layout": layout,
    }


def check_request(config: SpeechConfig, tokenizer: Tokenizer, request: Request) -> None:
    """Raises ValueError unless a model can say the text of a request, and read all else in it."""
    for name in request.details:
        if name not in FORM:
            raise ValueError(f"details have the names {', '.join(FORM)}, got {name!r}")
    if not request.text.startswith(request.beginning_text):
        raise ValueError("the text of the beginning must be the start of the text")
    for name, codes in (("reference", request.reference), ("beginning", request.beginning)):
        if codes is not None:
            _check_codes(config, name, codes)
    check_text(config, tokenizer, request.text)
    if request.reference_text:
        check_text(config, tokenizer, request.reference_text, "the text of the prompt")
    if config.layout == "chat":
        for name, value in request.details.items():
            if value.strip():
                check_text(config, tokenizer, value, name)


def _check_codes(config: SpeechConfig, name: str, codes: np.ndarray) -> None:
    """Raises ValueError unless codes are integers [q, T] in [0, K)."""
    check_shape(name, codes, ("Q", "T"))
    check_integers(name, codes)
    check_code_range(name, codes, config.codebook_size)


def check_text(
    config: SpeechConfig, tokenizer: Tokenizer, text: str, name: str = "the text"
) -> None:
    """Raises ValueError, which calls the text `name`, unless a model can say it."""
    if not text.strip():
        raise ValueError(f"{name} is empty")
    shown = shorten(text)
    try:
        tokens = tokenizer.encode(text)
        missing = missing_characters(tokenizer, text)
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} {shown} is not valid Unicode") from error
    if missing:
        raise ValueError(f"{name} {shown} has characters that the tokenizer lacks: {missing!r}")
    if not tokens:
        raise ValueError(f"{name} {shown} has no tokens")
    reserved: set[int | None] = {
        config.slot_id,
        config.end_id,
        config.start_id,
        config.user_slot_id,
    }
    reserved |= {tokenizer.token_id(token) for token in CHAT_TOKENS[:2]}
    if reserved & set(tokens):
        raise ValueError(f"{name} {shown} has a token that the layout of sequences reserves")


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
    no_frames = np.zeros((config.num_quantizers, 0), np.int32)
    with_reference = prompt(config, tokenizer, Request("", no_frames, text))
    without_reference = prompt(config, tokenizer, Request(""))
    return len(with_reference.text) - len(without_reference.text) + num_frames


def _add_form(builder: "_Builder", tokenizer: Tokenizer, request: Request) -> None:
    """The user's message and the head of the assistant's."""
    head = "<|im_start|>user\n<user_inst>\n- Reference(s):\n"
    lines = [f"\n- {title}:\n{request.details.get(name)}" for name, title in FORM.items()]
    lines.append(f"\n- Text:\n{request.text}\n</user_inst><|im_end|>\n<|im_start|>assistant\n")
    tail = "".join(lines)
    if request.reference is None:
        builder.add_tokens(tokenizer.encode(f"{head}None{tail}"))
        return
    builder.add_tokens(tokenizer.encode(f"{head}[S1]:\n"))
    builder.add_frames(request.reference, builder.config.user_slot_id)
    builder.add_tokens(tokenizer.encode(tail))


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
        """Adds frames [q, T] with the token `slot`; the quantizers above q get no code."""
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
