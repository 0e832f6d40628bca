"""A causal language model over audio and text: the semantic head, and speech recognition."""

import importlib

_WHERE = {
    "Language": "moss_tok.language.generate",
    "LanguageConfig": "moss_tok.language.config",
    "Sampling": "moss_tok.language.generate",
    "load": "moss_tok.language.pretrained",
    "transcribe": "moss_tok.language.generate",
    "transcribe_wavs": "moss_tok.language.generate",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'moss_tok.language' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
