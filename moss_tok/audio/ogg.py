"""Pages of Ogg files: their codecs, and the links of a chain."""

import dataclasses
import zlib
from typing import BinaryIO

_MARK = b"OggS"
_NO_GRANULE = 2**64 - 1
_BEGINS = 2  # flags of a page
_ENDS = 4
_CHUNK_BYTES = 1 << 16
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))  # bits of each byte
CODECS = {
    b"\x01vorbis": "vorbis",
    b"OpusHead": "opus",
    b"\x7fFLAC": "flac",
    b"Speex   ": "speex",
    b"\x80theora": "theora",
    b"fishead\0": "skeleton",
}


@dataclasses.dataclass
class Link:
    """A part of a chain: one or more streams that begin together.

    Attributes:
      start: Offset in the file.
      length: Bytes.
      codecs: Codecs of its streams; "" for an unknown one.
      last_page: Samples of the last page with audio.
      ended: Whether a page is marked as the last.
      granule: The last position, in samples.
      rate: Hz of these samples; 0 for codecs that libsndfile does not know.
      num_damaged: Number of pages with a wrong checksum, which all decoders leave out.
    """

    start: int
    length: int = 0
    codecs: list[str] = dataclasses.field(default_factory=list)
    last_page: int = 0
    ended: bool = False
    granule: int = 0
    rate: int = 0
    num_damaged: int = 0


def find_links(file: BinaryIO, start: int, end: int) -> list[Link]:
    """The links of a chain, without data that is not a page and without a page that is cut."""
    links: list[Link] = []
    is_after_first_page = False  # whether the previous page began a stream
    place = start
    while place + 27 <= end:
        file.seek(place)
        head = file.read(27 + 255 + 16)
        if head[:4] != _MARK:
            place = _find_page(file, place + 1, end)
            continue
        body = 27 + head[26]
        size = body + sum(head[27:body])
        if place + size > end:
            break
        page = head[:size] + file.read(max(0, size - len(head)))
        begins_stream = bool(head[5] & _BEGINS)
        if begins_stream:
            if not is_after_first_page:
                links.append(Link(place))
            packet = head[body : body + 16]
            links[-1].codecs.append(_codec(packet))
            links[-1].rate = _rate(packet)
        is_after_first_page = begins_stream
        if links:
            _add_page(links[-1], head, place + size)
            links[-1].num_damaged += not _has_checksum(page)
        place += size
    return links


def _has_checksum(page: bytes) -> bool:
    """Whether a page has the checksum in its header.

    It is the CRC-32 of zlib with the bits of each byte and of the result in the opposite order, and
    without the two inversions.
    """
    blank = page[:22] + bytes(4) + page[26:]
    inverted = zlib.crc32(blank.translate(_REVERSED), 2**32 - 1)
    checksum = (inverted ^ (2**32 - 1)).to_bytes(4, "big").translate(_REVERSED)
    return checksum == page[22:26]


def _codec(packet: bytes) -> str:
    for mark, codec in CODECS.items():
        if packet.startswith(mark):
            return codec
    return ""


def _rate(packet: bytes) -> int:
    """Sample rate of the positions in pages, Hz."""
    if packet.startswith(b"OpusHead"):
        return 48000
    is_vorbis = packet.startswith(b"\x01vorbis")
    return int.from_bytes(packet[12:16], "little") if is_vorbis else 0


def _add_page(link: Link, head: bytes, end: int) -> None:
    granule = int.from_bytes(head[6:14], "little")
    if granule != _NO_GRANULE:
        if granule > link.granule:
            link.last_page = granule - link.granule
        link.granule = granule
    link.ended = bool(head[5] & _ENDS)
    link.length = end - link.start


def _find_page(file: BinaryIO, place: int, end: int) -> int:
    """Offset of the next page; `end` if there is none."""
    while place < end:
        file.seek(place)
        data = file.read(_CHUNK_BYTES)
        offset = data.find(_MARK)
        if offset >= 0:
            return place + offset
        if len(data) < len(_MARK):
            break
        place += len(data) - len(_MARK) + 1
    return end
