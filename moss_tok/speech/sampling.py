"""How the channels of a frame are sampled, and how long speech can be."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from moss_tok.language.generate import Choice, choose
from moss_tok.speech.config import SpeechConfig

# Durations in slow speech.
_PAUSE_SECONDS = 1.5  # both ends together
_LETTER_SECONDS = 0.2  # of an alphabet
_SYMBOL_SECONDS = 0.6  # a digit, or a character that stands for a syllable or a word
FIRST_IDEOGRAPH = 0x2E80  # from here on, Unicode has scripts of syllables and words


@dataclasses.dataclass(frozen=True)
class Channel(Choice):
    """How a group of channels is sampled. The defaults are the official ones of the codes.

    At temperature 0 there is no penalty.

    Attributes:
      repetition_penalty: The positive logits of codes that the channel has had before are divided
        by it, the negative ones multiplied; 1: none.

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
    The official code samples it from the whole vocabulary at temperature 1.5 and top-p 1: an end
    with a probability of 1 % is sampled now and then. Here, top-p excludes a choice whose
    probability is below 5 %, so that speech does not stop early or run on by chance.

    Attributes:
      text: The text channel.
      first: The codes of the first quantizer.
      others: The codes of the other quantizers.
    """

    text: Channel = Channel(top_k=0, repetition_penalty=1.0)
    first: Channel = Channel()
    others: Channel = Channel()


MAX_SEED = 2**31 - 1
DEFAULT = Sampling()
GREEDY = Sampling(Channel(0.0), Channel(0.0), Channel(0.0))


def check_seed(seed: int) -> None:
    """Raises ValueError if a random seed is out of range."""
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed must be 0..{MAX_SEED}, got {seed}")


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


def longest_speech(config: SpeechConfig, text: str) -> int:
    """Frames of a text that is spoken slowly; speech never gets longer."""
    seconds = _PAUSE_SECONDS
    for character in text:
        if not character.isalnum():
            continue
        is_letter = character.isalpha() and ord(character) < FIRST_IDEOGRAPH
        seconds += _LETTER_SECONDS if is_letter else _SYMBOL_SECONDS
    return math.ceil(seconds * config.frame_rate)
