"""Reads the number of bytes of audio, and the codec, from the headers of audio files.

Libsndfile reads a truncated file to its end without an error. So this module compares the sizes in
headers with the size of the file.
"""

import dataclasses
import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

from moss_tok.audio.windows import Piece

# Sizes that programs write into a pipe, where they cannot go back to write the true size. The sizes
# of ffmpeg and sox are a little smaller or larger than these.
_STREAMED_32 = ((0x7F000000, 0x7F000100), (0x7FFFF000, 0x80000000), (0xFFFFFF00, 0xFFFFFFFF))
_STREAMED_64 = 2**62
_MAX_WAV_BYTES = 0x7FFFF000  # a longer WAV is read only as far as its header says
_WRAPS = 2**32
_CHUNKS_BYTES = 2**20  # room for chunks after the audio

_W64_TAIL = bytes.fromhex("f3acd3118cd100c04f8edb8a")
_W64_RIFF = bytes.fromhex("726966662e91cf11a5d628db04c10000")
_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_EBML = bytes.fromhex("1a45dfa3")
_EBML_SEGMENT = bytes.fromhex("18538067")
_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp")

MPEG_TAGS = (0x50, 0x55)  # codecs of a WAV that holds MPEG audio
GSM_TAG = 0x31
GSM_BYTES = 65  # of a block
GSM_SAMPLES = 320
_SNDFILE_TAGS = (0, 1, 2, 3, 6, 7, 0x11, 0x31, 0x38, 0x40, 0x50, 0x55, 0x64)
_WAV_CODECS = {
    0x17: "Dialogic ADPCM",
    0x20: "Yamaha ADPCM",
    0x45: "G.726",
    0xFF: "AAC",
    0x160: "WMA",
    0x161: "WMA",
    0x162: "WMA",
    0x163: "WMA",
    0x1600: "AAC",
    0x1602: "AAC",
    0x1610: "AAC",
    0x2000: "AC-3",
    0x2001: "DTS",
    0xA106: "AAC",
    0xF1AC: "FLAC",
}


@dataclasses.dataclass
class Layout:
    """Contents of a header.

    Attributes:
      missing_bytes: Bytes of audio that the header announces but the file lacks; 0 if it announces
        none.
      start: Offset of the audio in the file; 0 if unknown.
      length: Bytes of audio that the file has.
      format_tag: For a WAV, the number of its codec.
      pieces: The file with the true sizes in its header; None if the header has them already.
      size_zero: Whether the header announces no audio although there is some.
    """

    missing_bytes: int = 0
    start: int = 0
    length: int = 0
    format_tag: int = 0
    pieces: list[Piece] | None = None
    size_zero: bool = False


def read_layout(file: BinaryIO, size: int) -> Layout:
    """The layout of a file of `size` bytes; an empty one for unknown containers."""
    file.seek(0)
    head = file.read(16)
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        return _wav(file, size, head)
    if head == _W64_RIFF:
        return _w64(file, size)
    if head[:4] == b"FORM":
        return _aiff(file, size)
    if head[:4] == b".snd":
        return _au(file, size, ">")
    if head[:4] == b"dns.":
        return _au(file, size, "<")
    if head[:4] == b"caff":
        return _caf(file, size)
    if head[:8] == b"NIST_1A\n":
        return _nist(file, size)
    if head == b"Creative Voice F":
        return _voc(file, size)
    if head == _ASF:
        return _asf(file, size)
    if head[:4] == _EBML:
        return _matroska(file, size)
    if head[4:8] in _BOXES:
        return _mp4(file, size)
    return Layout()


def unsupported_codec(format_tag: int) -> str:
    """The name of a WAV's codec if libsndfile does not know it, else ""."""
    if format_tag in _SNDFILE_TAGS:
        return ""
    return _WAV_CODECS.get(format_tag, f"codec 0x{format_tag:04x}")


def _is_streamed(length: int) -> bool:
    for first, last in _STREAMED_32:
        if first <= length <= last:
            return True
    return length >= _STREAMED_64


def _chunks(file: BinaryIO, place: int, form: str) -> Iterator[tuple[bytes, int, int]]:
    """(name, size, offset of the content) of chunks, until the reader stops or the file ends."""
    header = struct.calcsize(form)
    while True:
        file.seek(place)
        data = file.read(header)
        if len(data) < header:
            return
        name, length = struct.unpack(form, data)
        yield name, length, place + header
        place += header + length + length % 2


def _layout(start: int, announced: int, size: int, **options: object) -> Layout:
    """The layout of audio that begins at `start`, of `announced` bytes."""
    available = max(0, size - start)
    if _is_streamed(announced):
        announced = available
    missing = max(0, announced - available)
    return Layout(missing, start, min(announced, available), **options)


def _patched(file: BinaryIO, start: int, size: int, fields: dict[int, bytes]) -> list[Piece]:
    """The file with some bytes of its header replaced; the header ends at `start`."""
    file.seek(0)
    header = bytearray(file.read(start))
    for offset, field in fields.items():
        header[offset : offset + len(field)] = field
    return [bytes(header), (start, size - start)]


def _wav(file: BinaryIO, size: int, head: bytes) -> Layout:
    order = ">" if head[:4] == b"RIFX" else "<"
    format_tag = 0
    long_size = 0
    long_at = 0
    for name, length, start in _chunks(file, 12, f"{order}4sI"):  # noqa: B007
        if name == b"fmt ":
            format_tag = _format_tag(file.read(40), order)
        elif name == b"ds64":
            long_at = start
            long_size = int.from_bytes(file.read(16)[8:], "little")
        elif name == b"data":
            break
    else:
        return Layout(format_tag=format_tag)
    if long_at and length == 0xFFFFFFFF:
        if 0 < long_size < _STREAMED_64:
            return _layout(start, long_size, size, format_tag=format_tag)
        available = size - start
        fields = {long_at: struct.pack("<QQQ", size - 8, available, 0)}
        pieces = _patched(file, start, size, fields)
        return Layout(start=start, length=available, format_tag=format_tag, pieces=pieces)
    available = size - start
    announced = length
    is_zero = length == 0 and _has_audio(file, start, size, f"{order}4sI")
    if is_zero or _is_streamed(length):
        length = available
    elif length and available > length + _WRAPS - _CHUNKS_BYTES:  # 32 bits of a longer size
        length += (available - length + _CHUNKS_BYTES) // _WRAPS * _WRAPS
    layout = _layout(start, length, size, format_tag=format_tag, size_zero=is_zero)
    if order == "<" and length != announced and length > _MAX_WAV_BYTES:
        layout.pieces = _as_rf64(file, start, layout.length)
    elif is_zero:
        field = struct.pack(f"{order}I", min(available, 0xFFFFFFFF))
        layout.pieces = _patched(file, start, size, {start - 4: field})
    return layout


def _as_rf64(file: BinaryIO, start: int, length: int) -> list[Piece]:
    """A WAV whose audio begins at `start`, with a header that can hold any length."""
    chunks = _at(file, 12, start - 16)
    size = struct.pack("<QQQI", length + start + 28, length, 0, 0)
    header = b"RF64\xff\xff\xff\xffWAVEds64" + struct.pack("<I", len(size)) + size
    return [header + chunks + b"\xff\xff\xff\xff", (start, length)]


def _format_tag(fmt: bytes, order: str) -> int:
    """The number of a WAV's codec; an extensible WAV has it in its extension."""
    (tag,) = struct.unpack_from(f"{order}H", fmt.ljust(2, b"\0"))
    if tag == 0xFFFE and len(fmt) >= 26:
        (tag,) = struct.unpack_from(f"{order}H", fmt, 24)
    return tag


def _has_audio(file: BinaryIO, start: int, size: int, form: str) -> bool:
    """Whether audio follows an empty data chunk: anything other than chunks up to the end."""
    place = start
    for name, length, offset in _chunks(file, start, form):
        if not (name.isascii() and name.decode("ascii").isprintable()):
            return True
        place = offset + length
        if place > size:
            return True
    return size - place > 1  # a byte may pad the last chunk


def _w64(file: BinaryIO, size: int) -> Layout:
    place = 40
    while True:
        file.seek(place)
        header = file.read(24)
        if len(header) < 24:
            return Layout()
        length = int.from_bytes(header[16:], "little")
        if header[:4] == b"data" and header[4:16] == _W64_TAIL:
            start = place + 24
            available = size - start
            if 24 < length < _STREAMED_64 or available <= 0:
                return _layout(start, length - 24, size)
            fields = {place + 16: struct.pack("<Q", available + 24)}
            pieces = _patched(file, start, size, fields)
            return Layout(start=start, length=available, pieces=pieces)
        if length < 24 or length >= _STREAMED_64:
            return Layout()
        place += (length + 7) // 8 * 8


def _aiff(file: BinaryIO, size: int) -> Layout:
    """AIFF and AIFC, whose chunk is SSND, and 8SVX, whose chunk is BODY."""
    for name, length, start in _chunks(file, 12, ">4sI"):
        if name not in (b"SSND", b"BODY"):
            continue
        audio = start + 8 if name == b"SSND" else start  # after the chunk's own header
        if start + length > audio or not _has_audio(file, audio, size, ">4sI"):
            return _layout(start, length, size)
        available = min(size - start, 0x7FFFFFFF)
        field = struct.pack(">I", available)
        pieces = _patched(file, start, size, {start - 4: field})
        return Layout(start=start, length=available, pieces=pieces, size_zero=True)
    return Layout()


def _au(file: BinaryIO, size: int, order: str) -> Layout:
    header = _at(file, 0, 12).ljust(12, b"\0")
    start, length = struct.unpack(f"{order}4xII", header)
    if length and length not in (0x7FFFFFFF, 0x80000000):
        return _layout(start, length, size)
    if size <= start:
        return Layout()
    field = struct.pack(f"{order}I", 0xFFFFFFFF)  # means unknown in this format
    pieces = _patched(file, start, size, {8: field})
    return Layout(start=start, length=size - start, pieces=pieces, size_zero=length == 0)


def _at(file: BinaryIO, place: int, length: int) -> bytes:
    file.seek(place)
    return file.read(length)


def _caf(file: BinaryIO, size: int) -> Layout:
    place = 8
    while True:
        header = _at(file, place, 12)
        if len(header) < 12:
            return Layout()
        length = int.from_bytes(header[4:], "big")
        start = place + 12
        if header[:4] == b"data":
            break
        if length >= _STREAMED_64:
            return Layout()
        place = start + length
    available = size - start
    if 4 < length < _STREAMED_64 or available <= 4:  # the chunk begins with a count of four bytes
        return _layout(start, length, size)
    field = struct.pack(">Q", available)
    pieces = _patched(file, start, size, {place + 4: field})
    is_zero = length in (0, 4)
    return Layout(start=start, length=available, pieces=pieces, size_zero=is_zero)


def _nist(file: BinaryIO, size: int) -> Layout:
    """NIST SPHERE: lines of `name -type value`."""
    head = _at(file, 0, 1024)
    fields = {}
    for line in head.split(b"\n"):
        parts = line.split(None, 2)
        if len(parts) == 3 and parts[1] == b"-i" and parts[2].strip().isdigit():
            fields[parts[0]] = int(parts[2])
    header_bytes = head[8:16].strip()
    start = int(header_bytes) if header_bytes.isdigit() else 0
    announced = 1
    for name in (b"sample_count", b"channel_count", b"sample_n_bytes"):
        announced *= fields.get(name, 0)
    is_compressed = b"shorten" in head
    return _layout(start, announced, size) if announced and not is_compressed else Layout()


def _voc(file: BinaryIO, size: int) -> Layout:
    """VOC: blocks with a type byte and a size of three bytes; type 0 ends the file."""
    place = int.from_bytes(_at(file, 20, 2), "little")
    while 26 <= place < size:
        header = _at(file, place, 4)
        if header[0] == 0:
            return Layout()
        place += 4 + int.from_bytes(header[1:], "little")
    return Layout(missing_bytes=max(0, place - size))


def _mp4(file: BinaryIO, size: int) -> Layout:
    """MP4, M4A, MOV, 3GP: boxes up to the end of the file."""
    place = 0
    while place < size:
        header = _at(file, place, 16)
        length = int.from_bytes(header[:4], "big")
        if length == 1 and len(header) == 16:
            length = int.from_bytes(header[8:], "big")
        elif length == 0:  # up to the end
            return Layout()
        if length < 8 or not header[4:8].isascii():  # something was appended
            return Layout()
        place += length
    return Layout(missing_bytes=place - size)


def _matroska(file: BinaryIO, size: int) -> Layout:
    """Matroska and WebM: a header, then one segment that holds everything."""
    length, place = _ebml_size(_at(file, 4, 8), 4)
    place += length
    if _at(file, place, 4) != _EBML_SEGMENT:
        return Layout()
    length, start = _ebml_size(_at(file, place + 4, 8), place + 4)
    if length >= _STREAMED_64 >> 8:  # unknown: all bits are set
        return Layout()
    return Layout(missing_bytes=max(0, start + length - size))


def _ebml_size(data: bytes, place: int) -> tuple[int, int]:
    """The size of an element, 2**62 if unknown, and the offset of its content.

    The number of leading zeros of the first byte gives the number of bytes of the size.
    """
    if not data or not data[0]:
        return 2**62, place
    num_bytes = 9 - data[0].bit_length()
    all_bits = (1 << 7 * num_bytes) - 1
    size = int.from_bytes(data[:num_bytes], "big") & all_bits
    is_unknown = size == all_bits
    return (2**62 if is_unknown else size), place + num_bytes


def _asf(file: BinaryIO, size: int) -> Layout:
    """WMA and ASF: objects with a GUID and a size; the second object holds the audio."""
    place = 0
    for _ in range(2):
        header = _at(file, place, 24)
        length = int.from_bytes(header[16:], "little")
        if len(header) < 24 or length < 24 or length >= _STREAMED_64:
            return Layout()
        place += length
    return Layout(missing_bytes=max(0, place - size))


def file_size(file: BinaryIO) -> int:
    """Bytes of an open file."""
    return file.seek(0, os.SEEK_END)
