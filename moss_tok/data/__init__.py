"""Training data: grain pipelines whose every batch is a function of (seed, index)."""


def __getattr__(name: str):
    if name != "read_codes":
        raise AttributeError(f"module 'moss_tok.data' has no attribute {name!r}")
    from moss_tok.data import codes  # grain is slow to import, and not needed for audio alone

    return codes.read_codes
