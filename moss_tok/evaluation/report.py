"""Pictures: spectrogram pairs and training curves."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moss_tok.audio import files

_PICTURE_SECONDS = 4.0  # longer, and pitch cannot be seen


def save_spectrograms(path: Path, wavs: dict[str, np.ndarray], sample_rate: int) -> np.ndarray:
    """Draws spectrograms of the middle 4 s of [C, S] signals, one under the other, with titles.

    Returns:
      The picture as [height, width, 3] uint8.
    """
    figure, axes = _figure(len(wavs), (9, 2.6 * len(wavs)))
    for axis, (title, wav) in zip(axes, wavs.items(), strict=True):
        middle, half = wav.shape[-1] // 2, int(_PICTURE_SECONDS / 2 * sample_rate)
        wav = wav[:, max(0, middle - half) : middle + half]
        # 1e-5 of noise floor: digital silence has no logarithm.
        noise = np.random.default_rng(0).normal(0, 1e-5, wav.shape[-1])
        axis.specgram(
            wav.mean(0) + noise, NFFT=1024, Fs=sample_rate, noverlap=768, vmin=-130, vmax=-30,
            cmap="magma",
        )  # fmt: skip
        axis.set(title=title, ylabel="Hz")
    axes[-1].set(xlabel="seconds")
    _save(figure, path)
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def save_curves(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draws the losses, norms and codebook health of metrics.jsonl rows; nothing without rows."""
    names = [
        n for n in (rows[-1] if rows else ()) if n.endswith(("loss", "_norm")) and "/" not in n
    ]
    names += [n for n in ("codebook_perplexity", "dead_codes") if rows and n in rows[-1]]
    rows = [r for r in rows if all(isinstance(r.get(n), (float, list)) for n in names)]
    if not names or not rows:
        return
    num_rows = -(-len(names) // 2)
    figure, axes = _figure(num_rows, (11, 2.0 * num_rows), num_columns=2)
    steps = [r["step"] for r in rows]
    for axis, name in zip(axes, names, strict=False):
        values = np.asarray([r[name] for r in rows])
        axis.plot(steps, values, color=None if values.ndim == 1 else "C0", alpha=0.8)
        axis.set(ylabel=name.replace("_", " "))
        if name.endswith(("loss", "_norm")) and (values > 0).all():
            axis.set(yscale="log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:.3g}")
        axis.grid(alpha=0.3)
    for axis in axes[-2:]:
        axis.set(xlabel="step")
    _save(figure, path)


def _figure(num_rows: int, size: tuple[float, float], num_columns: int = 1) -> tuple[Any, Any]:
    # Slow to import; without pyplot no display is needed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(num_rows, num_columns, sharex=True, squeeze=False).ravel()


def _save(figure: Any, path: Path) -> None:
    files.write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=100))
