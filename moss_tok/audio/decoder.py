"""The interface of all decoders, and a chain of decoders."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

BLOCK_FRAMES = 65536


class Decoder(Protocol):
    """Reads the samples of one stream, from any position onwards.

    Attributes:
      sample_rate: Hz.
      num_channels: C.
      num_frames: Samples per channel; None if this is known only after reading.
      subtype: Format of the stored samples, by libsndfile's name.
    """

    sample_rate: int
    num_channels: int
    num_frames: int | None
    subtype: str

    def read(self, frames: int) -> np.ndarray:
        """The next [S, C] float32; S is less than `frames` only at the end.

        Raises:
          ValueError: The file is damaged; the message names it.
        """

    def count(self) -> int:
        """Samples per channel; reads everything if there is no other way.

        Call `seek` before reading again.
        """

    def seek(self, frame: int) -> None:
        """Moves to a sample; `read` then returns the same samples as when everything is read."""

    def close(self) -> None:
        """Frees the resources of the library."""


def read_blocks(decoder: Decoder) -> Iterator[np.ndarray]:
    """Yields blocks [S, C] up to the end."""
    while True:
        wav = decoder.read(BLOCK_FRAMES)
        if wav.shape[0]:
            yield wav
        if wav.shape[0] < BLOCK_FRAMES:
            return


def read_all(decoder: Decoder) -> np.ndarray:
    """All samples, [S, C]."""
    if decoder.num_frames is not None:
        return decoder.read(decoder.num_frames)
    blocks = [np.zeros((0, decoder.num_channels), np.float32)]
    blocks += read_blocks(decoder)
    return np.concatenate(blocks)


def skip(decoder: Decoder, frames: int) -> None:
    """Reads and discards samples."""
    while frames > 0:
        wav = decoder.read(min(frames, BLOCK_FRAMES))
        if not wav.shape[0]:
            return
        frames -= wav.shape[0]


class Chain:
    """A `Decoder` of several streams in sequence; only one of them is open at a time."""

    def __init__(self, name: str, makers: Sequence[Callable[[], Decoder]]):
        """Opens each of the streams once.

        Raises:
          ValueError: They have different sample rates or numbers of channels.
        """
        self._name = name
        self._makers = list(makers)
        self._lengths = []
        shapes = []
        for maker in self._makers:
            decoder = maker()
            self._lengths.append(decoder.count())
            shapes.append((decoder.sample_rate, decoder.num_channels))
            subtype = decoder.subtype
            decoder.close()
        for shape in shapes:
            if shape != shapes[0]:
                raise ValueError(
                    f"{name}: has parts of different kinds: {_describe(shapes[0])}, then "
                    f"{_describe(shape)}; convert them to one kind first"
                )
        self.sample_rate, self.num_channels = shapes[0]
        self.num_frames = sum(self._lengths)
        self.subtype = subtype
        self._open(0)

    def _open(self, number: int) -> None:
        self._number = number
        self._decoder = self._makers[number]()

    def read(self, frames: int) -> np.ndarray:
        """See `Decoder`."""
        blocks = [self._decoder.read(frames)]
        num_missing = frames - blocks[0].shape[0]
        while num_missing > 0 and self._number + 1 < len(self._makers):
            self._decoder.close()
            self._open(self._number + 1)
            blocks.append(self._decoder.read(num_missing))
            num_missing -= blocks[-1].shape[0]
        return np.concatenate(blocks)

    def count(self) -> int:
        """See `Decoder`."""
        return self.num_frames

    def seek(self, frame: int) -> None:
        """See `Decoder`."""
        number = 0
        while number + 1 < len(self._lengths) and frame >= self._lengths[number]:
            frame -= self._lengths[number]
            number += 1
        if number != self._number:
            self._decoder.close()
            self._open(number)
        self._decoder.seek(frame)

    def close(self) -> None:
        """See `Decoder`."""
        self._decoder.close()


def _describe(shape: tuple[int, int]) -> str:
    sample_rate, num_channels = shape
    return f"{sample_rate} Hz, {num_channels} channel{'s' if num_channels > 1 else ''}"
