"""What PyAV reads: the same by every function, and what is said where it is not installed."""

import io

import numpy as np
import pytest
from audio_helpers import FUNCTIONS, RATE, agree, encoded, muxed, sound, wav_with

from moss_tok.audio import ffmpeg, files, kinds, notes
from moss_tok.audio.files import AudioBytes

av = pytest.importorskip("av")


CASES = [
    ("aac", "ipod", {}, 2048),
    ("aac", "mp4", {"movflags": "frag_keyframe+empty_moov"}, 2048),
    ("aac", "adts", {}, 2048),
    ("aac", "matroska", {}, 2048),
    ("libopus", "webm", {}, 0),
    ("libopus", "ogg", {}, 0),
    ("alac", "ipod", {}, 0),
    ("flac", "matroska", {}, 0),
    ("flac", "ogg", {}, 0),
    ("wmav2", "asf", {}, 4096),
    ("ac3", "ac3", {}, 2048),
    ("mp2", "mp2", {}, 2048),
    ("pcm_s16le", "mov", {}, 0),
    ("adpcm_yamaha", "wav", {}, 4096),
]
LOSSLESS = ("alac", "flac", "pcm_s16le")


@pytest.mark.parametrize(("codec", "container", "options", "slack"), CASES)
@pytest.mark.parametrize("channels", [1, 2])
def test_it_is_read_whole(codec, container, options, slack, channels):
    wav = sound(3.0, 48000, channels)
    if codec in ("alac", "flac", "pcm_s16le"):
        wav = np.round(wav * 32768) / 32768
    data = muxed(wav.astype(np.float32), 48000, codec, container, **options)
    whole = agree(data)
    assert whole.shape[0] == channels
    assert abs(whole.shape[1] - len(wav)) <= slack  # what the codec adds, or WMA loses
    if codec in LOSSLESS:
        np.testing.assert_allclose(whole, wav.T, atol=1e-6)


@pytest.mark.parametrize(
    ("codec", "container"), [("aac", "ipod"), ("libopus", "webm"), ("alac", "ipod")]
)
def test_cells_are_as_their_whole(monkeypatch, codec, container):
    """A decoder that starts anew at each cell gives what the cells give one by one."""
    data = muxed(sound(6.0, 48000, 1), 48000, codec, container)
    before = agree(data)
    monkeypatch.setattr(ffmpeg, "_CELL_PACKETS", {"aac": 130, "opus": 120, "alac": 5})
    after = agree(data)
    assert after.shape == before.shape
    if codec != "aac":  # its noise is another one from the second cell on
        np.testing.assert_allclose(after, before, atol=1e-6)
    else:
        np.testing.assert_allclose(after[:, :130000], before[:, :130000], atol=1e-6)


def test_deep_lossless_samples():
    wav = np.round(sound(0.5, 48000) * 2**23) / 2**23
    data = muxed(wav.astype(np.float32), 48000, "alac", "ipod", form="s32p")
    np.testing.assert_array_equal(agree(data), wav.T)
    assert files.subtype(AudioBytes(data, "a")) == "ALAC_24"


@pytest.mark.parametrize(
    ("codec", "container"),
    [("aac", "ipod"), ("alac", "mov"), ("libopus", "webm"), ("aac", "matroska"), ("wmav2", "asf")],
)
def test_what_is_cut_is_refused(codec, container):
    data = muxed(sound(2.0, 48000), 48000, codec, container)
    agree(data)
    for share in (0.3, 0.8, 0.999):
        for function in FUNCTIONS:
            with pytest.raises(ValueError, match="a: truncated, .* bytes missing"):
                function(AudioBytes(data[: int(len(data) * share)], "a"))


def test_a_cut_stream_is_read_to_where_it_ends():
    """Where no header announces how long it is."""
    data = muxed(sound(2.0, 48000), 48000, "aac", "adts")
    assert 0 < agree(data[: len(data) // 2]).shape[1] < 96000
    np.testing.assert_array_equal(agree(data + data)[:, : 2 * 48000], agree(data)[:, : 2 * 48000])


def test_the_first_of_several_tracks_is_read(capsys):
    notes.forget()
    wav = sound(1.0, 48000)
    data = muxed(wav, 48000, "flac", "matroska", tracks=2)
    np.testing.assert_allclose(agree(data), wav.T, atol=1e-4)
    assert capsys.readouterr().err == "note: a: has 2 audio tracks, the first is read\n"


def test_a_video_without_sound():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8))
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    with pytest.raises(ValueError, match="a: has no audio track"):
        files.read(AudioBytes(file.getvalue(), "a"), RATE, 1)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: muxed(sound(0.5, 48000), 48000, "aac", "ipod"), "MP4"),
        (lambda: muxed(sound(0.5, 48000), 48000, "aac", "adts"), "AAC"),
        (lambda: muxed(sound(0.5, 48000), 48000, "libopus", "webm"), "Matroska or WebM"),
        (lambda: muxed(sound(0.5, 48000), 48000, "wmav2", "asf"), "WMA"),
        (lambda: muxed(sound(0.5, 48000), 48000, "flac", "ogg"), "flac in Ogg"),
        (lambda: wav_with(0xFF, bytes(3000)), "AAC in WAV"),
    ],
)
def test_without_pyav_the_error_names_the_extra(monkeypatch, make, what):
    data = make()
    monkeypatch.setattr(kinds, "has_ffmpeg", lambda: False)
    message = rf"a: {what} is not supported without PyAV, pip install 'moss_tok\[ffmpeg\]'"
    for function in FUNCTIONS:
        with pytest.raises(ValueError, match=message):
            function(AudioBytes(data, "a"))


def test_what_pyav_cannot_decode_either():
    data = wav_with(0xFF, np.random.default_rng(0).bytes(3000))
    with pytest.raises(ValueError, match="^a: AAC in WAV is not supported "):
        files.read(AudioBytes(data, "a"), RATE, 1)
    data = encoded(sound(0.1), RATE)
    with pytest.raises(ValueError, match="^a: codec 0x1234 in WAV is not supported "):
        files.read(AudioBytes(data[:20] + b"\x34\x12" + data[22:], "a"), RATE, 1)
