"""A causal language model over audio and text: the paper's semantic head, and speech recognition.

`load` reads a trained model; `transcribe`, `transcribe_codes` and `transcribe_wavs` return texts.
"""

from moss_tok import import_on_use

_MODULES = {
    "Language": "moss_tok.language.generate",
    "LanguageConfig": "moss_tok.language.config",
    "Sampling": "moss_tok.language.generate",
    "load": "moss_tok.language.pretrained",
    "transcribe": "moss_tok.language.generate",
    "transcribe_codes": "moss_tok.language.generate",
    "transcribe_wavs": "moss_tok.language.generate",
}

__all__ = sorted(_MODULES)

__getattr__ = import_on_use(__name__, _MODULES)
