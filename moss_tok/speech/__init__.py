"""Speech from text: a model that predicts the codes of a codec (the paper's CAT-TTS).

`load` reads a model, `speak` returns audio, and `stream` yields it while it is sampled.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
