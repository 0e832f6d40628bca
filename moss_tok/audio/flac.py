"""Checks whether FLAC files are complete, and finds files that were appended to each other.

A few frame headers are enough for both, so that a segment of a long file can be read without
reading all of it.
"""

import dataclasses
import functools
from typing import BinaryIO

import numpy as np

_MARK = b"fLaC"
_BEGINNING = _MARK + b"\0\0\0\x22"  # with the header of the block that is always first
_FRAME_MARKS = (b"\xff\xf8", b"\xff\xf9")  # frames of fixed size, frames of variable size
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
    num_samples = int.from_bytes(head[21:26], "big") & (1 << 36) - 1
    return StreamInfo(block_size, num_samples)


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
    ends = [*starts[1:], end]
    return list(zip(starts, ends, strict=True))


def is_whole(file: BinaryIO, start: int, end: int) -> bool:
    """Whether the last frame of a stream is certainly there, or its header does not identify it.

    If the result is False, the stream may still be complete; only decoding its end shows that.
    """
    info = read_info(file, start)
    if info is None or not info.num_samples:
        return info is not None
    frame = _last_frame(file, start, end, info)
    return bool(frame) and _crc16(frame) == 0


def _find_all(file: BinaryIO, start: int, end: int) -> list[int]:
    """Where FLAC files begin; the first begins at `start`."""
    starts = [start]
    tail = b""  # the end of the last chunk, in which a mark may begin
    offset = start
    while True:
        file.seek(offset)
        chunk = file.read(min(_CHUNK_BYTES, end - offset))
        if not chunk:
            return starts
        data = tail + chunk
        origin = offset - len(tail)
        index = data.find(_BEGINNING)
        while index >= 0:
            position = origin + index
            if position > starts[-1] and read_info(file, position):
                starts.append(position)
            index = data.find(_BEGINNING, index + 1)
        offset += len(chunk)
        tail = data[-(len(_BEGINNING) - 1) :]


def _last_frame(file: BinaryIO, start: int, end: int, info: StreamInfo) -> bytes:
    """The bytes from the header of the last frame on; empty if it is not found."""
    size = min(end - start, _LONGEST_FRAME)
    file.seek(end - size)
    data = file.read(size)
    if data[-128:-125] == b"TAG":
        data = data[:-128]
    for mark in _FRAME_MARKS:
        index = data.rfind(mark)
        while index >= 0:
            frame = _parse_frame(data[index : index + 16], info)
            if frame and sum(frame) == info.num_samples:
                return data[index:]
            index = data.rfind(mark, 0, index)
    return b""


def _goes_up(file: BinaryIO, start: int, end: int, info: StreamInfo) -> bool:
    """Whether the positions in the stream go up from probe to probe."""
    previous = -1
    for probe in range(_NUM_PROBES):
        file.seek(start + (end - start) * (2 * probe + 1) // (2 * _NUM_PROBES))
        sample = _first_sample(file.read(_PROBE_BYTES), info)
        if sample is None or sample <= previous:
            return False
        previous = sample
    return True


def _first_sample(data: bytes, info: StreamInfo) -> int | None:
    """The first sample of the first frame in `data`; None if no frame begins there."""
    for mark in _FRAME_MARKS:
        index = data.find(mark)
        while index >= 0:
            frame = _parse_frame(data[index : index + 16], info)
            if frame:
                sample, _ = frame
                return sample
            index = data.find(mark, index + 1)
    return None


def _parse_frame(header: bytes, info: StreamInfo) -> tuple[int, int] | None:
    """First sample and number of samples of a frame; None if this is not a frame header."""
    if len(header) < 6 or header[3] & 1 or header[2] & 15 == 15:
        return None
    number, end = _utf8_number(header, 4)
    code = header[2] >> 4
    if number is None or code == 0:
        return None
    if code == 1:
        size = 192
    elif code < 6:
        size = 576 << code - 2
    elif code in (6, 7):  # the size follows, in one or two bytes
        num_bytes = code - 5
        size = int.from_bytes(header[end : end + num_bytes], "big") + 1
        end += num_bytes
    else:
        size = 256 << code - 8
    end += {12: 1, 13: 2, 14: 2}.get(header[2] & 15, 0)  # a sample rate may follow
    if end >= len(header) or _crc8(header[:end]) != header[end]:
        return None
    is_fixed = header[1] == 0xF8
    first_sample = number * info.block_size if is_fixed else number
    return first_sample, size


def _utf8_number(data: bytes, start: int) -> tuple[int | None, int]:
    """A number of up to 36 bits in the coding of UTF-8, and the offset of its end."""
    first = data[start]
    if first < 0x80:
        return first, start + 1
    length = 8 - (first ^ 0xFF).bit_length()
    following = data[start + 1 : start + length]
    if not 2 <= length <= 7 or len(following) < length - 1:
        return None, start
    number = first & (0x7F >> length)
    for byte in following:
        number = number << 6 | byte & 0x3F
    return number, start + length


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
