"""The public names of moss_tok.language and where they are defined."""

from .config import LanguageConfig as LanguageConfig
from .generate import Language as Language
from .generate import Sampling as Sampling
from .generate import transcribe as transcribe
from .generate import transcribe_codes as transcribe_codes
from .generate import transcribe_wavs as transcribe_wavs
from .pretrained import load as load
