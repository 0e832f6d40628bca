"""How the channels of a frame are sampled, and how long speech can be."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from moss_tok.language.generate import Choice, choose
from moss_tok.speech.config import SpeechConfig

# Longest time that slow speech takes, in seconds: pauses at both ends, a letter of an alphabet, and
# a digit or a character that stands for a syllable or a word.
_PAUSES = 1.5
_LETTER = 0.2
_SYMBOL = 0.6
FIRST_IDEOGRAPH = 0x2E80  # of Unicode; scripts of syllables and words, without spaces, begin here


@dataclasses.dataclass(frozen=True)
class Channel(Choice):
    """How a group of channels is sampled. The defaults are the official ones of the codes.

    At temperature 0 there is no penalty.

    Attributes:
      repetition_penalty: Divides the logits, or multiplies negative ones, of codes that the channel
        has had before; 1: none.

    Raises:
      ValueError: A value is out of range.
    """

    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 0.95
    repetition_penalty: float = 1.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.1 <= self.repetition_penalty <= 10:
            raise ValueError(f"repetition_penalty must be 0.1..10, got {self.repetition_penalty}")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How frames are sampled, by groups of channels.

    The text channel chooses only between another frame and the end of speech, and has no penalty.
    The official code samples it among the whole vocabulary at temperature 1.5 and top-p 1, with
    which an end of 1 % likelihood is drawn now and then. Here, top-p leaves out what is below 5 %,
    so that speech neither stops early nor runs on by chance.

    Attributes:
      text: The text channel.
      first: The codes of the first quantizer.
      others: The codes of the other quantizers.
    """

    text: Channel = Channel(top_k=0, repetition_penalty=1.0)
    first: Channel = Channel()
    others: Channel = Channel()


DEFAULT = Sampling()
GREEDY = Sampling(Channel(0.0), Channel(0.0), Channel(0.0))


def choose_each(logits: jax.Array, keys: jax.Array, channel: Channel) -> jax.Array:
    """Samples [B] from logits [B, V], each row with its own key of `keys` [B]."""

    def choose_one(logits: jax.Array, key: jax.Array) -> jax.Array:
        return choose(logits[None], key, channel)[0]

    return jax.vmap(choose_one)(logits, keys)


def penalize(logits: jax.Array, seen: jax.Array, channel: Channel) -> jax.Array:
    """Logits [B, K] with the repetition penalty of the codes that were `seen`, bool [B, K].

    Source: arXiv 1909.05858, as in Hugging Face Transformers.
    """
    penalty = channel.repetition_penalty
    if penalty == 1 or not channel.temperature:
        return logits
    penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(seen, penalized, logits)


def most_frames(config: SpeechConfig, text: str) -> int:
    """Longest speech for a text, in frames, if it is spoken slowly."""
    seconds = _PAUSES
    for character in text:
        if character.isalnum():
            is_letter = character.isalpha() and ord(character) < FIRST_IDEOGRAPH
            seconds += _LETTER if is_letter else _SYMBOL
    return math.ceil(seconds * config.frame_rate)
