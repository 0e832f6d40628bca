"""Power laws, fitted by least squares in logarithms, with bootstrap confidence bands."""

import dataclasses

import numpy as np

NUM_DRAWS = 2000
PERCENTILES = (2.5, 97.5)  # of a 95 % band


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """loss = scale * x ** -exponent; the fields are numbers, or arrays of as many fits."""

    scale: np.ndarray
    exponent: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The loss at x; with arrays of fits, [fits, *x.shape]."""
        x = np.asarray(x, np.float64)
        return np.multiply.outer(self.scale, np.ones_like(x)) * np.exp(
            -np.multiply.outer(self.exponent, np.log(x))
        )


@dataclasses.dataclass(frozen=True)
class Fit:
    """A power law and those of bootstrap samples."""

    law: PowerLaw
    draws: PowerLaw

    def band(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper ends of the 95 % confidence band at x."""
        low, high = np.percentile(self.draws(x), PERCENTILES, axis=0)
        return low, high

    def exponent_interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the exponent."""
        low, high = np.percentile(self.draws.exponent, PERCENTILES)
        return float(low), float(high)


def fit(x: np.ndarray, losses: np.ndarray) -> PowerLaw:
    """Least squares in logarithms: x [P] and losses [..., P] to laws of shape [...].

    Raises:
      ValueError: There are fewer than two different x.
    """
    log_x = np.log(np.asarray(x, np.float64))
    if len(np.unique(log_x)) < 2:
        raise ValueError("a power law needs at least two different sizes")
    log_loss = np.log(losses)
    centred = log_x - log_x.mean()
    slope = (log_loss * centred).sum(-1) / (centred**2).sum()
    intercept = log_loss.mean(-1) - slope * log_x.mean()
    return PowerLaw(np.exp(intercept), -slope)


def mean_loss(losses: np.ndarray, domains: list[str]) -> np.ndarray:
    """The mean over domains of the mean over recordings: [..., recordings] to [...]."""
    names = np.array(domains)
    means = [losses[..., names == name].mean(-1) for name in sorted(set(domains))]
    return np.mean(means, axis=0)


def resample(losses: np.ndarray, domains: list[str], num_draws: int = NUM_DRAWS) -> np.ndarray:
    """Mean losses [num_draws, P] of bootstrap samples of losses [P, seeds, recordings].

    Recordings are drawn within their domain, the same ones for all P points; the seed of each
    point is drawn by itself. With one seed, the samples say nothing of how runs differ.
    """
    random = np.random.default_rng(0)
    names = np.array(domains)
    num_points, num_seeds, _ = losses.shape
    rows = np.arange(num_points)
    samples = []
    for _ in range(num_draws):
        seeds = random.integers(0, num_seeds, (num_points, num_seeds))
        means = []
        for name in sorted(set(domains)):
            places = np.flatnonzero(names == name)
            drawn = random.choice(places, len(places))
            per_seed = losses[:, :, drawn].mean(-1)
            means.append(per_seed[rows[:, None], seeds].mean(-1))
        samples.append(np.mean(means, axis=0))
    return np.array(samples)


def bootstrap(x: np.ndarray, losses: np.ndarray, domains: list[str]) -> Fit:
    """The fit to x [P] and losses [P, seeds, recordings]."""
    law = fit(x, mean_loss(losses, domains).mean(-1))
    return Fit(law, fit(x, resample(losses, domains)))


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The loss of the largest model, predicted from the others.

    Attributes:
      predicted: By the power law.
      low: Lower end of the 95 % interval of the prediction.
      high: Its upper end.
      measured: The loss that the model has.
    """

    predicted: float
    low: float
    high: float
    measured: float

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.measured - 1


def predict_largest(x: np.ndarray, losses: np.ndarray, domains: list[str]) -> Prediction:
    """Fits all points but that of the largest x, and predicts it."""
    order = np.argsort(x)
    smaller = order[:-1]
    largest = order[-1]
    law = bootstrap(x[smaller], losses[smaller], domains)
    low, high = law.band(x[largest])
    return Prediction(
        predicted=float(law.law(x[largest])),
        low=float(low),
        high=float(high),
        measured=float(mean_loss(losses[largest], domains).mean()),
    )


def frontier(compute: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Indices of points [P] with a lower loss than all points with less compute, in order."""
    chosen = []
    best = np.inf
    for index in np.lexsort((losses, compute)):
        if losses[index] < best:
            best = losses[index]
            chosen.append(index)
    return np.array(chosen)
