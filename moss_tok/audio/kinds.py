"""Recognises formats of audio, and other files, by their first bytes."""

from moss_tok import extras
from moss_tok.audio import mpeg

# Formats of libsndfile, and those that PyAV adds.
SUFFIXES = (
    ".wav", ".flac", ".ogg", ".mp3", ".opus", ".oga", ".aiff", ".aif", ".aifc", ".au", ".snd",
    ".bwf", ".caf", ".mp2", ".mpga", ".rf64", ".sph", ".voc", ".w64", ".wave",
)  # fmt: skip
FFMPEG_SUFFIXES = (
    ".m4a", ".mp4", ".aac", ".webm", ".mka", ".wma", ".3gp", ".ac3", ".amr", ".ape", ".asf", ".avi",
    ".eac3", ".m4b", ".mkv", ".mov", ".spx", ".tta", ".wv",
)  # fmt: skip
MPEG_SUFFIXES = (".mp3", ".mp2", ".mp1", ".mpga")
INSTALL = extras.install("ffmpeg")
ACCEPTED = "wav, flac, ogg, opus, mp3, aiff, au, caf; and with PyAV m4a, aac, webm, mka, wma"

# (offset, bytes, name): formats that libsndfile opens, and formats that only PyAV opens.
_SNDFILE_MAGIC = (
    (0, b"RIFX", "WAV"),
    (0, b"RF64", "RF64"),
    (0, b"BW64", "BW64"),
    (8, b"WAVE", "WAV"),
    (0, b"riff\x2e\x91\xcf\x11", "W64"),
    (0, b"fLaC", "FLAC"),
    (0, b"OggS", "Ogg"),
    (8, b"AIFF", "AIFF"),
    (8, b"AIFC", "AIFC"),
    (8, b"8SVX", "8SVX"),
    (8, b"16SV", "16SV"),
    (0, b".snd", "AU"),
    (0, b"dns.", "AU"),
    (0, b"caff", "CAF"),
    (0, b"NIST_1A", "SPHERE"),
    (0, b"Creative Voice File", "VOC"),
)
_FFMPEG_MAGIC = (
    (4, b"ftyp", "MP4"),
    (4, b"moov", "MP4"),
    (4, b"mdat", "MP4"),
    (4, b"wide", "MP4"),
    (4, b"free", "MP4"),
    (4, b"styp", "MP4"),
    (0, b"\x1a\x45\xdf\xa3", "Matroska or WebM"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "WMA"),
    (8, b"AVI ", "AVI"),
    (0, b"ADIF", "AAC"),
    (0, b"wvpk", "WavPack"),
    (0, b"TTA1", "TTA"),
    (0, b"MAC ", "Monkey's Audio"),
    (0, b"MPCK", "Musepack"),
    (0, b"MP+", "Musepack"),
    (0, b"#!AMR", "AMR"),
    (0, b"FLV\x01", "FLV"),
    (0, b"\x0b\x77", "AC-3"),
    (0, b"\x00\x00\x01\xba", "MPEG program stream"),
)
# Files that are not audio, by their first bytes.
_OTHERS = (
    (b"version https://git-lfs", "a git-lfs pointer: run `git lfs pull`"),
    (b"\x00\x05\x16\x07", "a ._ file of macOS, the attributes of another file"),
    (b"\x00\x05\x16\x00", "an AppleSingle file of macOS"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"%PDF", "a PDF document"),
)
_TEXTS = (
    (("<!doctype html", "<html", "<head", "<body"), "an HTML page"),
    (("<?xml", "<error", "<rss"), "an XML text"),
    (("{", "["), "a JSON text"),
)


def readable_suffixes() -> tuple[str, ...]:
    """Suffixes of all audio that can be read with the installed packages."""
    return (*SUFFIXES, *FFMPEG_SUFFIXES) if has_ffmpeg() else SUFFIXES


def has_ffmpeg() -> bool:
    """Whether PyAV is installed."""
    return extras.is_installed("av")


def is_sndfile(head: bytes) -> str:
    """The name of a container that libsndfile knows; "" for others."""
    return _named(head, _SNDFILE_MAGIC)


def is_ffmpeg(head: bytes) -> str:
    """The name of a container or codec that only PyAV knows; "" for others."""
    if head[0:1] == b"\x47" and head[188:189] == b"\x47" and head[376:377] == b"\x47":
        return "MPEG transport stream"
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:  # layer 0
        return "AAC"
    return _named(head, _FFMPEG_MAGIC)


def is_mpeg(head: bytes) -> bool:
    """Whether a file begins with a frame of MPEG audio."""
    return mpeg.parse_header(head[:4]) is not None


def not_audio(head: bytes, size: int) -> str:
    """The kind of a file that is not audio, by its first bytes; "" if they do not show it."""
    if size == 0:
        return "an empty file (zero bytes)"
    for mark, name in _OTHERS:
        if head.startswith(mark):
            return name
    if not head.strip(b"\0"):
        return "zeros" if size <= len(head) else ""
    text = _as_text(head)
    if not text:
        return ""
    beginning = " ".join(text.split())[:40]
    for marks, name in _TEXTS:
        if text.lstrip().lower().startswith(marks):
            return f"{name} (it begins with {beginning!r})"
    return f"a text (it begins with {beginning!r})"


def _named(head: bytes, table: tuple[tuple[int, bytes, str], ...]) -> str:
    for offset, mark, name in table:
        if head[offset : offset + len(mark)] == mark:
            return name
    return ""


def _as_text(head: bytes) -> str:
    """The first bytes as text; "" if they are not text."""
    encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    for cut in range(4):  # the last character may be cut
        try:
            text = head[: len(head) - cut].decode(encoding)
        except UnicodeDecodeError:
            continue
        is_printable = all(c.isprintable() or c.isspace() for c in text)
        return text if is_printable and text.strip() else ""
    return ""
