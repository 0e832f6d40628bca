"""How the channels of a frame are sampled, and how long speech can be."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from moss_tok.language.generate import choose
from moss_tok.speech.config import SpeechConfig

# Longest time that slow speech takes, in seconds: pauses at both ends, a letter of an alphabet, and
# a digit or a character that stands for a syllable or a word.
_PAUSES = 1.5
_LETTER = 0.2
_SYMBOL = 0.6
_FIRST_IDEOGRAPH = 0x2E80  # of Unicode; scripts of syllables and words begin here


@dataclasses.dataclass(frozen=True)
class Channel:
    """How a group of channels is sampled. The defaults are the official ones of the codes.

    Attributes:
      temperature: Sampling temperature; 0 always takes the most likely code, without penalty.
      top_k: Sample among this many most likely codes; 0: among all.
      top_p: Of those, sample among the most likely ones that together reach this probability.
      repetition_penalty: Divides the logits, or multiplies negative ones, of codes that the channel
        has had before; 1: none.

    Raises:
      ValueError: A value is out of range.
    """

    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 0.95
    repetition_penalty: float = 1.1

    def __post_init__(self):
        if not 0 <= self.temperature <= 100:
            raise ValueError(f"temperature must be 0..100, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
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
            is_letter = character.isalpha() and ord(character) < _FIRST_IDEOGRAPH
            seconds += _LETTER if is_letter else _SYMBOL
    return math.ceil(seconds * config.frame_rate)
