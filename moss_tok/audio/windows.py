"""A file composed of pieces of another file, for decoders that must not see all of it."""

import bisect
import io
import os
from collections.abc import Sequence
from typing import BinaryIO

# Literal bytes, or (offset, length) in the underlying file.
Piece = bytes | tuple[int, int]


class Window(io.RawIOBase):
    """A readable file composed of pieces of a file and literal bytes."""

    def __init__(self, file: BinaryIO, pieces: Sequence[Piece]):
        self._file = file
        self._pieces = [piece for piece in pieces if _length(piece)]
        self._starts = []
        self._size = 0
        for piece in self._pieces:
            self._starts.append(self._size)
            self._size += _length(piece)
        self._position = 0

    def readable(self) -> bool:
        """Always true."""
        return True

    def seekable(self) -> bool:
        """Always true."""
        return True

    def tell(self) -> int:
        """The position."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves the position; returns it."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:
        """Reads into the buffer; returns the number of bytes."""
        view = memoryview(buffer).cast("B")
        filled = 0
        while filled < len(view) and self._position < self._size:
            data = self._read_piece(len(view) - filled)
            if not data:  # the underlying file has become shorter
                break
            view[filled : filled + len(data)] = data
            filled += len(data)
            self._position += len(data)
        return filled

    def _read_piece(self, size: int) -> bytes:
        """At most `size` bytes of the piece at the position."""
        number = bisect.bisect_right(self._starts, self._position) - 1
        piece = self._pieces[number]
        skipped = self._position - self._starts[number]
        if isinstance(piece, bytes):
            return piece[skipped : skipped + size]
        offset, length = piece
        self._file.seek(offset + skipped)
        return self._file.read(min(size, length - skipped))


def _length(piece: Piece) -> int:
    return len(piece) if isinstance(piece, bytes) else piece[1]
