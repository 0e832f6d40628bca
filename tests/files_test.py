"""Audio files: formats, rates, channels, segments, and everything that can be wrong with them."""

import json
import os
import struct

import numpy as np
import pytest
import soundfile

from moss_tok.audio import files, manifest, writing

RATE = 16000


def tone(seconds=1.0, rate=RATE, channels=1):
    t = np.arange(int(seconds * rate)) / rate
    return 0.3 * np.sin(2 * np.pi * 440 * t)[:, None].repeat(channels, 1).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.wav", {}),
        ("a.wav", {"subtype": "FLOAT"}),
        ("a.wav", {"subtype": "PCM_24"}),
        ("a.wav", {"format": "RF64"}),
        ("a.flac", {}),
        ("a.ogg", {}),
        ("a.ogg", {"format": "OGG", "subtype": "OPUS"}),
        ("a.mp3", {}),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_formats(tmp_path, name, options, channels):
    soundfile.write(tmp_path / name, tone(channels=channels), RATE, **options)
    wav = files.read(tmp_path / name, RATE, 1)
    assert wav.dtype == np.float32
    assert wav.shape == (1, RATE)
    np.testing.assert_allclose(wav[0, :15000], tone()[:15000, 0], atol=0.05)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_resampling(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", tone(rate=rate, channels=2), rate, subtype="FLOAT")
    wav = files.read(tmp_path / "a.wav", RATE, 1)
    assert abs(wav.shape[1] - RATE) <= 1
    np.testing.assert_allclose(wav[0, 400:15000], tone()[400:15000, 0], atol=2e-3)


def test_channels():
    stereo = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    np.testing.assert_array_equal(files.to_channels(stereo, 1), [[2.0, 3.0]])
    np.testing.assert_array_equal(files.to_channels(stereo[:1], 2), [[1.0, 2.0]] * 2)
    assert files.to_channels(stereo, 2) is stereo


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
@pytest.mark.parametrize(
    ("start", "seconds"), [(0.0, 0.5), (0.25, 0.5), (0.9, 0.5), (0.99995, 1.0)]
)
def test_segments(tmp_path, suffix, start, seconds):
    path = tmp_path / f"a{suffix}"
    soundfile.write(path, tone(), RATE)
    whole = files.read_native(path)[0]
    part = files.read_segment(path, start, seconds, RATE)
    begin = int(start * RATE)
    np.testing.assert_array_equal(part, whole[:, begin : begin + int(seconds * RATE)])
    with pytest.raises(ValueError, match=f"a{suffix}: .*ends after 1 s"):  # it was longer once
        files.read_segment(path, 1.0, seconds, RATE)


def test_what_the_system_cannot_read(tmp_path):
    """As where a file system of the network has gone."""
    (tmp_path / "a.wav").symlink_to("/proc/self/mem")
    with pytest.raises(ValueError, match="a.wav: cannot be read .Input/output error"):
        files.read(tmp_path / "a.wav", RATE, 1)


@pytest.mark.parametrize("rate", [24000, 96000])
def test_long_ogg(tmp_path, rate):
    """Written at once, minutes of Vorbis overflow libsndfile's stack."""
    files.write(tmp_path / "a.ogg", 0.1 * np.ones((2, 150 * rate), np.float32), rate)
    assert soundfile.info(tmp_path / "a.ogg").frames == 150 * rate


def test_a_single_sample(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone()[:1], 192000)
    assert files.read(tmp_path / "a.wav", 24000, 1).shape == (1, 1)


@pytest.mark.parametrize(
    ("name", "shape", "rate", "message"),
    [
        ("a.flac", (1, 9), 700_000, "could not be written"),
        ("a.ogg", (1, 9), 700_000, "ogg takes sample rates"),
        ("a.flac", (300, 9), 24000, "could not be written"),
        ("a.wav", (9,), 24000, r"of the shape \[C, S\]"),
    ],
)
def test_what_cannot_be_written(tmp_path, name, shape, rate, message):
    with pytest.raises(ValueError, match=message):
        files.write(tmp_path / name, np.zeros(shape), rate)
    with pytest.raises(ValueError, match="finite"):
        files.write(tmp_path / name, np.full((1, 9), np.nan), 24000)
    assert list(tmp_path.iterdir()) == []


def test_between_blocks_of_an_mp3_errors_can_be_seen(tmp_path, rng):
    soundfile.write(tmp_path / "a.mp3", 0.1 * rng.standard_normal(24000), 24000)
    before = os.fstat(2)
    blocks = files.read_blocks(tmp_path / "a.mp3", 24000, 1, 0.2)
    next(blocks)
    now = os.fstat(2)
    assert (now.st_dev, now.st_ino) == (before.st_dev, before.st_ino)
    assert sum(block.shape[1] for block in blocks) == 24000 - int(24000 * 0.2)


@pytest.mark.parametrize("kind", ["cut mp3", "noise mp3"])
def test_the_mp3_decoder_is_quiet(tmp_path, capfd, kind):
    if kind == "cut mp3":
        path = make_bad(tmp_path, kind)
    else:
        path = tmp_path / "a.mp3"
        path.write_bytes(b"ID3" + np.random.default_rng(0).bytes(10000))
    with pytest.raises(ValueError, match=r"\.mp3: "):
        files.read(path, RATE, 1)
    assert capfd.readouterr().err == ""


def test_writing_replaces_whole_files(tmp_path):
    path = tmp_path / "a.wav"
    files.write(path, np.array([[2.0, -2.0, 0.5]]), RATE)
    np.testing.assert_allclose(files.read_native(path)[0], [[1, -1, 0.5]], atol=1e-4)

    def fail(file):
        file.write(b"half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        files.write_atomically(path, fail)
    assert files.read_native(path)[0].shape == (1, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["a.wav"]


def _cut(source, share):
    data = source.read_bytes()
    source.write_bytes(data[: int(len(data) * share)])


def make_bad(tmp_path, kind):
    path = tmp_path / "bad"
    if kind == "missing":
        return path
    if kind == "text":
        path = path.with_suffix(".wav")
        path.write_text("hello " * 100)
    elif kind == "no bytes":
        path.write_bytes(b"")
    elif kind == "empty":
        soundfile.write(path := path.with_suffix(".wav"), tone(0), RATE)
    elif kind == "nan":
        wav = tone()
        wav[100] = np.nan
        soundfile.write(path := path.with_suffix(".wav"), wav, RATE, subtype="FLOAT")
    elif kind == "header only":
        soundfile.write(path := path.with_suffix(".wav"), tone(), RATE)
        path.write_bytes(path.read_bytes()[:20])
    elif kind == "folder":
        path.mkdir()
    else:
        soundfile.write(path := path.with_suffix("." + kind.split()[1]), tone(5), RATE)
        _cut(path, 0.6)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no such file"),
        ("folder", "a folder, not a file"),
        ("text", "not audio"),
        ("no bytes", "not audio"),
        ("empty", "empty audio"),
        ("nan", "not finite"),
        ("header only", "truncated or corrupt"),
        ("cut wav", "truncated, .* missing"),
        ("cut flac", "truncated"),
        ("cut mp3", "truncated"),
    ],
)
def test_bad_files(tmp_path, kind, message):
    path = make_bad(tmp_path, kind)
    with pytest.raises(ValueError, match=f"{path.name}: .*{message}"):
        files.read(path, RATE, 1)


@pytest.mark.parametrize("length", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF024])
def test_a_streamed_wav_is_whole(tmp_path, length):
    soundfile.write(tmp_path / "a.wav", tone(), RATE)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    at = data.index(b"data") + 4
    data[at : at + 4] = struct.pack("<I", length)
    (tmp_path / "a.wav").write_bytes(data)
    assert files.read(tmp_path / "a.wav", RATE, 1).shape == (1, RATE)


def test_a_flac_that_does_not_say_its_length_is_whole(tmp_path):
    """As an encoder leaves it that writes into a pipe."""
    path = tmp_path / "a.flac"
    soundfile.write(path, wav := tone(9.0), RATE)
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0  # the number of samples, 36 bits
    data[22:26] = bytes(4)
    path.write_bytes(data)
    assert soundfile.info(path).frames > 2**62
    assert files.read(path, RATE, 1).shape == (1, wav.size)
    blocks = list(files.read_blocks(path, RATE, 1, 2.0))
    np.testing.assert_array_equal(np.concatenate(blocks, axis=1), files.read(path, RATE, 1))
    assert files.duration_seconds(path) == 9.0
    _cut(path, 0.6)
    with pytest.raises(ValueError, match="a.flac: "):
        files.read(path, RATE, 1)


@pytest.mark.parametrize(("seconds", "kind"), [(1.0, "WAV"), (3.9, "RF64")])
def test_a_wav_may_be_longer_than_its_header_can_say(tmp_path, monkeypatch, seconds, kind):
    monkeypatch.setattr(writing, "_WAV_BYTES", 4 * RATE * 2 * 2)
    path = tmp_path / "a.wav"
    files.write_blocks(path, [np.zeros((2, RATE), np.float32)] * 4, RATE, 2, seconds)
    assert soundfile.info(path).format.startswith(kind)
    assert files.read(path, RATE, 2).shape == (2, 4 * RATE)
    if kind == "WAV":  # whose length was not known before
        with pytest.raises(ValueError, match="a.wav: longer than a WAV can be; choose .flac"):
            files.write_blocks(path, [np.zeros((2, RATE), np.float32)] * 5, RATE, 2, seconds)
        assert soundfile.info(path).frames == 4 * RATE
        assert [p.name for p in tmp_path.iterdir()] == ["a.wav"]


def test_manifest(tmp_path):
    for i in range(3):
        soundfile.write(tmp_path / f"{i}.wav", tone(0.5), RATE)
    lines = ['{"path": "0.wav", "split": "test", "domain": "speech"}', '{"path": "1.wav"}']
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    first, second = manifest.find_items(tmp_path / "m.jsonl")
    assert (first.split, first.domain, first.duration_seconds) == ("test", "speech", 0.5)
    assert second.domain == "audio"
    items = manifest.find_items(tmp_path)
    assert len(items) == 3
    assert sorted(i.split for i in items) == ["test", "train", "train"]
    assert items == manifest.find_items(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "m.jsonl:1: must be a JSON object like .*broken JSON"),
        ("[]", "m.jsonl:1: must be a JSON object like .* got list"),
        ("{}", "m.jsonl:1: must have a \"path\", got '{}'"),
        ('{"path": "0.wav", "record": 1}', "m.jsonl:1: a record needs duration_s"),
        ('{"path": "0.wav", "record": -1}', "record must be an integer of at least 0, got -1"),
        ('{"path": "0.wav", "domain": "../a"}', "m.jsonl:1: domain must be a short word"),
        ('{"path": "0.wav", "split": 3}', "m.jsonl:1: split must be a short word, got 3"),
        ('{"path": "0.wav", "duration_s": -1}', "duration_s must be a positive number, got -1"),
        ('{"path": "0.wav", "duration_s": NaN}', "duration_s must be a positive number"),
        ("[" * 100_000, "m.jsonl:1: must be a JSON object like .*broken JSON"),
        ("", "m.jsonl: no lines"),
    ],
)
def test_broken_manifests(tmp_path, text, message):
    soundfile.write(tmp_path / "0.wav", tone(0.5), RATE)
    (tmp_path / "m.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        manifest.find_items(tmp_path / "m.jsonl")


def test_files_that_cannot_be_read_are_listed_all_the_same(tmp_path):
    """Whether they can be replaced is for the reader to say."""
    soundfile.write(tmp_path / "0.wav", tone(0.5), RATE)
    rows = [{"path": "0.wav", "speaker": "A"}, {"path": "gone.wav"}]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    items = manifest.find_items(tmp_path / "m.jsonl")
    assert [i.duration_seconds for i in items] == [0.5, 0.0]
    assert items[0].metadata == {"speaker": "A"}


def test_no_such_source(tmp_path):
    with pytest.raises(ValueError, match="no such folder or manifest"):
        manifest.find_items(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no audio files"):
        manifest.find_items(tmp_path)


@pytest.mark.parametrize("rate", [16000, 24000, 44100])
@pytest.mark.parametrize("num_samples", [1, 100, 16000, 48000, 70001])
def test_blocks_are_the_whole(tmp_path, rng, rate, num_samples):
    """Resampling does not notice where a block ends."""
    path = tmp_path / "a.wav"
    files.write(path, 0.1 * rng.standard_normal((2, num_samples)), rate)
    for seconds, channels in ((0.3, 1), (1.0, 2)):
        blocks = list(files.read_blocks(path, 24000, channels, seconds))
        whole = files.read(path, 24000, channels)
        np.testing.assert_array_equal(np.concatenate(blocks, axis=1), whole)
        assert max(b.shape[1] for b in blocks) <= 24000 * seconds + 1000


def test_blocks_of_damaged_files(tmp_path, rng):
    path = tmp_path / "a.wav"
    files.write(path, 0.1 * rng.standard_normal((1, 48000)), 24000)
    path.write_bytes(path.read_bytes()[:50000])
    with pytest.raises(ValueError, match="truncated"):
        list(files.read_blocks(path, 24000, 1, 0.5))
    files.write(path, np.zeros((1, 0)), 24000)
    with pytest.raises(ValueError, match="empty audio"):
        list(files.read_blocks(path, 24000, 1, 0.5))


def test_written_in_blocks(tmp_path, rng):
    wav = rng.uniform(-1, 1, (1, 5000)).astype(np.float32)
    files.write(tmp_path / "a.flac", wav, 24000)
    files.write_blocks(
        tmp_path / "b.flac", (wav[:, i : i + 999] for i in range(0, 5000, 999)), 24000, 1
    )
    a, b = (files.read(tmp_path / f"{name}.flac", 24000, 1) for name in "ab")
    np.testing.assert_array_equal(a, b)

    def broken(error):
        yield wav
        raise error("no more")

    for error in (ValueError, RuntimeError):  # as it is: it was no failure to write
        with pytest.raises(error, match="^no more"):
            files.write_blocks(tmp_path / "c.flac", broken(error), 24000, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.flac", "b.flac"]
