"""Counts the frames of MPEG audio (MP1, MP2, MP3) by their headers.

Decoders guess the length of a file without a Xing header from its size, and trust a wrong Xing
header. So this module follows the frame headers to the end of the file. They also show where one
file ends and an appended one begins.
"""

import dataclasses
import functools
import os
import struct
from typing import BinaryIO

from moss_tok.audio.windows import Piece

_CHUNK_BYTES = 1 << 20
_LONGEST_FRAME = 4608
_VERIFIED_FRAMES = 4  # headers in a row, so that other data is not taken for a frame
_TAGS = (b"ID3", b"TAG", b"APE", b"LYR")
_MARKS = (b"Xing", b"Info", b"VBRI")  # in the first frame, which holds lengths and no audio
_VBRI_OFFSET = 36  # from the beginning of the frame
_LAME_BYTES = 36  # after the fields of a Xing header: encoder, delay, padding, ...
_DECODER_DELAY = 529  # samples; LAME counts them as padding

_RATES = (44100, 48000, 32000)
_KBPS = {  # (whether it is MPEG 1, layer) -> kbit/s by the index in the header
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


@dataclasses.dataclass(frozen=True)
class Format:
    """Properties that all frames of a stream share.

    Attributes:
      version: As in the header: 3 for MPEG 1, 2 for MPEG 2, 0 for MPEG 2.5.
      layer: 1..3.
      rate_index: As in the header.
      mono: Whether there is one channel.
    """

    version: int
    layer: int
    rate_index: int
    mono: bool

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return _RATES[self.rate_index] // {3: 1, 2: 2, 0: 4}[self.version]

    @property
    def num_channels(self) -> int:
        """1 or 2."""
        return 1 if self.mono else 2

    @property
    def samples_per_frame(self) -> int:
        """Samples per channel."""
        if self.layer == 3 and self.version != 3:
            return 576
        return {1: 384, 2: 1152, 3: 1152}[self.layer]

    @property
    def side_bytes(self) -> int:
        """Bytes of side information of layer III, between the frame header and a Xing header."""
        if self.version == 3:
            return 17 if self.mono else 32
        return 9 if self.mono else 17

    @functools.cache  # noqa: B019, there are few formats
    def sizes(self) -> dict[bytes, int]:
        """Bytes of a frame by the second and third byte of its header."""
        sizes = {}
        for index, kbps in enumerate(_KBPS[self.version == 3, self.layer], 1):
            for padding in (0, 1):
                slots = self.samples_per_frame // 8 * 1000 * kbps // self.sample_rate
                size = slots + padding
                if self.layer == 1:
                    size = 4 * (12000 * kbps // self.sample_rate + padding)
                for protection in (0, 1):
                    for private in (0, 1):
                        key = self._key(index, padding, protection, private)
                        sizes[key] = size
        return sizes

    def _key(self, index: int, padding: int, protection: int, private: int) -> bytes:
        second = 0xE0 | self.version << 3 | (4 - self.layer) << 1 | protection
        return bytes((second, index << 4 | self.rate_index << 2 | padding << 1 | private))

    def empty_frame(self, text: bytes) -> bytes:
        """A frame without audio, with `text` after its side information."""
        sizes = self.sizes()
        start = bytes(self.side_bytes) + text
        for index in range(1, 15):
            key = self._key(index, 0, protection=1, private=0)
            if sizes[key] >= 4 + len(start):
                break
        header = b"\xff" + key + bytes((0xC0 if self.mono else 0x40,))
        return (header + start).ljust(sizes[key], b"\0")


@dataclasses.dataclass
class Link:
    """One stream of a file; a file has several if files were concatenated.

    Attributes:
      format: Format of its frames.
      num_frames: Frames with audio.
      extents: [(offset, length)] of these frames in the file.
      lame: What the Xing header says about the encoder; empty if there is no Xing header.
      announced_frames: Number of frames in the Xing header, 0 if unknown.
      announced_bytes: Number of bytes in the Xing header, counted from it on, 0 if unknown.
      start: Offset of the stream in the file.
      last_bytes: Length of the last frame.
    """

    format: Format
    start: int
    num_frames: int = 0
    extents: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    lame: bytes = b""
    announced_frames: int = 0
    announced_bytes: int = 0
    last_bytes: int = 0

    @property
    def num_samples(self) -> int:
        """Samples per channel, without the encoder's padding at both ends."""
        total = self.num_frames * self.format.samples_per_frame
        if not self._has_padding():
            return total
        delay = self.lame[21] << 4 | self.lame[22] >> 4
        padding = (self.lame[22] & 15) << 8 | self.lame[23]
        return max(0, total - delay - max(padding, _DECODER_DELAY))

    def pieces(self) -> list[Piece]:
        """A file from which a decoder makes at least `num_samples`."""
        if self.format.layer < 3:  # no Xing header: decoders guess the length from the size
            offset, length = self.extents[-1]
            last_frame = (offset + length - self.last_bytes, self.last_bytes)
            num_copies = 2 + self.num_frames // 100
            return self.extents + [last_frame] * num_copies
        if self._has_padding():
            return [self._info_frame(self.num_frames, self.lame), *self.extents]
        # mpg123 removes its delay if there is a Xing header, so add samples for it to remove.
        delay = self.format.samples_per_frame - _DECODER_DELAY
        delay_and_padding = bytes((delay >> 4, (delay & 15) << 4))
        lame = b"LAME" + bytes(17) + delay_and_padding + bytes(13)
        info = self._info_frame(self.num_frames + 1, lame)
        return [info, self.format.empty_frame(b""), *self.extents]

    def _info_frame(self, num_frames: int, lame: bytes) -> bytes:
        fields = struct.pack(">II", 1, num_frames)
        return self.format.empty_frame(b"Xing" + fields + lame)

    def _has_padding(self) -> bool:
        """Whether the Xing header gives the encoder's padding at both ends."""
        return len(self.lame) >= 24 and self.lame[0] > 0

    def add(self, offset: int, length: int, num_frames: int) -> None:
        """Appends frames."""
        self.num_frames += num_frames
        if self.extents and sum(self.extents[-1]) == offset:
            offset, before = self.extents.pop()
            length += before
        self.extents.append((offset, length))

    def missing_frames(self, end: int) -> int:
        """Frames that the Xing header announces but a file that ends at `end` lacks."""
        num_missing = self.announced_frames - self.num_frames
        is_cut = self.start + self.announced_bytes > end
        return max(0, num_missing) if is_cut else 0

    def damaged_frames(self) -> int:
        """Frames that the Xing header announces and that are not there, if data interrupts them."""
        is_interrupted = len(self.extents) > 1
        return max(0, self.announced_frames - self.num_frames) if is_interrupted else 0


def parse_header(header: bytes) -> Format | None:
    """The format in the four bytes of a frame header; None if they are not a header."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE0 != 0xE0:
        return None
    version = header[1] >> 3 & 3
    layer = 4 - (header[1] >> 1 & 3)
    rate_index = header[2] >> 2 & 3
    if version == 1 or layer == 4 or rate_index == 3 or header[2] >> 4 in (0, 15):
        return None
    return Format(version, layer, rate_index, header[3] >> 6 == 3)


def id3_bytes(head: bytes) -> int:
    """Length of an ID3v2 tag that begins with these ten bytes; 0 if there is none."""
    if len(head) < 10 or head[:3] != b"ID3" or max(head[6:10]) > 127:
        return 0
    size = 0
    for byte in head[6:10]:
        size = size << 7 | byte
    return size + (20 if head[5] & 0x10 else 10)


def find_links(file: BinaryIO, start: int, end: int) -> list[Link]:
    """The streams between two offsets of a file, in order; [] if there are no frames.

    Everything else (tags, junk, a last frame that is cut) is left out.
    """
    return _Scanner(file, start, end).scan()


class _Scanner:
    """Follows frame headers through a file, a chunk at a time."""

    def __init__(self, file: BinaryIO, start: int, end: int):
        self._file = file
        self._end = end
        self._start = start
        self._origin = start  # of `_data` in the file
        self._data = b""
        self._place = 0  # in `_data`
        file.seek(start, os.SEEK_SET)

    def scan(self) -> list[Link]:
        """See `find_links`."""
        links: list[Link] = []
        while self._fill(_VERIFIED_FRAMES * _LONGEST_FRAME):
            last_link = links[-1] if links else None
            format_ = self._format_at(self._place, last_link)
            if format_ is None:
                if not self._skip():
                    break
                continue
            info = self._info_at(self._place, format_)
            if info or not links or links[-1].format != format_:
                links.append(Link(format_, self._origin + self._place))
            if info:
                self._read_info(links[-1], info)
                self._place += format_.sizes()[self._key_at(self._place)]
            elif not self._follow(links[-1]):
                break  # the last frame is cut
        return [link for link in links if link.num_frames]

    def _key_at(self, place: int) -> bytes:
        return self._data[place + 1 : place + 3]

    def _fill(self, size: int) -> int:
        """Reads until `size` bytes are available or the file ends; returns the number available."""
        num_available = len(self._data) - self._place
        position = self._origin + len(self._data)
        if num_available < size and position < self._end:
            more = self._file.read(min(_CHUNK_BYTES, self._end - position))
            if not more:
                self._end = position
            self._data = self._data[self._place :] + more
            self._origin += self._place
            self._place = 0
        return len(self._data) - self._place

    def _format_at(self, place: int, last: Link | None) -> Format | None:
        """The format of a frame at `place`; None if no frames follow, so that it is not one."""
        format_ = parse_header(self._data[place : place + 4])
        if format_ is None:
            return None
        sizes = format_.sizes()
        is_known = last is not None and last.format == format_
        if is_known and last.extents and sum(last.extents[-1]) == self._origin + place:
            return format_
        is_first = self._origin + place == self._start
        num_checked = 1 if is_first else _VERIFIED_FRAMES - 1
        for _ in range(num_checked):
            place += sizes[self._key_at(place)]
            following = self._data[place : place + 4]
            if parse_header(following) != format_:
                is_at_end = len(following) < 4 or following[:3] in _TAGS
                is_expected = is_known or last is None
                return format_ if is_at_end and is_expected else None
        return format_

    def _skip(self) -> bool:
        """Moves past a tag, or to the next possible frame or tag; False at the end of the file."""
        tag = id3_bytes(self._data[self._place : self._place + 10])
        if tag:
            self._go_to(self._origin + self._place + tag)
            return True
        while self._fill(_LONGEST_FRAME) > 1:
            places = []
            for mark in (b"\xff", b"ID3"):
                place = self._data.find(mark, self._place + 1)
                if place >= 0:
                    places.append(place)
            if places:
                self._place = min(places)
                return True
            self._place = max(self._place + 1, len(self._data) - 2)  # "ID3" may be cut there
        return False

    def _go_to(self, offset: int) -> None:
        self._origin = min(offset, self._end)
        self._data = b""
        self._place = 0
        self._file.seek(self._origin)

    def _info_at(self, place: int, format_: Format) -> int:
        """Offset in `_data` of the mark of a Xing header; 0 if the frame has none."""
        if format_.layer != 3:
            return 0
        side = place + 4 + format_.side_bytes
        for mark in (side, side + 2, place + _VBRI_OFFSET):  # there may be a checksum before it
            if self._data[mark : mark + 4] in _MARKS:
                return mark
        return 0

    def _read_info(self, link: Link, mark: int) -> None:
        """Stores the numbers of the Xing or VBRI header at `mark`."""
        data = self._data[mark : mark + 200]
        if data[:4] == b"VBRI":
            link.announced_bytes, link.announced_frames = struct.unpack(">II", data[10:18])
            return
        (flags,) = struct.unpack(">I", data[4:8])
        offset = 8
        if flags & 1:
            (link.announced_frames,) = struct.unpack(">I", data[offset : offset + 4])
            offset += 4
        if flags & 2:
            (link.announced_bytes,) = struct.unpack(">I", data[offset : offset + 4])
            offset += 4
        if flags & 4:
            offset += 100
        if flags & 8:
            offset += 4
        link.lame = data[offset : offset + _LAME_BYTES]

    def _follow(self, link: Link) -> bool:
        """Moves over frames of one format; False if the end of the file cuts the last one."""
        data = self._data
        sizes = link.format.sizes()
        mono = link.format.mono
        first = self._place
        place = first
        count = 0
        mark = 4 + link.format.side_bytes if link.format.layer == 3 else 0
        end = len(data)
        while place + 4 <= end:
            size = sizes.get(data[place + 1 : place + 3])
            if size is None or data[place] != 0xFF or (data[place + 3] >= 0xC0) != mono:
                break
            if place + size > end:
                break
            if mark and place > first and data[place + mark : place + mark + 4] in _MARKS:
                break
            place += size
            link.last_bytes = size
            count += 1
        self._place = place
        if count:
            link.add(self._origin + first, place - first, count)
        return count > 0 or self._origin + end < self._end
