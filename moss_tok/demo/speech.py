"""Speech of the demo: the messages of the page, and the speech model that answers them."""

import dataclasses
from collections.abc import Generator
from pathlib import Path
from typing import Any

from moss_tok.codec.inference import Codec
from moss_tok.demo.sound import Recording
from moss_tok.json_files import parse_json_object
from moss_tok.speech import pretrained, speaking
from moss_tok.speech.layout import Request
from moss_tok.speech.sampling import check_seed
from moss_tok.speech.speaking import Block
from moss_tok.speech.steps import Speech


@dataclasses.dataclass(frozen=True)
class SpeakMessage:
    """A message of the page: a text to speak, and how.

    Attributes:
      text: What to say.
      num_quantizers: Number of quantizers to sample.
      seed: Seed of the sampling.
      prompt: Id of a recording of the voice; "" for none.
      prompt_text: What is said in the recording.
    """

    text: str
    num_quantizers: int
    seed: int
    prompt: str
    prompt_text: str


def parse_message(text: str) -> SpeakMessage:
    """Reads the JSON object of a message; ValueError if a value is missing or wrong."""
    fields = parse_json_object(text)
    values = {}
    for field in dataclasses.fields(SpeakMessage):
        value = fields.get(field.name)
        if type(value) is not field.type:
            raise ValueError(f"{field.name} must be of type {field.type.__name__}, got {value!r}")
        values[field.name] = value
    message = SpeakMessage(**values)
    check_seed(message.seed)
    return message


class Speaker:
    """A speech model and its codec."""

    def __init__(self, model: Speech, codec: Codec, name: str):
        """Raises ValueError if the model was trained on codes of another codec."""
        speaking.check_codec(model.config, codec)
        self._model = model
        self._codec = codec
        self._name = name

    @classmethod
    def load(cls, path: str, codec: Codec) -> "Speaker":
        """Loads a checkpoint; ValueError if it holds no speech model, or one of another codec."""
        return cls(pretrained.load(path), codec, Path(path).name)

    def describe(self) -> dict[str, Any]:
        """What the page shows about the model, JSON."""
        return {"name": self._name, "num_quantizers": self._model.config.num_quantizers}

    def begin(
        self, message: SpeakMessage, prompt: Recording | None
    ) -> Generator[Block, None, None]:
        """Checks a message and starts to sample.

        Args:
          message: What to say.
          prompt: The recording of the voice, or None.

        Returns:
          Iterator over the blocks of the speech; each is sampled by `next`.

        Raises:
          ValueError: The text is empty or has characters that the tokenizer lacks, the prompt is
            silent or too long, or num_quantizers is out of range.
        """
        request = Request(message.text)
        if prompt is not None:
            speaking.check_prompt(prompt.wav, "the recording of the voice")
            request = speaking.with_prompt(
                self._model.config, message.text, prompt.codes, message.prompt_text
            )
        return speaking.stream_blocks(
            self._model,
            self._codec,
            request,
            seed=message.seed,
            num_quantizers=message.num_quantizers,
        )
