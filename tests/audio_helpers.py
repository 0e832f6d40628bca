"""Audio files of many kinds, made by the tests that read them."""

import io
import struct

import numpy as np
import soundfile

from moss_tok.audio import files
from moss_tok.audio.files import AudioBytes

RATE = 16000  # Hz


def sound(seconds=1.0, rate=RATE, channels=1, seed=0):
    """Noise that swells and fades, so that variable bitrates vary. [S, C]."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * rate)) / rate
    level = 0.2 * (0.5 + 0.5 * np.sin(2 * np.pi * 1.3 * time)) ** 2
    tone = 0.2 * np.sin(2 * np.pi * (300 + 100 * np.sin(2 * time)) * time)
    wav = level * rng.standard_normal(len(time)) + tone
    return np.stack([wav * (1 - 0.3 * c) for c in range(channels)], 1).astype(np.float32)


def encoded(wav, rate=RATE, kind="WAV", subtype=None, **options):
    """The bytes of an audio file."""
    file = io.BytesIO()
    file.name = "a"
    soundfile.write(file, wav, rate, format=kind, subtype=subtype, **options)
    return file.getvalue()


def wav_with(tag, data, rate=RATE, channels=1):
    """A WAV of another codec."""
    fmt = struct.pack("<HHIIHHHHIHHH", tag, channels, rate, 16000, 1, 0, 12, 1, 2, 576, 1, 1393)
    chunks = b"WAVEfmt " + struct.pack("<I", len(fmt)) + fmt
    chunks += b"data" + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
    return b"RIFF" + struct.pack("<I", len(chunks)) + chunks


def agree(data, name="a"):
    """Reads by every function; they must agree. Returns [C, S]."""
    source = AudioBytes(data, name)
    whole, rate = files.read_native(source)
    channels, num_samples = whole.shape
    assert round(files.duration_seconds(source) * rate, 3) == num_samples
    for seconds in (0.08, 0.3, 7.0):
        blocks = list(files.read_blocks(source, rate, channels, seconds))
        np.testing.assert_array_equal(np.concatenate(blocks, axis=1), whole)
    rng = np.random.default_rng(0)
    for start in [0, *rng.integers(0, num_samples, 6), max(0, num_samples - 100)]:
        # A little more than the sample's time: a float may be a little less.
        part = files.read_segment(source, (start + 0.01) / rate, 0.2, rate)
        expected = whole[:, start : start + int(np.ceil(0.2 * rate))]
        np.testing.assert_allclose(part, expected, atol=1e-6, rtol=0, err_msg=f"{name} {start}")
    return whole


# Everything that reads a file.
FUNCTIONS = (
    lambda source: files.read(source, RATE, 1),
    lambda source: list(files.read_blocks(source, RATE, 1, 0.3)),
    lambda source: files.read_segment(source, 0.1, 0.1, RATE),
    files.duration_seconds,
)


def muxed(wav, rate, codec, container, tracks=1, form="", **options):
    """The bytes of a file that PyAV writes; the second track is silent."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=container, options=options) as output:
        streams = []
        for _ in range(tracks):
            stream = output.add_stream(codec, rate=rate)
            stream.codec_context.layout = "stereo" if wav.shape[1] == 2 else "mono"
            if codec == "wmav2":
                stream.codec_context.bit_rate = 96000
            if form:
                stream.codec_context.format = form
            streams.append(stream)
        for number, stream in enumerate(streams):
            for packet in _packets(stream, wav if number == 0 else 0 * wav, rate):
                output.mux(packet)
    return file.getvalue()


def _packets(stream, wav, rate):
    import av

    resampler = av.AudioResampler(
        format=stream.codec_context.format, layout=stream.codec_context.layout,
        rate=stream.codec_context.sample_rate, frame_size=stream.codec_context.frame_size or 1024,
    )  # fmt: skip
    data = np.ascontiguousarray(wav.reshape(1, -1))
    frame = av.AudioFrame.from_ndarray(data, "flt", "stereo" if wav.shape[1] == 2 else "mono")
    frame.sample_rate = rate
    for part in [*resampler.resample(frame), *resampler.resample(None), None]:
        for packet in stream.encode(part):
            if packet.size:
                yield packet
