"""Training data: grain pipelines whose every batch is a function of (seed, index).

`read_codes` reads what `moss-tok tokenize` wrote. It is imported on first use: grain is slow to
import, and audio alone does not need it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
