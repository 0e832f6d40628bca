"""A causal language model over audio and text: the paper's semantic head, and speech recognition.

`load` reads a trained model; `transcribe`, `transcribe_codes` and `transcribe_wavs` return texts.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
