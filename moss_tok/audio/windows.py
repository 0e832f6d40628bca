"""A file made of pieces of another one, for decoders that should not see the rest."""

import bisect
import io
import os
from collections.abc import Sequence
from typing import BinaryIO

# Bytes as they are, or (offset, length) of the file underneath.
Piece = bytes | tuple[int, int]


class Window(io.RawIOBase):
    """Pieces of a file, and bytes between them, as one file to read."""

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
        """As of every file that can be read."""
        return True

    def seekable(self) -> bool:
        """As of every file on a disk."""
        return True

    def tell(self) -> int:
        """Where the next byte comes from."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As of every file."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:
        """Fills the buffer as far as the pieces go."""
        view = memoryview(buffer).cast("B")
        filled = 0
        while filled < len(view) and self._position < self._size:
            data = self._read_piece(len(view) - filled)
            if not data:  # the file underneath has become shorter
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
