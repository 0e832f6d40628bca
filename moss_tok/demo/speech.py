"""Speech of the demo: what the page asks for, and the speech model that says it."""

import dataclasses
from collections.abc import Generator
from pathlib import Path
from typing import Any

from moss_tok.codec.inference import Codec
from moss_tok.demo.sound import Recording
from moss_tok.json_files import parse_json_object
from moss_tok.speech import pretrained, speaking
from moss_tok.speech.layout import Request
from moss_tok.speech.speaking import MAX_SEED, Block
from moss_tok.speech.steps import Speech


@dataclasses.dataclass(frozen=True)
class Wish:
    """What to say.

    Attributes:
      text: The text.
      num_quantizers: How many quantizers to sample.
      seed: Seed of the sampling.
      prompt: Id of a recording of the voice; "": none.
      prompt_text: What is said in it.
    """

    text: str
    num_quantizers: int
    seed: int
    prompt: str
    prompt_text: str


def parse_wish(message: str) -> Wish:
    """Reads the JSON object of a page; ValueError if it lacks a value or has a wrong one."""
    fields = parse_json_object(message)
    for field in dataclasses.fields(Wish):
        value = fields.get(field.name)
        if type(value) is not field.type:
            raise ValueError(f"{field.name} must be of type {field.type.__name__}, got {value!r}")
    wish = Wish(**{field.name: fields[field.name] for field in dataclasses.fields(Wish)})
    if not 0 <= wish.seed <= MAX_SEED:
        raise ValueError(f"the seed must be 0..{MAX_SEED}, got {wish.seed}")
    return wish


class Speaker:
    """A speech model and its codec."""

    def __init__(self, model: Speech, codec: Codec, name: str):
        """Raises ValueError if the model speaks the codes of another codec."""
        speaking.check_codec(model.config, codec)
        self._model = model
        self._codec = codec
        self._name = name

    @classmethod
    def load(cls, path: str, codec: Codec) -> "Speaker":
        """Loads a checkpoint; ValueError if it holds no speech model, or one of another codec."""
        return cls(pretrained.load(path), codec, Path(path).name)

    def describe(self) -> dict[str, Any]:
        """What the page has to know, JSON."""
        return {"name": self._name, "num_quantizers": self._model.config.num_quantizers}

    def begin(self, wish: Wish, prompt: Recording | None) -> Generator[Block, None, None]:
        """Checks a wish and starts to sample.

        Args:
          wish: What to say.
          prompt: The recording of the voice.

        Returns:
          The blocks of the speech, each sampled when it is asked for.

        Raises:
          ValueError: The text is empty or has characters that the tokenizer lacks, the prompt is
            silent or too long, or num_quantizers is out of range.
        """
        request = Request(wish.text)
        if prompt is not None:
            speaking.check_prompt(prompt.wav, "the recording of the voice")
            request = speaking.with_prompt(
                self._model.config, wish.text, prompt.codes, wish.prompt_text
            )
        return speaking.stream_blocks(
            self._model,
            self._codec,
            request,
            seed=wish.seed,
            num_quantizers=wish.num_quantizers,
        )
