"""Plots: spectrograms, training curves, metrics over bitrates."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moss_tok.audio import files

_MAX_SECONDS = 4.0  # length of a spectrogram; in a longer one pitch cannot be seen


def save_spectrograms(path: Path, wavs: dict[str, np.ndarray], sample_rate: int) -> np.ndarray:
    """Draws spectrograms of the middle 4 s of signals [C, S], stacked, each with its title.

    Returns:
      The image as [height, width, 3] uint8.
    """
    figure, axes = _figure(len(wavs), (9, 2.6 * len(wavs)))
    for axis, (title, wav) in zip(axes, wavs.items(), strict=True):
        _draw_spectrogram(axis, wav, sample_rate)
        axis.set(title=title, ylabel="Hz")
    axes[-1].set(xlabel="seconds")
    _save(figure, path)
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def save_curves(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draws the losses, norms and codebook use in rows of metrics.jsonl.

    Without rows, no file is written.
    """
    names = _curve_names(rows)
    if not names:
        return
    num_rows = math.ceil(len(names) / 2)
    height = 2.0 * num_rows
    # With margins that are computed, every label would be laid out twice.
    figure, axes = _figure(num_rows, (11, height), num_columns=2, layout=None)
    edge = 0.5 / height
    figure.subplots_adjust(0.07, edge, 0.99, 1 - edge / 3, wspace=0.2, hspace=0.12)
    for axis, name in zip(axes, names, strict=False):
        _draw_curve(axis, rows, name)
    for axis in axes[max(0, len(names) - 2) : len(names)]:  # the lowest of each column
        axis.set(xlabel="step")
        axis.tick_params(labelbottom=True)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    _save(figure, path)


def _draw_curve(axis: Any, rows: Sequence[dict[str, Any]], name: str) -> None:
    """Draws the values of a metric, one or several per step, over the steps."""
    steps = []
    logged = []
    for row in rows:
        if isinstance(row.get(name), (float, list)):
            steps.append(row["step"])
            logged.append(row[name])
    values = np.asarray(logged)
    axis.plot(steps, values, color=None if values.ndim == 1 else "C0", alpha=0.8)
    axis.set(ylabel=name.replace("_", " "))
    if name.endswith(("loss", "_norm")) and (values > 0).all():
        _scale_by_logarithm(axis)
    axis.grid(alpha=0.3)


def _scale_by_logarithm(axis: Any) -> None:
    """Few ticks, because each costs as much time as a curve: 1, 2, 5, or more in a narrow range."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set(yscale="log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter("{x:.3g}")


def _curve_names(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The metrics to draw, in the order in which they were first logged."""
    logged: dict[str, None] = {}
    for row in rows:  # all rows, because a row may lack the loss of texts
        logged |= dict.fromkeys(row)
    names = []
    for name in logged:
        if name.endswith(("loss", "_norm")) and "/" not in name:
            names.append(name)
    for name in ("codebook_perplexity", "dead_codes"):
        if name in logged:
            names.append(name)
    return names


# Published values: LibriSpeech test-clean for speech, AudioSet for sound, MUSDB for music.
# (system, bit/s, stoi, pesq-nb, pesq-wb, mel_loss sound, music, stft sound, music)
_PUBLISHED = (
    ("MOSS v1", 1000, 0.94, 3.38, 2.87, 0.82, 0.80, 2.16, 2.04),
    ("MOSS v1", 2000, 0.96, 3.78, 3.41, 0.73, 0.70, 2.03, 1.90),
    ("MOSS v1", 4000, 0.97, 3.95, 3.69, 0.68, 0.64, 1.96, 1.82),
    ("MOSS Nano", 1000, 0.92, 2.92, 2.36, 1.00, 0.97, 2.37, 2.22),
    ("MOSS Nano", 2000, 0.95, 3.40, 2.89, 0.93, 0.89, 2.28, 2.11),
    ("Mimi", 1100, 0.91, 2.80, 2.25, 1.24, 1.19, 2.62, 2.49),
    ("EnCodec", 1500, 0.85, 1.94, 1.56, 1.12, 1.04, 2.60, 2.42),
    ("DAC", 3000, 0.90, 2.76, 2.31, 0.86, 0.83, 2.23, 2.10),
    ("DAC", 6000, 0.95, 3.75, 3.41, 0.65, 0.63, 1.97, 1.87),
)
_PUBLISHED_SYSTEMS = tuple(dict.fromkeys(row[0] for row in _PUBLISHED))
# (domain, metric) -> column
_PUBLISHED_COLUMNS = {
    ("speech", "stoi"): 2,
    ("speech", "pesq-nb"): 3,
    ("speech", "pesq-wb"): 4,
    ("sound", "mel_loss"): 5,
    ("music", "mel_loss"): 6,
    ("sound", "stft"): 7,
    ("music", "stft"): 8,
}


# (bit/s, metric -> value); bit/s is None if unknown.
Point = tuple[float | None, dict[str, float]]


def save_rates(path: Path, curves: dict[str, Sequence[Point]], domain: str) -> None:
    """Draws each metric over the bitrate, a curve per system.

    Args:
      path: PNG file to write.
      curves: System -> points with ascending bitrates; a system without bitrate is a dashed line.
      domain: Domain of the recordings. Published values for "speech", "music" and "sound" are drawn
        hollow and dotted; they were measured on other recordings.
    """
    names = _metric_names(curves)
    if not names:
        return
    colors = {}  # the same for every metric
    for number, system in enumerate([*curves, *_PUBLISHED_SYSTEMS]):
        colors[system] = f"C{number}"
    num_rows = math.ceil(len(names) / 2)
    figure, axes = _figure(num_rows, (11, 3.0 * num_rows), num_columns=2)
    for axis, name in zip(axes, names, strict=False):
        for system, points in curves.items():
            _draw_system(axis, points, name, system, colors[system])
        if (domain, name) in _PUBLISHED_COLUMNS:
            _draw_published(axis, _PUBLISHED_COLUMNS[domain, name], colors)
        axis.set(ylabel=name, xlabel="bit/s", xscale="log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
        axis.grid(alpha=0.3)
    _draw_legend(figure, axes)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    _save(figure, path)


def _metric_names(curves: dict[str, Sequence[Point]]) -> list[str]:
    """The metrics of all points, in the order in which they first occur."""
    names: dict[str, None] = {}
    for points in curves.values():
        for _, means in points:
            names |= dict.fromkeys(means)
    return list(names)


def _draw_system(axis: Any, points: Sequence[Point], name: str, system: str, color: str) -> None:
    """Draws a metric of a system over the bitrate."""
    rates = []
    values = []
    for bps, means in points:
        if name in means:
            rates.append(bps)
            values.append(means[name])
    if not rates:
        return
    if rates[0] is None:
        axis.axhline(values[0], linestyle="--", color=color, label=system)
    else:
        axis.plot(rates, values, marker="o", color=color, label=system)


def _draw_published(axis: Any, column: int, colors: dict[str, str]) -> None:
    for system in _PUBLISHED_SYSTEMS:
        rates = []
        values = []
        for row in _PUBLISHED:
            if row[0] == system:
                rates.append(row[1])
                values.append(row[column])
        label = f"{system}, published"
        axis.plot(rates, values, ":o", fillstyle="none", color=colors[system], label=label)


def _draw_legend(figure: Any, axes: Sequence[Any]) -> None:
    """Draws one legend for all axes, with each label once."""
    line_of = {}
    for axis in axes:
        lines, labels = axis.get_legend_handles_labels()
        line_of |= zip(labels, lines, strict=True)
    location = "outside upper left"
    figure.legend(line_of.values(), line_of.keys(), fontsize="small", loc=location, ncols=5)


def save_spectrogram(path: Path, wav: np.ndarray, sample_rate: int) -> None:
    """Draws a small spectrogram of the middle 4 s of a signal [C, S], for a page."""
    figure, (axis,) = _figure(1, (4.2, 2.2))
    _draw_spectrogram(axis, wav, sample_rate)
    _save(figure, path)


def _draw_spectrogram(axis: Any, wav: np.ndarray, sample_rate: int) -> None:
    middle = wav.shape[-1] // 2
    half = int(_MAX_SECONDS / 2 * sample_rate)
    mono = wav[:, max(0, middle - half) : middle + half].mean(0)
    padding = max(0, 2048 - mono.size)  # at least two windows
    mono = np.pad(mono, (0, padding))
    # Noise of 1e-5, since digital silence has no logarithm.
    noise = np.random.default_rng(0).normal(0, 1e-5, mono.size)
    axis.specgram(
        mono + noise,
        NFFT=1024,
        Fs=sample_rate,
        noverlap=768,
        vmin=-130,
        vmax=-30,
        cmap="magma",
    )


def _figure(
    num_rows: int,
    size: tuple[float, float],
    num_columns: int = 1,
    layout: str | None = "constrained",
) -> tuple[Any, Any]:
    # Imported here because it is slow; not through pyplot, which may need a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.subplots(num_rows, num_columns, sharex=True, squeeze=False)
    return figure, axes.ravel()


def _save(figure: Any, path: Path) -> None:
    files.write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=100))
