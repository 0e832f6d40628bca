"""Speech from text: a model that predicts the codes of a codec (the paper's CAT-TTS).

`load` reads a model, `speak` returns audio, and `stream` yields it while it is sampled.
"""

from moss_tok import import_on_use

_MODULES = {
    "Channel": "moss_tok.speech.sampling",
    "Request": "moss_tok.speech.layout",
    "Sampling": "moss_tok.speech.sampling",
    "Speech": "moss_tok.speech.steps",
    "SpeechConfig": "moss_tok.speech.config",
    "Spoken": "moss_tok.speech.generate",
    "SpokenAudio": "moss_tok.speech.speaking",
    "load": "moss_tok.speech.pretrained",
    "speak": "moss_tok.speech.speaking",
    "stream": "moss_tok.speech.speaking",
    "with_prompt": "moss_tok.speech.speaking",
}

__all__ = sorted(_MODULES)

__getattr__ = import_on_use(__name__, _MODULES)
