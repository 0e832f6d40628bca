"""Reads sequences of spoken digits from audio, by templates: a measure of intelligibility.

Connected word recognition by dynamic time warping (Ney, 1984, "The use of a one-stage dynamic
programming algorithm for connected word recognition"). Every recording of a single word is a
template; a sequence of templates, with silence between them, is aligned to the audio so that the
sum of the distances of frames is least. Nothing is trained, so the reader knows no grammar and
cannot guess a word that does not sound like one of its templates.
"""

import dataclasses
from collections.abc import Sequence

import librosa
import numpy as np

RATE = 24000
_HOP = 240  # samples, 10 ms
_WINDOW = 720
_TOP_HZ = 3800  # the recordings of digits have nothing above 4 kHz
_NUM_COEFFICIENTS = 13
SILENCE = ""
# Cost of a word; more makes fewer words. The best of 0, 3, 6, 12 on 40 sequences of other clips.
_PENALTY = 3.0


def cepstra(wav: np.ndarray) -> np.ndarray:
    """Mel cepstra [C, T] of audio [S] at `RATE`; the first is the log energy."""
    return librosa.feature.mfcc(
        y=wav, sr=RATE, n_mfcc=_NUM_COEFFICIENTS, n_fft=1024, win_length=_WINDOW, hop_length=_HOP,
        n_mels=26, fmin=80, fmax=_TOP_HZ,
    )  # fmt: skip


def features(wav: np.ndarray) -> np.ndarray:
    """Features [T, 2 C]: cepstra, energy relative to the loudest frame, and their slopes."""
    coefficients = cepstra(wav)
    energy = coefficients[0]
    is_loud = energy > energy.max() - 120  # in the unit of the first coefficient
    coefficients[0] = np.maximum(energy - energy.max(), -150) / 4
    coefficients[1:] -= coefficients[1:, is_loud].mean(axis=1, keepdims=True)
    slopes = np.zeros_like(coefficients)
    if coefficients.shape[1] >= 5:
        slopes = librosa.feature.delta(coefficients, width=5)
    return np.concatenate([coefficients, 3 * slopes]).T.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Reader:
    """Templates of words, one after the other; the last is silence of one frame.

    Attributes:
      frames: [J, D] features of all templates, divided by `scale`.
      words: The word of each template.
      starts: [N] first frame of each template.
      ends: [N] last frame of each template.
      scale: [D] standard deviations of the features.
    """

    frames: np.ndarray
    words: tuple[str, ...]
    starts: np.ndarray
    ends: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, templates: Sequence[tuple[str, np.ndarray]]) -> "Reader":
        """A reader with templates of (word, audio [S])."""
        parts = [features(wav) for _, wav in templates]
        frames = np.concatenate(parts)
        scale = frames.std(axis=0)
        is_quiet = frames[:, 0] <= np.percentile(frames[:, 0], 3)
        silence = frames[is_quiet].mean(axis=0, keepdims=True)
        parts.append(silence)
        sizes = np.array([len(part) for part in parts])
        ends = np.cumsum(sizes) - 1
        starts = ends - sizes + 1
        words = (*(word for word, _ in templates), SILENCE)
        return cls(np.concatenate(parts) / scale, words, starts, ends, scale)

    def read(self, wav: np.ndarray) -> str:
        """The words in audio [S], separated by spaces."""
        frames = features(wav) / self.scale
        distances = _distances(frames, self.frames)  # [T, J]
        silence = len(self.words) - 1
        costs = np.full(len(self.frames), np.inf, np.float32)
        origins = np.full(len(self.frames), -1)  # frame before which a template was entered
        best = np.zeros(len(frames) + 1, np.float32)  # cost of the best sequence up to a frame
        chosen: list[tuple[int, int]] = []  # by frame: the last template, its origin
        for time, distance in enumerate(distances):
            costs, origins = self._advance(costs, origins, best[time], time)
            costs += distance
            at_ends = costs[self.ends]
            template = int(at_ends.argmin())
            best[time + 1] = at_ends[template]
            chosen.append((template, int(origins[self.ends[template]])))
        words = []
        time = len(frames)
        while time > 0:  # from the last template to the first
            template, time = chosen[time - 1]
            if template != silence:
                words.append(self.words[template])
        return " ".join(reversed(words))

    def _advance(
        self, costs: np.ndarray, origins: np.ndarray, best: float, time: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Costs [J] of the best paths to each frame of the templates, and their origins.

        A path stays on a frame, moves to the next one or skips one. It enters a template at its
        first frame.
        """
        path_costs = [costs]
        path_origins = [origins]
        for step in (1, 2):
            moved = np.full_like(costs, np.inf)
            moved[step:] = costs[:-step]
            for offset in range(step):
                inside = self.starts[self.starts + offset <= self.ends] + offset
                moved[inside] = np.inf
            moved_origins = np.full_like(origins, -1)
            moved_origins[step:] = origins[:-step]
            path_costs.append(moved)
            path_origins.append(moved_origins)
        entered = np.full_like(costs, np.inf)
        entered[self.starts] = best + _PENALTY
        entered[self.starts[-1]] = best + _PENALTY / 4
        path_costs.append(entered)
        path_origins.append(np.full_like(origins, time))
        stacked = np.stack(path_costs)
        choice = stacked.argmin(axis=0)
        frames = np.arange(len(costs))
        return stacked[choice, frames], np.stack(path_origins)[choice, frames]


def _distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Euclidean distances [T, J] of features [T, D] and [J, D]."""
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
    return np.sqrt(np.maximum(squares, 0))
