"""The public names of moss_tok.speech and where they are defined."""

from .config import SpeechConfig as SpeechConfig
from .generate import Spoken as Spoken
from .layout import Request as Request
from .pretrained import load as load
from .sampling import Channel as Channel
from .sampling import Sampling as Sampling
from .speaking import SpokenAudio as SpokenAudio
from .speaking import speak as speak
from .speaking import stream as stream
from .speaking import with_prompt as with_prompt
from .steps import Speech as Speech
