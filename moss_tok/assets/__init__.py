"""Files that come with the package: a small codec, trained by the recipe in experiments/."""

from pathlib import Path

CODEC = Path(__file__).parent / "codec"
# Warning that `moss-tok info` and `moss-tok demo` print.
NOTE = "a demonstration of the recipe, not a replacement for the published weights"


def codec_folder() -> Path:
    """The folder of the codec in the package, in the official layout.

    Raises:
      ValueError: This copy of the package has no codec.
    """
    if not (CODEC / "config.json").is_file():
        raise ValueError(f"this copy of moss_tok has no codec ({CODEC} is missing): name another")
    return CODEC
