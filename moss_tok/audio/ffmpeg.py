"""Decodes formats that libsndfile cannot read, with PyAV (the libraries of FFmpeg).

The output of some decoders depends on all earlier packets: AAC and WMA fill bands with noise from a
generator, and its state cannot be derived from a position in the file. So a file is decoded from
its start. To read a segment of a long file faster, AAC, Opus and lossless files are divided into
cells. A new decoder starts a little before each cell. This holds for a segment and for the whole
file, so both give the same samples.
"""

import collections
import contextlib
import itertools
import struct
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np

from moss_tok.audio import decoder as decoders
from moss_tok.audio import notes

# Packets per cell, for codecs whose packets give their number of samples.
_CELL_PACKETS = {"aac": 4096, "opus": 1024, "alac": 64, "flac": 64}
_PREROLL_PACKETS = 100
_FULL_SCALE = {"u8": 128.0, "s16": 2.0**15, "s32": 2.0**31, "s64": 2.0**63}
_SUBTYPES = {"pcm_s24le": "PCM_24", "pcm_s24be": "PCM_24", "pcm_f32le": "FLOAT",
             "pcm_f32be": "FLOAT", "pcm_f64le": "DOUBLE", "pcm_f64be": "DOUBLE",
             "pcm_s32le": "PCM_32", "pcm_s32be": "PCM_32"}  # fmt: skip
_LOSSLESS = ("flac", "wavpack", "tta", "ape")


class FfmpegDecoder:
    """A `decoder.Decoder` for the first audio track of a file that FFmpeg can open."""

    def __init__(self, name: str, file: BinaryIO):
        """Opens a file; `close` leaves `file` open.

        Raises:
          ValueError: FFmpeg does not know the format, or the file has no audio.
        """
        self._name = name
        self._file = file
        self._container = None
        self._damage = ""
        self._start(0)
        self._pending = next(self._blocks, None)  # decoded samples [S, C] that were not read yet
        if self._pending is None and self._damage:
            raise ValueError(f"{name}: cannot be decoded ({self._damage})")
        if self._pending is None:
            raise ValueError(f"{name}: empty audio")
        self.sample_rate = self._rate
        self.num_channels = self._pending.shape[1]
        self.subtype = _subtype(self._stream.codec_context)
        self.num_frames = None

    def read(self, frames: int) -> np.ndarray:
        """See `decoder.Decoder`."""
        blocks = [np.zeros((0, self.num_channels), np.float32)]
        while frames > 0:
            block = self._pending
            if block is None:
                block = next(self._blocks, None)
            if block is None:
                break
            self._pending = block[frames:] if block.shape[0] > frames else None
            blocks.append(block[:frames])
            frames -= blocks[-1].shape[0]
        return np.concatenate(blocks)

    def seek(self, frame: int) -> None:
        """See `decoder.Decoder`."""
        self.close()
        self._pending = None
        position = self._start(frame)
        decoders.skip(self, frame - position)

    def count(self) -> int:
        """Samples per channel of the whole file."""
        if not self._cell:
            self.seek(0)
            return sum(block.shape[0] for block in decoders.read_blocks(self))
        self.close()
        self._open()
        total = 0
        number = 0  # of `last`
        last = None
        for packet in self._packets():
            if last is not None:
                total += self._count_samples(last)
                number += 1
            last = packet
        if last is not None:
            total += self._count_decoded_samples(last, number)
        return total

    def _count_decoded_samples(self, packet: Any, number: int) -> int:
        """Samples of the last packet, which may be cut, or shorter than its header says."""
        import av

        try:
            frames = self._new_decoder(number).decode(packet)
        except av.FFmpegError:
            return 0
        return sum(frame.samples for frame in frames)

    def close(self) -> None:
        """See `decoder.Decoder`."""
        self._container.close()

    def _open(self) -> None:
        import av

        self._file.seek(0)
        with _named_errors(self._name):
            self._container = av.open(self._file, metadata_errors="ignore")
        audio = self._container.streams.audio
        if not audio:
            raise ValueError(f"{self._name}: has no audio track")
        if len(audio) > 1:
            notes.say_once(f"{self._name}: has {len(audio)} audio tracks, the first is read")
        self._stream = audio[0]
        if self._stream.codec_context is None:
            raise ValueError(f"{self._name}: its codec is not supported")
        self._cell = self._cell_packets()

    def _start(self, frame: int) -> int:
        """Opens the file at the cell that contains `frame`; returns the cell's first frame."""
        self._open()
        self._rate = 0
        packets = self._packets()
        history: collections.deque[Any] = collections.deque(maxlen=_PREROLL_PACKETS)
        cell: list[Any] = []
        number = 0  # number of packets before the cell
        start = 0
        position = 0
        while self._cell and position <= frame:
            packet = next(packets, None)
            if packet is None:
                break
            if len(cell) == self._cell:
                history.extend(cell)
                number += len(cell)
                cell = []
                start = position
            cell.append(packet)
            position += self._count_samples(packet)
        self._blocks = self._decode(history, number, itertools.chain(cell, packets))
        return start

    def _cell_packets(self) -> int:
        """Packets per cell; 0 if the file must be decoded from its start."""
        codec = self._stream.codec_context
        has_cells = codec.name in _CELL_PACKETS
        if codec.name == "aac":
            has_cells = codec.frame_size > 0 and codec.profile == "LC"
        elif codec.name in ("alac", "flac"):
            has_cells = (1 / self._stream.time_base) % codec.sample_rate == 0
        return _CELL_PACKETS[codec.name] if has_cells else 0

    def _count_samples(self, packet: Any) -> int:
        """Samples per channel in a packet of a file with cells."""
        if packet.is_discard:
            return 0
        codec = self._stream.codec_context
        if codec.name == "opus":
            total = _opus_samples(bytes(packet)[:2])
        elif codec.name == "aac":
            total = codec.frame_size
        else:
            total = round((packet.duration or 0) * packet.time_base * codec.sample_rate)
        if packet.has_sidedata("skip_samples"):
            for data in packet.iter_sidedata():
                if data.data_type == "skip_samples":
                    total -= sum(struct.unpack("<II", bytes(data)[:8]))
        return max(0, total)

    def _packets(self) -> Iterator[Any]:
        with _named_errors(self._name):
            for packet in self._container.demux(self._stream):
                if packet.size:
                    yield packet

    def _decode(
        self,
        history: collections.deque[Any],
        number: int,
        packets: Iterable[Any],
    ) -> Iterator[np.ndarray]:
        """Yields blocks [S, C] of packets.

        Args:
          history: Packets before the first one, for the preroll.
          number: Number of the first packet.
          packets: The packets.
        """
        import av

        decoder = None
        self._damage = ""
        for packet in packets:
            if decoder is None or (self._cell and number % self._cell == 0):
                decoder = self._new_decoder(number)
                for earlier_packet in history:
                    decoder.decode(earlier_packet)
            number += 1
            history.append(packet)
            try:
                decoded = decoder.decode(packet)
            except av.FFmpegError as error:
                self._damage = self._damage or str(error.strerror)
                continue
            if decoded and self._damage:  # the damage is not at the end of the file
                raise ValueError(f"{self._name}: corrupt ({self._damage})")
            for frame in decoded:
                yield self._to_block(frame)
        if decoder is not None:
            with _named_errors(self._name):
                decoded = decoder.decode(None)
            for frame in decoded:
                yield self._to_block(frame)

    def _new_decoder(self, number: int) -> Any:
        """A decoder for the packets from `number` on, and for its history before them."""
        import av

        of_file = self._stream.codec_context
        if not self._cell:
            return of_file
        name = of_file.name
        options = {}
        if name == "opus" and "libopus" in av.codecs_available:  # the reference
            name = "libopus"
            options["request_sample_fmt"] = "flt"
        codec = av.CodecContext.create(name, "r")
        extradata = of_file.extradata
        if of_file.name == "opus" and number and extradata:
            extradata = extradata[:10] + b"\0\0" + extradata[12:]  # skip nothing
        codec.extradata = extradata
        codec.sample_rate = of_file.sample_rate
        codec.layout = of_file.layout
        codec.options = options
        codec.thread_count = 1
        return codec

    def _to_block(self, frame: Any) -> np.ndarray:
        """[S, C] float32 of a decoded frame.

        Raises:
          ValueError: The rate or the number of channels has changed.
        """
        wav = frame.to_ndarray()
        rate = frame.sample_rate
        num_channels = frame.layout.nb_channels
        wav = wav.T if frame.format.is_planar else wav.reshape(-1, num_channels)
        if not self._rate:
            self._rate = rate
            self._channels = num_channels
        if (rate, num_channels) != (self._rate, self._channels):
            raise ValueError(
                f"{self._name}: changes from {self._rate} Hz, {self._channels} channels to "
                f"{rate} Hz, {num_channels} channels; convert it to one kind first"
            )
        sample_format = frame.format.name.removesuffix("p")
        full_scale = _FULL_SCALE.get(sample_format)
        if full_scale is None:
            return np.ascontiguousarray(wav, np.float32)
        offset = full_scale if sample_format == "u8" else 0
        scaled = (wav.astype(np.float64) - offset) / full_scale
        return np.ascontiguousarray(scaled, np.float32)


@contextlib.contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """Turns errors of PyAV into a ValueError that names the file."""
    import av

    try:
        yield
    except av.FFmpegError as error:
        raise ValueError(f"{name}: truncated or corrupt ({error.strerror})") from error


def _opus_samples(head: bytes) -> int:
    """Samples at 48 kHz of an Opus packet, by its first two bytes (RFC 6716, 3.1)."""
    config = head[0] >> 3
    if config < 12:
        size = (480, 960, 1920, 2880)[config & 3]
    elif config < 16:
        size = (480, 960)[config & 1]
    else:
        size = (120, 240, 480, 960)[config & 3]
    code = head[0] & 3
    if code == 3:
        return size * (head[1] & 63) if len(head) > 1 else 0
    return size * (1 if code == 0 else 2)


def _subtype(codec: Any) -> str:
    if codec.name == "alac":
        return "ALAC_16" if codec.format.name.startswith("s16") else "ALAC_24"
    if codec.name in _LOSSLESS:
        return "PCM_16" if codec.format.name.startswith(("s16", "u8")) else "PCM_24"
    return _SUBTYPES.get(codec.name, codec.name.upper())
