"""Draws docs/pictures/spectrograms.png: a recording, and what the codec in the package makes of it.

    python docs/pictures.py [COMPARED]

COMPARED is the output of `moss-tok compare`; without it, the command runs on a recording of the
starter set. Run this again when the codec in the package changes.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

ROOT = Path(__file__).parents[1]
RECORDING = ROOT / "experiments" / "starter" / "speech-test-00.opus"
PICTURE = ROOT / "docs" / "pictures" / "spectrograms.png"

_SECONDS = (2.5, 4.5)  # of the recording: in a longer part pitch cannot be seen
_MAX_HZ = 6000
_PANELS = {
    "original": "original.wav",
    "16 quantizers, 4000 bit/s": "16_quantizers.wav",
    "8 quantizers, 2000 bit/s": "8_quantizers.wav",
    "4 quantizers, 1000 bit/s": "4_quantizers.wav",
    "1 quantizer, 250 bit/s": "1_quantizer.wav",
}


def draw(compared: Path, picture: Path) -> None:
    """Draws the spectrograms side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3), layout="constrained", dpi=90)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(_PANELS), sharey=True)
    for axis, (title, name) in zip(axes, _PANELS.items(), strict=True):
        wav, rate = soundfile.read(compared / name)
        first, last = (int(seconds * rate) for seconds in _SECONDS)
        # Noise of 1e-5, since digital silence has no logarithm.
        wav = wav[first:last] + np.random.default_rng(0).normal(0, 1e-5, last - first)
        axis.specgram(
            wav, NFFT=1024, pad_to=2048, Fs=rate, noverlap=896, vmin=-120, vmax=-40, cmap="magma"
        )
        axis.set(title=title, xlabel="seconds", ylim=(0, _MAX_HZ))
        axis.title.set_fontsize("medium")
    axes[0].set(ylabel="Hz")
    figure.canvas.draw()
    image = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])
    # 64 colours are enough, and make the file a third as large.
    image.quantize(64).save(picture, optimize=True)


def main(argv: list[str]) -> None:
    """Draws the picture from the given comparison, or from a new one."""
    if argv:
        draw(Path(argv[0]), PICTURE)
        return
    from moss_tok.cli.main import main as moss_tok

    with tempfile.TemporaryDirectory() as folder:
        compared = Path(folder) / "compared"
        if code := moss_tok(["compare", str(RECORDING), str(compared)]):
            sys.exit(code)
        draw(compared, PICTURE)


if __name__ == "__main__":
    main(sys.argv[1:])
