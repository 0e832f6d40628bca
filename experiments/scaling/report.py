"""Tables and plots of the scaling studies."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fits
import matplotlib
import numpy as np
from points import (
    BATCH_SIZE,
    BATCH_SIZES,
    DROPOUTS,
    SIZES,
    SMALLEST,
    STREAMS,
    Point,
    learning_rate,
)

from moss_tok.audio import files

matplotlib.use("Agg")  # no display
import matplotlib.pyplot as plt

Results = dict[Point, dict[str, Any]]

SIZES_HEADER = (
    "model", "parameters", "FLOPs", "held-out loss", "95 %", "before the cooldown",
)  # fmt: skip


def losses_of(
    results: Results, chosen: Callable[[Point], bool], step: int = -1, quantizers: int = -1
) -> np.ndarray:
    """Held-out losses [seeds, recordings] of the points that are chosen.

    `step` and `quantizers` are indices; the last ones (-1) are the end of the run and all
    quantizers.
    """
    rows = []
    for point, result in results.items():
        if chosen(point):
            by_step = _sorted_values(result["losses"])[step]
            rows.append(_sorted_values(by_step)[quantizers])
    return np.array(rows)


def _sorted_values(by_number: dict[str, Any]) -> list[Any]:
    return [by_number[key] for key in sorted(by_number, key=int)]


def first(results: Results, chosen: Callable[[Point], bool]) -> dict[str, Any]:
    """The result of the first point that is chosen."""
    return next(result for point, result in results.items() if chosen(point))


def domains_of(results: Results) -> list[str]:
    """The domain of every held-out recording, the same for all points."""
    return next(iter(results.values()))["domains"]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def write(study: str, results: Results, out: Path) -> str:
    """Writes OUT/STUDY.md and OUT/STUDY.png; returns the text."""
    figure, text = _REPORTS[study](results)
    figure.tight_layout()
    figure.savefig(out / f"{study}.png", dpi=110)
    plt.close(figure)
    files.write_text(out / f"{study}.md", text + "\n")
    return text


def is_baseline(size: str) -> Callable[[Point], bool]:
    """Whether a point is a run of this size in the study `sizes`."""
    return lambda point: point.size == size and point.name.startswith("size-")


def sizes_of(results: Results) -> list[str]:
    """The sizes that have results, smallest first."""
    sizes = []
    for size in SIZES:
        is_chosen = is_baseline(size)
        if any(is_chosen(point) for point in results):
            sizes.append(size)
    return sizes


def sizes(results: Results) -> tuple[plt.Figure, str]:
    """Loss against parameters and against compute, after cooldowns."""
    domains = domains_of(results)
    names = sizes_of(results)
    parameters = parameters_of(results)
    compute, curves = _cooldowns(results)
    losses = curves[:, -1]
    law = fits.bootstrap(parameters, losses, domains)
    predicted = fits.predict_largest(parameters, losses, domains)
    compute_law = _law_of_frontier(compute, curves, domains)

    means = fits.mean_loss(losses, domains).mean(-1)
    starts = np.array([losses_of(results, is_baseline(size)) for size in names])
    start_means = fits.mean_loss(starts, domains).mean(-1)
    low, high = np.percentile(fits.resample(losses, domains), fits.PERCENTILES, axis=0)
    rows = []
    for number, size in enumerate(names):
        interval = f"{low[number]:.2f} to {high[number]:.2f}"
        flops = f"{compute[number, -1]:.3g}"
        cells = [flops, f"{means[number]:.3f}", interval, f"{start_means[number]:.3f}"]
        rows.append([size, f"{parameters[number]:,}", *cells])
    text = [
        table(SIZES_HEADER, rows),
        _law_text("loss", "parameters", law),
        f"The largest, predicted from the others: {predicted.predicted:.3f} "
        f"({predicted.low:.3f} to {predicted.high:.3f}), measured {predicted.measured:.3f}: "
        f"an error of {predicted.error:+.2%}.",
    ]
    if compute_law is not None:
        text.insert(2, _law_text("loss", "FLOPs", compute_law))

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    _draw_law(left, law, parameters)
    left.plot(parameters, means, "o", color="C0", label="measured")
    errors = [[predicted.predicted - predicted.low], [predicted.high - predicted.predicted]]
    left.errorbar(parameters.max(), predicted.predicted, errors, fmt="x", color="C3",
                  label="predicted from the others")  # fmt: skip
    _label(left, "parameters", "held-out loss")
    for number, size in enumerate(names):
        curve = fits.mean_loss(curves[number], domains).mean(-1)
        right.plot(compute[number], curve, "o-", label=size, markersize=4)
    if compute_law is not None:
        _draw_law(right, compute_law, compute)
    _label(right, "training FLOPs", "held-out loss")
    return figure, "\n\n".join(text)


def parameters_of(results: Results) -> np.ndarray:
    """Numbers of parameters of the sizes."""
    singles = [first(results, is_baseline(size)) for size in sizes_of(results)]
    return np.array([result["parameters"] for result in singles])


def _law_of_frontier(
    compute: np.ndarray, curves: np.ndarray, domains: list[str]
) -> fits.Fit | None:
    """The power law of the lowest losses at each compute; None if one point is below all others."""
    flat = curves.reshape(-1, *curves.shape[2:])
    means = fits.mean_loss(flat, domains).mean(-1)
    best = fits.frontier(compute.ravel(), means)
    if len(best) < 2:
        return None
    return fits.bootstrap(compute.ravel()[best], flat[best], domains)


def _cooldowns(results: Results) -> tuple[np.ndarray, np.ndarray]:
    """FLOPs [sizes, cooldowns] and losses [sizes, cooldowns, seeds, recordings]."""
    compute = []
    curves = []
    for size in sizes_of(results):
        flops_per_step = first(results, is_baseline(size))["flops_per_step"]
        steps: dict[int, int] = {}  # of training, by the step from which the rate falls
        for point in results:
            if point.size == size and point.cools_from:
                steps[point.cools_from] = point.cools_from + point.num_steps
        compute.append([flops_per_step * steps[start] for start in sorted(steps)])
        curves.append([losses_of(results, _cooled(size, start)) for start in sorted(steps)])
    return np.array(compute), np.array(curves)


def _cooled(size: str, step: int) -> Callable[[Point], bool]:
    return lambda point: point.size == size and point.cools_from == step


def _law_text(y: str, x: str, law: fits.Fit) -> str:
    low, high = law.exponent_interval()
    return f"{y} = {law.law.scale:.4g} * {x}^-{law.law.exponent:.4f} ({low:.4f} to {high:.4f})"


def _draw_law(axes: plt.Axes, law: fits.Fit, x: np.ndarray) -> None:
    grid = np.geomspace(np.min(x), np.max(x), 50)
    low, high = law.band(grid)
    axes.fill_between(grid, low, high, color="0.85", label="95 % band")
    axes.plot(grid, law.law(grid), color="0.4", label=f"exponent {-law.law.exponent:.3f}")


def _label(axes: plt.Axes, x: str, y: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())  # they would overlap
    axes.yaxis.set_minor_formatter(matplotlib.ticker.ScalarFormatter())
    axes.yaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(fontsize=8)


def joint(results: Results) -> tuple[plt.Figure, str]:
    """Continued training, end to end and with a frozen encoder and quantizer."""
    domains = domains_of(results)
    kinds = {
        "start": is_baseline,
        "end to end": lambda size: _continued(size, "all"),
        "frozen encoder": lambda size: _continued(size, "decoder"),
    }
    names = sizes_of(results)
    parameters = parameters_of(results)
    losses = {}
    for kind, chosen in kinds.items():
        losses[kind] = np.array([losses_of(results, chosen(size)) for size in names])
    gain = _difference(losses["end to end"], losses["frozen encoder"], domains)
    figure, axes = plt.subplots(figsize=(6, 4))
    means = {}
    laws = []
    for number, (kind, values) in enumerate(losses.items()):
        means[kind] = fits.mean_loss(values, domains).mean(-1)
        law = fits.bootstrap(parameters, values, domains)
        laws.append(f"{kind}: {_law_text('loss', 'parameters', law)}  ")
        axes.plot(parameters, means[kind], "o", color=f"C{number}")
        axes.plot(parameters, law.law(parameters), color=f"C{number}", label=kind)
    _label(axes, "parameters", "held-out loss")
    rows = []
    for number, size in enumerate(names):
        cells = [f"{means[kind][number]:.3f}" for kind in kinds]
        rows.append([size, *cells, gain[number]])
    header = ["model", "start", "continued end to end", "continued with a frozen encoder",
              "end to end minus frozen, 95 %"]  # fmt: skip
    return figure, "\n\n".join([table(header, rows), "\n".join(laws)])


def _continued(size: str, trainable: str) -> Callable[[Point], bool]:
    return lambda point: point.size == size and point.start and point.trainable == trainable


def _difference(losses: np.ndarray, others: np.ndarray, domains: list[str]) -> list[str]:
    """Means and intervals of losses - others, both [P, seeds, recordings]."""
    mean = fits.mean_loss(losses - others, domains).mean(-1)
    draws = fits.resample(losses - others, domains)
    low, high = np.percentile(draws, fits.PERCENTILES, axis=0)
    texts = []
    for number in range(len(mean)):
        texts.append(f"{mean[number]:+.3f} ({low[number]:+.3f} to {high[number]:+.3f})")
    return texts


def dropout(results: Results) -> tuple[plt.Figure, str]:
    """Loss against the number of quantizers, with several shares of quantizer dropout."""
    domains = domains_of(results)
    by_step = next(iter(results.values()))["losses"]
    numbers = sorted(map(int, by_step[max(by_step, key=int)]))
    figure, axes = plt.subplots(figsize=(6, 4))
    rows = []
    for share in DROPOUTS:
        means = []
        for place in range(len(numbers)):
            losses = losses_of(results, lambda p, s=share: p.quantizer_dropout == s, -1, place)
            means.append(float(fits.mean_loss(losses, domains).mean()))
        rows.append([f"{share:g}", *(f"{mean:.3f}" for mean in means)])
        axes.plot(numbers, means, "o-", label=f"quantizer dropout {share:g}")
    _label(axes, "quantizers in use", "held-out loss")
    axes.set_xticks(numbers, [str(number) for number in numbers])
    header = ["quantizer dropout", *(_quantizers(number) for number in numbers)]
    return figure, table(header, rows)


def _quantizers(number: int) -> str:
    return f"{number} quantizer{'s' if number > 1 else ''}"


def batch(results: Results) -> tuple[plt.Figure, str]:
    """Loss against batch size, on the same amount of audio."""
    domains = domains_of(results)
    means = []
    rows = []
    baseline = losses_of(results, lambda point: point.batch_size == BATCH_SIZE)
    for size in BATCH_SIZES:
        losses = losses_of(results, lambda point, size=size: point.batch_size == size)
        point = next(point for point in results if point.batch_size == size)
        means.append(float(fits.mean_loss(losses, domains).mean()))
        change = _difference(losses[None], baseline[None], domains)[0]
        rate = learning_rate(SMALLEST, size)
        rows.append([str(size), str(point.num_steps), f"{rate:.2g}", f"{means[-1]:.3f}", change])
    figure, axes = plt.subplots(figsize=(6, 4))
    axes.plot(BATCH_SIZES, means, "o-", label="same audio")
    _label(axes, "batch size", "held-out loss")
    axes.set_xticks(BATCH_SIZES, [str(size) for size in BATCH_SIZES])
    header = ["batch size", "steps", "learning rate", "held-out loss",
              f"minus batch size {BATCH_SIZE}, 95 %"]  # fmt: skip
    return figure, table(header, rows)


def streams(results: Results) -> tuple[plt.Figure, str]:
    """Loss after each quarter of training, with float32 and with bfloat16 residual streams."""
    domains = domains_of(results)
    result = next(iter(results.values()))
    steps = sorted(map(int, result["losses"]))
    float32 = _loss_curve(results, STREAMS[0], len(steps))
    figure, axes = plt.subplots(figsize=(6, 4))
    rows = []
    for dtype in STREAMS:
        losses = _loss_curve(results, dtype, len(steps))
        means = fits.mean_loss(losses, domains).mean(-1)
        axes.plot(steps, means, "o-", label=f"{dtype} streams")
        cells = [f"{mean:.3f}" for mean in means]
        rows.append([dtype, *cells, _difference(losses, float32, domains)[-1]])
    _label(axes, "steps", "held-out loss")
    axes.set_xticks(steps, [str(step) for step in steps])
    header = ["residual streams", *(f"step {step}" for step in steps), "end minus float32, 95 %"]
    return figure, table(header, rows)


def _loss_curve(results: Results, dtype: str, num_steps: int) -> np.ndarray:
    """Losses [checkpoints, seeds, recordings] of the points with these streams."""
    curve = []
    for place in range(num_steps):
        curve.append(losses_of(results, lambda point: point.dtype == dtype, place))
    return np.array(curve)


_REPORTS = {"sizes": sizes, "joint": joint, "dropout": dropout, "batch": batch, "streams": streams}
