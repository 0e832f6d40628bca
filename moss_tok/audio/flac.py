"""Tells whether FLAC files are complete, and finds files that were appended to each other.

A few frame headers are enough for both, so that a segment of a long file can be read without
reading all of it.
"""

import dataclasses
import functools
from typing import BinaryIO

import numpy as np

_MARK = b"fLaC"
_BEGINNING = _MARK + b"\0\0\0\x22"  # with the header of the block that is always first
_FRAME_MARKS = (b"\xff\xf8", b"\xff\xf9")  # of fixed and of variable size
_NUM_PROBES = 4
_PROBE_BYTES = 1 << 16
_LONGEST_FRAME = 1 << 17  # bytes; the decoder checks longer ones
_CHUNK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class StreamInfo:
    """The header of a FLAC stream; `num_samples` is 0 if the encoder did not know it."""

    block_size: int
    num_samples: int


def read_info(file: BinaryIO, start: int) -> StreamInfo | None:
    """The stream information of a FLAC file that begins at `start`; None if there is none."""
    file.seek(start)
    head = file.read(42)
    if len(head) < 42 or head[:8] not in (_BEGINNING, _MARK + b"\x80\0\0\x22"):
        return None
    block_size = int.from_bytes(head[8:10], "big")
    return StreamInfo(block_size, int.from_bytes(head[21:26], "big") & (1 << 36) - 1)


def find_streams(file: BinaryIO, start: int, end: int) -> list[tuple[int, int]]:
    """Ranges (first byte, byte after the last) of the FLAC files between two offsets of a file.

    There is one range unless files were concatenated.
    """
    info = read_info(file, start)
    is_long = end - start > _NUM_PROBES * _PROBE_BYTES
    if info is None:
        return [(start, end)]
    if is_long and _goes_up(file, start, end, info) and _last_frame(file, start, end, info):
        return [(start, end)]
    starts = _find_all(file, start, end)
    return list(zip(starts, [*starts[1:], end], strict=True))


def is_whole(file: BinaryIO, start: int, end: int) -> bool:
    """Whether the last frame of a stream is certainly there, or its header does not identify it.

    If this is False, only decoding the end can tell.
    """
    info = read_info(file, start)
    if info is None or not info.num_samples:
        return info is not None
    frame = _last_frame(file, start, end, info)
    return bool(frame) and _crc16(frame) == 0


def _find_all(file: BinaryIO, start: int, end: int) -> list[int]:
    """Where FLAC files begin; the first begins at `start`."""
    starts = [start]
    tail = b""
    offset = start
    file.seek(start)
    while chunk := file.read(min(_CHUNK_BYTES, end - offset)):
        data = tail + chunk
        origin = offset - len(tail)
        place = data.find(_BEGINNING)
        while place >= 0:
            if origin + place > starts[-1] and read_info(file, origin + place):
                starts.append(origin + place)
            place = data.find(_BEGINNING, place + 1)
        offset += len(chunk)
        tail = data[-(len(_BEGINNING) - 1) :]
        file.seek(offset)
    return starts


def _last_frame(file: BinaryIO, start: int, end: int, info: StreamInfo) -> bytes:
    """The bytes from the header of the last frame on; empty if it is not found."""
    size = min(end - start, _LONGEST_FRAME)
    file.seek(end - size)
    data = file.read(size)
    if data[-128:-125] == b"TAG":
        data = data[:-128]
    for mark in _FRAME_MARKS:
        place = len(data)
        while (place := data.rfind(mark, 0, place)) >= 0:
            frame = _parse_frame(data[place : place + 16], info)
            if frame and sum(frame) == info.num_samples:
                return data[place:]
    return b""


def _goes_up(file: BinaryIO, start: int, end: int, info: StreamInfo) -> bool:
    """Whether the positions in the stream go up from probe to probe."""
    before = -1
    for probe in range(_NUM_PROBES):
        file.seek(start + (end - start) * (2 * probe + 1) // (2 * _NUM_PROBES))
        first = _first_frame(file.read(_PROBE_BYTES), info)
        if first is None or first <= before:
            return False
        before = first
    return True


def _first_frame(data: bytes, info: StreamInfo) -> int | None:
    """The first sample of the first frame in `data`; None if no frame begins there."""
    for mark in _FRAME_MARKS:
        place = -1
        while (place := data.find(mark, place + 1)) >= 0:
            frame = _parse_frame(data[place : place + 16], info)
            if frame:
                return frame[0]
    return None


def _parse_frame(header: bytes, info: StreamInfo) -> tuple[int, int] | None:
    """First sample and number of samples of a frame; None if this is not a frame header."""
    if len(header) < 6 or header[3] & 1 or header[2] & 15 == 15:
        return None
    number, place = _utf8_number(header, 4)
    code = header[2] >> 4
    if number is None or code == 0:
        return None
    if code in (6, 7):
        length = code - 5
        size = int.from_bytes(header[place : place + length], "big") + 1
        place += length
    else:
        size = 192 if code == 1 else 576 << code - 2 if code < 6 else 256 << code - 8
    place += {12: 1, 13: 2, 14: 2}.get(header[2] & 15, 0)
    if place >= len(header) or _crc8(header[:place]) != header[place]:
        return None
    is_fixed = header[1] == 0xF8
    return (number * info.block_size if is_fixed else number), size


def _utf8_number(data: bytes, place: int) -> tuple[int | None, int]:
    """A number of up to 36 bits in the coding of UTF-8, and the offset of its end."""
    first = data[place]
    if first < 0x80:
        return first, place + 1
    length = 8 - (first ^ 0xFF).bit_length()
    rest = data[place + 1 : place + length]
    if not 2 <= length <= 7 or len(rest) < length - 1:
        return None, place
    number = first & (0x7F >> length)
    for byte in rest:
        number = number << 6 | byte & 0x3F
    return number, place + length


def _crc8(data: bytes) -> int:
    table = _crc8_table()
    crc = 0
    for byte in data:
        crc = table[crc ^ byte]
    return crc


@functools.cache
def _crc8_table() -> list[int]:
    table = []
    for crc in range(256):
        for _ in range(8):
            crc = (crc << 1) ^ (0x107 if crc & 0x80 else 0)
        table.append(crc)
    return table


def _crc16(data: bytes) -> int:
    """0 for a complete frame, because it ends with its own checksum."""
    table = _crc16_table()
    crc = 0
    if len(data) % 2:
        data = b"\0" + data  # zeros before the first byte change nothing
    for word in np.frombuffer(data, ">u2").tolist():
        crc = table[crc ^ word]
    return crc


@functools.cache
def _crc16_table() -> list[int]:
    """The checksum of every pair of bytes."""
    crc = np.arange(1 << 16, dtype=np.uint32)
    for _ in range(16):
        crc = (crc << 1) ^ np.where(crc & 0x8000, 0x18005, 0).astype(np.uint32)
    return crc.tolist()
