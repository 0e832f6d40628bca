"""Opens audio: finds the format of a file, checks that it is complete, and picks a decoder."""

import contextlib
import dataclasses
import enum
import functools
import io
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from moss_tok import storage
from moss_tok.audio import containers, flac, kinds, mpeg, notes, ogg
from moss_tok.audio.decoder import Chain, Decoder
from moss_tok.audio.ffmpeg import FfmpegDecoder
from moss_tok.audio.libsndfile import LibsndfileDecoder, UnsupportedError
from moss_tok.audio.windows import Window

_HEAD_BYTES = 4096
# A decoder that seeks starts this much earlier, so that its state is right at the target.
_MPEG_PREROLL_SECONDS = 1.0
_OGG_PREROLL_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class AudioBytes:
    """An audio file in memory; `name` is its name in error messages."""

    data: bytes = dataclasses.field(repr=False)
    name: str

    def __str__(self) -> str:
        return self.name


Source = str | Path | AudioBytes


class Use(enum.Enum):
    """The purpose for which audio is opened."""

    ALL = enum.auto()  # to read all of it
    PART = enum.auto()
    LENGTH = enum.auto()  # to find out how long it is


@dataclasses.dataclass(frozen=True)
class _Input:
    """An open file.

    Attributes:
      name: Name for error messages.
      file: The open file.
      size: Bytes.
      suffix: Suffix of its name, in lower case.
      key: Identifies the content; None if nothing does.
    """

    name: str
    file: BinaryIO
    size: int
    suffix: str
    key: tuple[str, int, int] | None = None


@contextlib.contextmanager
def open_audio(source: Source, use: Use) -> Iterator[Decoder]:
    """Opens audio; until it is closed, errors of the system become a ValueError that names it.

    Raises:
      ValueError: The file does not exist, is not audio, is not supported, or is shorter than its
        header says.
    """
    with _open_input(source, use) as opened:
        decoder = _decoder(opened, use)
        with contextlib.closing(decoder):
            yield decoder


@contextlib.contextmanager
def _open_input(source: Source, use: Use) -> Iterator[_Input]:
    if isinstance(source, AudioBytes):
        yield _in_memory(source)
        return
    path = storage.to_path(source)
    try:
        with storage.named_errors(path):
            if path.is_dir():
                raise ValueError(f"{path}: a folder, not a file")
            if not path.is_file():
                raise ValueError(f"{path}: no such file")
            is_remote = storage.is_remote(path)
            # Libsndfile would take a failed download for the end of the file.
            if is_remote and use is not Use.LENGTH:
                yield _in_memory(AudioBytes(path.read_bytes(), str(path)))
                return
            if is_remote:
                with path.open("rb") as file:
                    size = containers.file_size(file)
                    yield _Input(str(path), file, size, path.suffix.lower())
                return
            # Without a buffer: libsndfile moves the position of the same descriptor.
            with path.open("rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                key = (str(path.absolute()), status.st_size, status.st_mtime_ns)
                yield _Input(str(path), file, status.st_size, path.suffix.lower(), key)
    except OSError as error:  # for example of a network file system
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error


def _in_memory(source: AudioBytes) -> _Input:
    suffix = Path(source.name).suffix.lower()
    return _Input(source.name, _Memory(source.data), len(source.data), suffix)


class _Memory(io.BytesIO):
    """Keeps its position when a decoder of a damaged file seeks to before its beginning.

    Decoders call this from C, where an exception would be printed.
    """

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves the position, see the parent class."""
        try:
            return super().seek(offset, whence)
        except ValueError:
            return self.tell()


def _decoder(opened: _Input, use: Use) -> Decoder:
    """The decoder of a file, by its first bytes."""
    head, start = _read_head(opened)
    if head[:4] == b"fLaC":
        return _open_flac(opened, start, use)
    if head[:4] == b"OggS":
        return _open_ogg(opened, start)
    if kinds.is_sndfile(head) or kinds.is_ffmpeg(head):
        return _open_container(opened, kinds.is_sndfile(head), kinds.is_ffmpeg(head))
    reason = "" if start else kinds.not_audio(head, opened.size)
    if reason:
        raise ValueError(f"{opened.name}: not audio, but {reason}")
    if kinds.is_mpeg(head) or start or opened.suffix in kinds.MPEG_SUFFIXES:
        decoder = _open_mpeg(opened, start, opened.size, is_plain=True)
        if decoder is not None:
            return decoder
    if opened.suffix in kinds.FFMPEG_SUFFIXES:  # some formats have no mark at their beginning
        return _open_ffmpeg(opened, opened.file, opened.suffix[1:])
    return _open_plainly(opened)


def _read_head(opened: _Input) -> tuple[bytes, int]:
    """The first bytes after ID3 tags, and their offset."""
    start = 0
    while True:
        opened.file.seek(start)
        head = opened.file.read(_HEAD_BYTES)
        tag = mpeg.id3_bytes(head[:10])
        if not tag:
            return head, start
        start += tag


def _open_plainly(opened: _Input) -> Decoder:
    """Lets libsndfile try to open the file."""
    try:
        return LibsndfileDecoder(opened.name, opened.file, quiet=True)
    except UnsupportedError as error:
        # What libsndfile says of MPEG without a whole frame is wrong: "File does not exist ...".
        reason = "no whole frame" if "does not exist" in str(error) else error
        raise ValueError(
            f"{opened.name}: not audio ({reason}; accepted: {kinds.ACCEPTED})"
        ) from error


def _open_container(opened: _Input, name: str, ffmpeg_name: str) -> Decoder:
    """Opens WAV and other files whose header gives the amount of audio."""
    layout = containers.read_layout(opened.file, opened.size)
    if layout.missing_bytes:
        raise ValueError(f"{opened.name}: truncated, {layout.missing_bytes} bytes missing")
    if not name:
        return _open_ffmpeg(opened, opened.file, ffmpeg_name)
    if layout.size_zero:
        notes.say_once(f"{opened.name}: its header announces no audio; read to the end of the file")
    if layout.format_tag in containers.MPEG_TAGS:
        decoder = _open_mpeg(opened, layout.start, layout.start + layout.length, is_plain=False)
        if decoder is not None:
            return decoder
    num_frames = None
    if layout.format_tag == containers.GSM_TAG:  # libsndfile decodes a pad byte to a block of noise
        num_frames = layout.length // containers.GSM_BYTES * containers.GSM_SAMPLES
    file = Window(opened.file, layout.pieces) if layout.pieces else opened.file
    try:
        return LibsndfileDecoder(opened.name, file, num_frames=num_frames)
    except UnsupportedError as error:
        codec = containers.unsupported_codec(layout.format_tag)
        is_supported = not codec and "upported" not in str(error)
        if is_supported and "nimplemented" not in str(error):
            raise ValueError(f"{opened.name}: truncated or corrupt ({error})") from error
        kind = f"{codec} in {name}" if codec else name
        return _open_unsupported(opened, file, kind)


def _open_unsupported(opened: _Input, file: BinaryIO, kind: str) -> Decoder:
    """Lets PyAV, if it is installed, open a codec that libsndfile does not know."""
    if not kinds.has_ffmpeg():
        return _open_ffmpeg(opened, file, kind)  # raises an error that recommends PyAV
    try:
        return _open_ffmpeg(opened, file, kind)
    except ValueError as error:
        reason = str(error).removeprefix(f"{opened.name}: ")
        raise ValueError(
            f"{opened.name}: {kind} is not supported ({reason}; accepted: {kinds.ACCEPTED})"
        ) from error


def _open_ffmpeg(opened: _Input, file: BinaryIO, kind: str) -> Decoder:
    """Lets PyAV open the file."""
    if not kinds.has_ffmpeg():
        raise ValueError(
            f"{opened.name}: {kind} is not supported without PyAV, {kinds.INSTALL} "
            f"(accepted: {kinds.ACCEPTED})"
        )
    return FfmpegDecoder(opened.name, file)


def _open_flac(opened: _Input, start: int, use: Use) -> Decoder:
    """Opens FLAC, one file or several that were concatenated."""
    makers: list[Callable[[], Decoder]] = []
    streams = flac.find_streams(opened.file, start, opened.size)
    for first, end in streams:
        file = opened.file
        if start or len(streams) > 1:
            file = Window(opened.file, [(first, end - first)])
        # Reading the whole file shows a missing end anyway.
        is_whole = use is Use.ALL or flac.is_whole(opened.file, first, end)
        makers.append(functools.partial(_flac_stream, opened.name, file, is_whole))
    return _join(opened.name, makers)


def _join(name: str, makers: list[Callable[[], Decoder]]) -> Decoder:
    """One decoder of several streams in sequence."""
    return makers[0]() if len(makers) == 1 else Chain(name, makers)


def _flac_stream(name: str, file: BinaryIO, is_whole: bool) -> Decoder:
    decoder = _open_known(name, file)
    if not is_whole and decoder.num_frames:  # only decoding the end shows whether it is there
        try:
            decoder.seek(decoder.num_frames - 1)
            decoder.read(1)
            decoder.seek(0)
        except ValueError as error:
            decoder.close()
            raise ValueError(
                f"{name}: truncated or corrupt, the last of {decoder.num_frames} frames is missing"
            ) from error
    return decoder


def _open_known(name: str, file: BinaryIO, **options: object) -> LibsndfileDecoder:
    """The decoder of a file whose format libsndfile certainly knows."""
    try:
        return LibsndfileDecoder(name, file, **options)
    except UnsupportedError as error:
        raise ValueError(f"{name}: truncated or corrupt ({error})") from error


def _open_ogg(opened: _Input, start: int) -> Decoder:
    """Opens Ogg, one link or a chain of links."""
    links = _scanned(ogg.find_links, opened, start, opened.size)
    if not links:
        raise ValueError(f"{opened.name}: truncated or corrupt (no whole page of Ogg)")
    num_damaged = sum(link.num_damaged for link in links)
    if num_damaged:
        raise ValueError(f"{opened.name}: truncated or corrupt, pages damaged: {num_damaged}")
    makers = [functools.partial(_ogg_link, opened, link, len(links)) for link in links]
    decoder = _join(opened.name, makers)
    if not links[-1].ended:
        notes.say_once(f"{opened.name}: has no last page, may be cut; read to where it ends")
    return decoder


def _ogg_link(opened: _Input, link: ogg.Link, num_links: int) -> Decoder:
    file = opened.file
    if num_links > 1 or link.start:
        file = Window(opened.file, [(link.start, link.length)])
    if link.codecs in (["vorbis"], ["opus"]):
        if not link.granule:
            raise ValueError(f"{opened.name}: truncated or corrupt (ends before its first audio)")
        last_page_seconds = link.last_page / max(1, link.rate)
        return _open_known(
            opened.name,
            file,
            preroll_seconds=_OGG_PREROLL_SECONDS,
            last_page_seconds=last_page_seconds,
            seek_first=True,
        )
    codecs = ", ".join(codec or "an unknown codec" for codec in link.codecs)
    return _open_ffmpeg(opened, file, f"{codecs} in Ogg")


def _open_mpeg(opened: _Input, start: int, end: int, is_plain: bool) -> Decoder | None:
    """Opens MPEG audio between two offsets; None if there is none.

    `is_plain` says whether libsndfile finds the audio there by itself.
    """
    links = _scanned(mpeg.find_links, opened, start, end)
    if not links:
        return None
    missing = links[-1].missing_frames(end)
    if missing:
        raise ValueError(f"{opened.name}: truncated, {missing} frames missing")
    num_damaged = sum(link.damaged_frames() for link in links)
    if num_damaged:
        notes.say_once(f"{opened.name}: damaged, {num_damaged} frames of MPEG audio are left out")
    is_plain = is_plain and len(links) == 1 and links[0].start == start
    makers = [functools.partial(_mpeg_link, opened, link, is_plain) for link in links]
    return _join(opened.name, makers)


def _mpeg_link(opened: _Input, link: mpeg.Link, is_plain: bool) -> Decoder:
    options = {"preroll_seconds": _MPEG_PREROLL_SECONDS, "quiet": True}
    # Reading the file itself is faster, but libsndfile needs a correct Xing header.
    is_true = link.announced_frames == link.num_frames
    if is_plain and is_true and len(link.extents) == 1:
        with contextlib.suppress(UnsupportedError):
            decoder = LibsndfileDecoder(opened.name, opened.file, **options)
            if decoder.num_frames == link.num_samples:
                return decoder
            decoder.close()
    file = Window(opened.file, link.pieces())
    return _open_known(opened.name, file, num_frames=link.num_samples, **options)


def _scanned(function: Callable[..., list], opened: _Input, start: int, end: int) -> list:
    """Links of a file; cached for files on disk, from which training reads often."""
    key = (function, opened.key, start, end)
    if opened.key is None or time.time_ns() - opened.key[2] < _SETTLED_NS:
        return function(opened.file, start, end)
    if key not in _SCANS:
        if len(_SCANS) >= _MAX_SCANS:
            _SCANS.clear()
        _SCANS[key] = function(opened.file, start, end)
    return _SCANS[key]


_SCANS: dict[tuple, list] = {}
_MAX_SCANS = 10_000
_SETTLED_NS = 2 * 10**9  # a file as new as this may change again with the same timestamp
