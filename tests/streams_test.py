"""Every file is read to its real end, by every function alike, or refused in words that help."""

import io
import multiprocessing
import struct

import numpy as np
import pytest
from audio_helpers import FUNCTIONS, RATE, agree, encoded, sound, wav_with

from moss_tok.audio import files, flac, libsndfile, mpeg, notes, ogg
from moss_tok.audio.files import AudioBytes


def mp3(wav, rate=RATE, mode="VARIABLE", level=0.5):
    return encoded(wav, rate, "MP3", bitrate_mode=mode, compression_level=level)


def without_info(data):
    """An MP3 without its first frame, the one with the Xing header."""
    form = mpeg.parse_header(data[:4])
    return data[form.sizes()[data[1:3]] :]


def with_count(data, num_frames):
    """An MP3 whose Xing header says another number of frames."""
    at = max(data.find(mark, 0, 200) for mark in (b"Xing", b"Info")) + 8
    return data[:at] + struct.pack(">I", num_frames) + data[at + 4 :]


def patched(data, *fields):
    """The data with (offset, bytes) written over it."""
    data = bytearray(data)
    for offset, field in fields:
        data[offset : offset + len(field)] = field
    return bytes(data)


@pytest.mark.parametrize(("rate", "level"), [(8000, 0.9), (16000, 0.5), (44100, 0.1)])
@pytest.mark.parametrize("mode", ["VARIABLE", "CONSTANT"])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("seconds", [0.05, 3.0])
def test_mp3_whatever_its_header_says(rate, level, mode, channels, seconds):
    wav = sound(seconds, rate, channels)
    data = mp3(wav, rate, mode, level)
    whole = agree(data)
    if b"LAME" not in data[:200]:  # a frame is too small for a header
        return
    assert whole.shape == wav.T.shape
    for count in (0, 3, 10**6):
        np.testing.assert_allclose(agree(with_count(data, count)), whole, atol=1e-6)
    # The delay of the encoder and of the decoder is not known then, and stays.
    longer = agree(without_info(data))
    spf = mpeg.parse_header(data[:4]).samples_per_frame
    assert longer.shape[1] % spf == 0 and 0 < longer.shape[1] - whole.shape[1] <= 4 * spf
    # A tag before it, another after it, and what a stream cuts.
    tag = b"ID3\4\0\0\0\0\1\0" + b"\xff\xfb\x90\0" * 32
    np.testing.assert_array_equal(agree(tag + data + b"TAG" + bytes(125)), whole)
    cut = without_info(data) + without_info(data)[:40]
    np.testing.assert_array_equal(agree(cut), longer)


@pytest.mark.parametrize("junk", [b"", bytes(3000), b"ID3\4\0\0\0\0\0\x0a" + b"\xff\xfb" * 5])
def test_appended_mp3s(junk):
    first, second = (mp3(sound(1.0, seed=n), level=0.3 + 0.4 * n) for n in range(2))
    parts = [files.read_native(AudioBytes(data, "a"))[0] for data in (first, second)]
    joined = agree(first + junk + second)
    np.testing.assert_allclose(joined, np.concatenate(parts, axis=1), atol=1e-6)
    frames = without_info(first) + junk + without_info(second)
    both = sum(agree(without_info(data)).shape[1] for data in (first, second))
    assert agree(frames).shape[1] == both


def test_junk_before_an_mp3():
    data = mp3(sound())
    junk = np.random.default_rng(0).bytes(3000)
    np.testing.assert_array_equal(agree(bytes(500) + junk + data, "a.mp3"), agree(data))


def test_a_truncated_mp3_is_refused_where_its_header_says_so():
    data = mp3(sound(3.0))
    for function in FUNCTIONS:
        with pytest.raises(ValueError, match="a: truncated, .* frames missing"):
            function(AudioBytes(data[: len(data) * 2 // 3], "a"))


def test_an_mp3_without_a_whole_frame_is_named():
    with pytest.raises(ValueError, match=r"a.mp3: not audio \(no whole frame; accepted: "):
        files.read_native(AudioBytes(mp3(sound(1))[:60], "a.mp3"))


def test_damaged_frames_of_an_mp3_are_said(capsys):
    data = mp3(sound(3))
    middle = len(data) // 2
    assert len(files.read_native(AudioBytes(data, "whole.mp3"))[0][0]) == 3 * RATE
    assert not capsys.readouterr().err
    damaged = data[:middle] + bytes(900) + data[middle + 900 :]
    wav, _ = files.read_native(AudioBytes(damaged, "damaged.mp3"))
    assert 2 * RATE < wav.shape[1] < 3 * RATE
    err = capsys.readouterr().err
    assert "damaged.mp3: damaged, " in err and "frames of MPEG audio are left out" in err


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_damaged_pages_of_an_ogg_are_refused(subtype):
    """Decoders leave such pages out without a word."""
    data = bytearray(encoded(sound(3), RATE, "OGG", subtype=subtype))
    data[len(data) // 2] ^= 1
    with pytest.raises(ValueError, match="a.ogg: truncated or corrupt, pages damaged: 1"):
        files.read_native(AudioBytes(bytes(data), "a.ogg"))


def test_mpeg_in_wav():
    data = mp3(sound(2.0))
    np.testing.assert_allclose(agree(wav_with(0x55, data)), agree(data), atol=1e-6)
    cut = wav_with(0x55, data)[:-500]
    with pytest.raises(ValueError, match="a: truncated, 50. bytes missing"):
        files.read_native(AudioBytes(cut, "a"))


@pytest.mark.parametrize(
    ("subtype", "num_samples"),
    [("GSM610", 8000), ("G721_32", 8040), ("NMS_ADPCM_24", 8000), ("IMA_ADPCM", 8080)],
)
def test_codecs_of_wav_that_cannot_seek(subtype, num_samples):
    wav = sound(1.0, 8000)
    whole = agree(encoded(wav, 8000, "WAV", subtype))
    assert whole.shape[1] == pytest.approx(num_samples, abs=600)
    assert np.corrcoef(whole[0, :8000], wav[:, 0])[0, 1] > 0.7
    if subtype == "GSM610":  # not a block of noise more
        assert whole.shape[1] == 8000


def opus(wav, rate=48000):
    return encoded(wav, rate, "OGG", "OPUS")


@pytest.mark.parametrize(
    "data",
    [
        encoded(sound(2.0, 44100, 2), 44100, "OGG", "VORBIS"),
        encoded(sound(6.0), RATE, "OGG", "VORBIS"),
        opus(sound(3.0, 48000, 2)),
        opus(sound(0.02, 48000)),
        opus(sound(4.0), RATE),
        encoded(sound(3.0), RATE, "FLAC", "PCM_24"),
        encoded(sound(9.0, 44100, 2), 44100, "FLAC"),
    ],
    ids=["vorbis", "long vorbis", "opus", "short opus", "opus 16k", "flac", "long flac"],
)
def test_chains(capsys, data):
    """Read alone; twice, which is as long; and what was cut."""
    whole = agree(data)
    joined = agree(data + data)
    np.testing.assert_allclose(joined, np.concatenate([whole, whole], axis=1), atol=1e-6)
    if data[:4] == b"OggS":  # announces no length
        notes.forget()
        if whole.shape[1] < 2000:  # all in one page
            return
        assert 0 < agree(data[: len(data) * 3 // 4]).shape[1] < whole.shape[1]
        said = "note: a: has no last page, may be cut; read to where it ends\n"
        assert capsys.readouterr().err == said
        with pytest.raises(ValueError, match="truncated or corrupt .ends before its first audio"):
            files.read(AudioBytes(data[:1000], "a"), RATE, 1)
        return
    for share in (0.3, 0.9, 0.9999):
        for function in FUNCTIONS:
            with pytest.raises(ValueError, match="a: truncated or corrupt"):
                function(AudioBytes(data[: int(len(data) * share)], "a"))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (mp3(sound()), mp3(sound(1.0, 44100), 44100)),
        (mp3(sound()), mp3(sound(1.0, channels=2))),
        (encoded(sound(), RATE, "OGG"), encoded(sound(1.0, 22050), 22050, "OGG")),
        (encoded(sound(), RATE, "FLAC"), encoded(sound(1.0, channels=2), RATE, "FLAC")),
    ],
)
def test_parts_of_different_kinds_are_refused(first, second):
    with pytest.raises(ValueError, match="a: has parts of different kinds: 16000 Hz, 1 channel, "):
        files.read(AudioBytes(first + second, "a"), RATE, 1)


def test_a_flac_frame_is_found_by_its_checksums():
    data = encoded(sound(20.0, 44100, 2), 44100, "FLAC")
    file = io.BytesIO(data)
    assert flac.find_streams(file, 0, len(data)) == [(0, len(data))]
    assert flac.is_whole(file, 0, len(data))
    assert not flac.is_whole(file, 0, len(data) - 1)
    assert flac.find_streams(io.BytesIO(data + data), 0, 2 * len(data))[1][0] == len(data)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_an_ogg_that_begins_in_the_middle(subtype):
    """As who listens to a web radio stores it."""
    rate = 48000
    data = encoded(sound(9.0, rate), rate, "OGG", subtype)
    starts = [place for place in range(len(data)) if data[place : place + 4] == b"OggS"]
    granules = [int.from_bytes(data[place + 6 : place + 14], "little") for place in starts]
    first = next(n for n, granule in enumerate(granules) if granule)
    later = first + 3
    whole = agree(data)
    joined = agree(data[: starts[first]] + data[starts[later] :])
    assert 0 < whole.shape[1] - joined.shape[1] < 5 * rate
    np.testing.assert_allclose(joined[:, -rate:], whole[:, -rate:], atol=1e-6)


def test_links_of_an_ogg():
    data = encoded(sound(2.0), RATE, "OGG")
    links = ogg.find_links(io.BytesIO(data + b"junk" + data[:-9]), 0, 2 * len(data) - 5)
    assert [link.codecs for link in links] == [["vorbis"]] * 2
    assert [link.ended for link in links] == [True, False]
    assert links[1].start == len(data) + 4 and links[0].granule == 32000


KINDS = [
    ("WAV", "PCM_16"), ("WAVEX", "PCM_24"), ("RF64", "PCM_16"), ("W64", "FLOAT"),
    ("AIFF", "PCM_16"), ("AIFF", "FLOAT"), ("AU", "PCM_16"), ("AU", "ULAW"), ("CAF", "PCM_16"),
    ("CAF", "ALAC_24"), ("SVX", "PCM_16"), ("NIST", "PCM_16"), ("VOC", "PCM_16"),
]  # fmt: skip


# What is refused by one must be refused by all.
@pytest.mark.parametrize("endian", ["LITTLE", "BIG"])
@pytest.mark.parametrize(("kind", "subtype"), KINDS)
def test_what_announces_its_size(kind, subtype, endian):
    if kind not in ("WAV", "AU", "CAF", "NIST") or subtype.startswith("ALAC"):
        endian = "FILE"
    data = encoded(sound(), RATE, kind, subtype, endian=endian)
    whole = agree(data)
    assert whole.shape == (1, RATE)
    for size in (len(data) - 2, len(data) * 2 // 3, len(data) // 4):
        for function in FUNCTIONS:
            with pytest.raises(ValueError, match="a: truncated"):
                function(AudioBytes(data[:size], "a"))
    if kind in ("WAV", "RF64", "AIFF", "AU"):
        np.testing.assert_array_equal(agree(data + b"LIST\4\0\0\0INFO")[:, :RATE], whole)


def sizes(form, *values):
    return [struct.pack(form, value) for value in values]


@pytest.mark.parametrize(
    ("kind", "options", "mark", "skip", "fields"),
    [
        ("WAV", {}, b"data", 4, sizes("<I", 0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF024, 0x80000000)),
        ("WAV", {"endian": "BIG"}, b"data", 4, sizes(">I", 0xFFFFFFFF, 0x7FFFF024)),
        ("RF64", {}, b"ds64", 8, [bytes(24), b"\xff" * 24]),
        ("W64", {}, b"data", 16, sizes("<Q", 24, 2**63 - 1, 2**64 - 1)),
        ("AIFF", {}, b"SSND", 4, sizes(">I", 0x7F000008, 0xFFFFFFFF)),
        ("AU", {}, b".snd", 8, sizes(">I", 0xFFFFFFFF, 0x7FFFFFFF)),
        ("CAF", {}, b"data", 4, sizes(">Q", 2**64 - 1, 2**63 - 1)),
    ],
)
def test_streamed_sizes_are_read_to_the_end(capsys, kind, options, mark, skip, fields):
    """As programs write them into a pipe."""
    data = encoded(sound(), RATE, kind, "PCM_16", **options)
    whole = agree(data)
    for field in fields:
        streamed = patched(data, (data.index(mark) + skip, field))
        np.testing.assert_array_equal(agree(streamed), whole, err_msg=repr(field))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("kind", "endian", "mark", "skip", "size"),
    [("WAV", "FILE", b"data", 4, 4), ("WAV", "BIG", b"data", 4, 4),
     ("AIFF", "FILE", b"SSND", 4, 4),
     ("AU", "FILE", b".snd", 8, 4), ("AU", "LITTLE", b"dns.", 8, 4),
     ("CAF", "FILE", b"data", 4, 8)],
)  # fmt: skip
def test_a_size_of_zero_is_said_once(capsys, kind, endian, mark, skip, size):
    """As a recorder leaves it that crashed."""
    notes.forget()
    data = encoded(sound(), RATE, kind, "PCM_16", endian=endian)
    crashed = patched(data, (data.index(mark) + skip, bytes(size)))
    np.testing.assert_array_equal(agree(crashed), agree(data))
    said = capsys.readouterr().err
    assert said == "note: a: its header announces no audio; read to the end of the file\n"


@pytest.mark.parametrize("after", [b"", b"LIST\4\0\0\0INFO", b"LIST\5\0\0\0INFOx\0"])
def test_empty_is_what_has_nothing(capsys, after):
    data = encoded(sound(0), RATE, "WAV", "PCM_16")[:44] + after
    for function in FUNCTIONS[:3]:
        with pytest.raises(ValueError, match="a: empty audio"):
            function(AudioBytes(data, "a"))
    assert files.duration_seconds(AudioBytes(data, "a")) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "an empty file .zero bytes."),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git-lfs pointer: run"),
        (b"<!DOCTYPE html>\n<html>404", "an HTML page .it begins with '<!DOCTYPE html> <html>"),
        (b"\xef\xbb\xbf<html>", "an HTML page"),
        (b'{"message": "Not Found"}', "a JSON text .it begins with"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied', "an XML text"),
        (b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X", "a ._ file of macOS"),
        ("caf\u00e9 ".encode() * 900, "a text .it begins with 'caf\u00e9 caf\u00e9"),
        ("hello".encode("utf-16"), "a text .it begins with 'hello'"),
        (b"\x1f\x8b\x08\0", "a gzip archive"),
        (bytes(100), "zeros"),
    ],
)
@pytest.mark.parametrize("suffix", ["wav", "mp3", "ogg", "m4a"])
def test_what_is_no_audio_is_named(data, message, suffix):
    for function in FUNCTIONS:
        with pytest.raises(ValueError, match=f"a.{suffix}: not audio, but {message}"):
            function(AudioBytes(data, f"a.{suffix}"))


@pytest.mark.parametrize("suffix", [".wav", ".mp3"])
def test_noise_is_no_audio(suffix):
    data = b"\1" + np.random.default_rng(0).bytes(10000)
    with pytest.raises(ValueError, match="not audio .Format not recognised.; accepted: wav"):
        files.read(AudioBytes(data, f"a{suffix}"), RATE, 1)


def test_a_file_that_changes_is_looked_at_again(tmp_path):
    """What was counted in it is kept, but not longer than it is true."""
    path = tmp_path / "a.mp3"
    for seconds in (2.0, 1.0, 3.0):
        data = with_count(mp3(sound(seconds)), 1)
        path.write_bytes(data)
        assert files.duration_seconds(path) == seconds


def test_soundfile_does_not_seek_between_reads(tmp_path):
    """It would after each, and the decoder of MP3 lose its state."""
    path = tmp_path / "a.mp3"
    path.write_bytes(mp3(sound()))
    with path.open("rb", buffering=0) as file:
        decoder = libsndfile.LibsndfileDecoder("a", file)
        decoder._file.seek = None
        assert decoder.read(100).shape == decoder.read(100).shape == (100, 1)
        decoder.close()


def test_a_note_is_printed_once_by_all_processes_together(capfd, monkeypatch):
    monkeypatch.delenv("MOSS_TOK_NOTES", raising=False)
    notes.forget()
    notes.say_once("of the parent")
    notes.share_with_workers()
    context = multiprocessing.get_context("spawn")
    texts = ["of the parent", "of a worker"]
    workers = [context.Process(target=_say, args=(texts,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    notes.say_once("of a worker")
    assert capfd.readouterr().err == "note: of the parent\nnote: of a worker\n"
    notes.forget()
    notes.say_once("of a worker")
    assert capfd.readouterr().err == "note: of a worker\n"


def _say(texts):
    for text in texts:
        notes.say_once(text)


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0, (5 * 2**30) % 2**32])
def test_a_wav_longer_than_its_header_can_say(tmp_path, size):
    """As hours from a pipe, or of a program that writes 32 bits of the size."""
    length = 5 * 2**30
    header = encoded(np.zeros((0, 1)), RATE, "WAV", "PCM_16")[:40]
    with (tmp_path / "a.wav").open("wb") as file:  # mostly a hole
        file.write(header + struct.pack("<I", size))
        file.truncate(44 + length - 200)
        file.seek(0, io.SEEK_END)
        file.write(b"\1\2" * 100)
    seconds = length / 2 / RATE
    assert files.duration_seconds(tmp_path / "a.wav") == seconds
    part = files.read_segment(tmp_path / "a.wav", seconds - 100 / RATE, 1.0, RATE)
    np.testing.assert_array_equal(part, np.full((1, 100), 513 / 32768, np.float32))
