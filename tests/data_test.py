"""Batches as functions of their number, sources and mixtures, bad files, levels."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import soundfile
from audio_helpers import muxed
from helpers import RATE, make_clips

from moss_tok.audio import files, manifest, mpeg, notes
from moss_tok.data import pipeline, sources, synthetic
from moss_tok.data.config import AudioDataConfig
from moss_tok.data.pipeline import SegmentShape
from moss_tok.settings import build

SECONDS = 0.256
FLAGS = {"batch_size": 3}
SHAPE = SegmentShape(2048, RATE, 1)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder with manifest: six clips, one shorter than a segment, two for testing."""
    return make_clips(tmp_path_factory.mktemp("clips"))


def batches(source, flags=FLAGS, shape=SHAPE, **options):
    mixture = sources.training_mixture(str(source), SECONDS)
    return pipeline.batches(build(AudioDataConfig, flags), mixture, shape, **options)


def equal(a, b):
    return all(np.array_equal(a[k], b[k]) for k in a)


def test_a_batch_is_a_function_of_its_number(clips):
    stream = batches(clips / "manifest.jsonl")
    seen = [next(stream) for _ in range(12)]
    for start in (0, 1, 7, 11):
        assert equal(seen[start], next(batches(clips / "manifest.jsonl", start=start)))
    other = next(batches(clips / "manifest.jsonl", seed=1))
    assert not np.array_equal(other["wav"], seen[0]["wav"])
    lengths = np.concatenate([b["length"] for b in seen])
    assert set(lengths) == {800, 2048}
    short = next(b["wav"][i] for b in seen for i in range(3) if b["length"][i] == 800)
    np.testing.assert_array_equal(short[:, 800:], 0)
    assert {manifest.DOMAINS[d] for b in seen for d in b["domain"]} == {"music"}


def test_batches_of_one(clips):
    batch = next(batches(clips, {"batch_size": 1}))
    assert batch["wav"].shape == (1, 1, 2048)
    assert equal(batch, {k: v[:1] for k, v in next(batches(clips)).items()})


def test_processes_share_a_batch(clips):
    config = FLAGS | dict(batch_size=5)
    whole = batches(clips, config)
    parts = [batches(clips, config, rows=rows) for rows in (range(2), range(2, 4), range(4, 5))]
    for _ in range(3):
        expected, found = next(whole), [next(p) for p in parts]
        assert equal(expected, {k: np.concatenate([f[k] for f in found]) for k in expected})
    on = batches(clips, config, rows=range(2, 4), start=3)
    assert equal(next(on), {k: x[2:4] for k, x in next(whole).items()})


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(clips, num_workers):
    expected = batches(clips)
    found = batches(clips, FLAGS | dict(num_workers=num_workers))
    for _ in range(5):
        assert equal(next(expected), next(found))
    found.close()


def test_workers_print_a_note_once(tmp_path, capfd):
    """A manifest with lengths: only the workers open the files."""
    notes.forget()
    soundfile.write(tmp_path / "a.wav", np.full(RATE, 0.1), RATE)
    data = (tmp_path / "a.wav").read_bytes()
    at = data.index(b"data") + 4
    (tmp_path / "a.wav").write_bytes(data[:at] + bytes(4) + data[at + 4 :])
    listing = tmp_path / "m.jsonl"
    listing.write_text('{"path": "a.wav", "duration_s": 1.0, "split": "train"}\n' * 4)
    stream = batches(listing, FLAGS | dict(num_workers=2))
    assert all(next(stream)["wav"].any() for _ in range(4))
    stream.close()
    assert capfd.readouterr().err.count("a.wav: its header announces no audio") == 1


def lossy_clips(folder, rate):
    """Files of lossy codecs with a sound that repeats nowhere."""
    rng = np.random.default_rng(0)
    wav = 0.1 * rng.standard_normal(8 * rate) * np.linspace(0.2, 1, 8 * rate)
    soundfile.write(folder / "a.mp3", wav, rate, bitrate_mode="VARIABLE", compression_level=0.5)
    soundfile.write(folder / "b.ogg", wav, rate, format="OGG", subtype="VORBIS")
    soundfile.write(folder / "c.opus", wav, rate, format="OGG", subtype="OPUS")
    (folder / "d.mp3").write_bytes((folder / "a.mp3").read_bytes() * 2)
    form = mpeg.parse_header((folder / "a.mp3").read_bytes()[:4])
    data = (folder / "a.mp3").read_bytes()
    (folder / "e.mp3").write_bytes(data[form.sizes()[data[1:3]] :])  # without its Xing header
    if importlib.util.find_spec("av"):
        samples = wav.astype(np.float32)
        (folder / "f.m4a").write_bytes(muxed(samples[:, None], rate, "aac", "ipod"))
        (folder / "g.webm").write_bytes(muxed(samples[:, None], rate, "libopus", "webm"))


def test_segments_of_lossy_files_are_parts_of_the_whole(tmp_path):
    rate = 48000
    lossy_clips(tmp_path, rate)
    for path in sorted(tmp_path.glob("*")):
        whole = files.read(path, rate, 1)[0]
        stream = batches(path.with_suffix(".*"), shape=SegmentShape(12288, rate, 1))
        for segment in next(stream)["wav"][:, 0]:
            start = np.argmax(scipy.signal.correlate(whole, segment, "valid"))
            expected = whole[start : start + segment.size]
            np.testing.assert_allclose(segment, expected, atol=1e-6, rtol=0, err_msg=path.name)


def test_longer_files_are_drawn_more_often(clips):
    items = manifest.find_items(clips / "manifest.jsonl")[:4]
    source = sources.FileSource(items, SECONDS)
    names = [source.name(i) for i in range(len(source))]
    assert [names.count(str(item.path)) for item in items] == [3, 2, 1, 7]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", [("a", None)]),
        ("a.jsonl:0.6,b/*.array_record:0.4", [("a.jsonl", 0.6), ("b/*.array_record", 0.4)]),
        ("gs://bucket/x,gs://bucket/y", [("gs://bucket/x", None), ("gs://bucket/y", None)]),
        ("gs://bucket/x:2, C:/y:1e-1", [("gs://bucket/x", 2.0), ("C:/y", 0.1)]),
    ],
)
def test_sources_and_weights(text, expected):
    assert sources.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,,b", "empty source in 'a,,b'"),
        (":0.5", "empty source"),
        ("a:0", "a:0: the weight must be positive, got 0"),
        ("a:nan", "must be positive, got nan"),
        ("a:1,b", "give all sources a weight or none"),
    ],
)
def test_bad_sources_and_weights(text, message):
    with pytest.raises(ValueError, match=message):
        sources.parse(text)


def test_a_mixture_follows_its_weights(clips, tmp_path):
    other = make_clips(tmp_path, [1.0] * 4)
    text = (other / "manifest.jsonl").read_text().replace("music", "sound")
    (other / "manifest.jsonl").write_text(text)
    both = f"{clips}/manifest.jsonl:1,{other}/manifest.jsonl:3"
    stream = batches(both, FLAGS | dict(batch_size=40))
    domains = next(stream)["domain"]
    assert (domains == manifest.DOMAINS.index("sound")).sum() == 30
    by_size = sources.training_mixture(both.replace(":1", "").replace(":3", ""), SECONDS)
    assert by_size.weights == (13.0, 12.0)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gone", "gone: no such folder or manifest"),
        ("gone*.array_record", "no such files"),
        ("gone.array_record", "gone.array_record: no such file"),
        ("bad.array_record", "no ArrayRecord files"),
        ("tests.jsonl", "no files of the split 'train'"),
        ("song.mp3", "song.mp3: is a recording; must be a manifest, with a JSON object per line"),
    ],
)
def test_sources_that_are_not_there(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    Path("bad.array_record").write_bytes(b"nothing" * 1000)
    Path("song.mp3").touch()
    Path("tests.jsonl").write_text('{"path": "a.wav", "split": "test", "duration_s": 1}\n')
    with pytest.raises(ValueError, match=message):
        sources.training_mixture(source, SECONDS)


# ----------------------------------------------------------------------- bad files, silence, levels


def test_bad_files_are_replaced(clips, tmp_path):
    """A corrupt, an empty and a missing file among good ones: each replaced by the same draws."""
    make_clips(tmp_path)
    (tmp_path / "0.flac").write_bytes(b"fLaC" + b"\0" * 500)
    (tmp_path / "1.flac").write_bytes(b"")
    (tmp_path / "2.flac").unlink()
    config = FLAGS | dict(batch_size=16)
    stream = batches(tmp_path / "manifest.jsonl", config)
    seen = [next(stream) for _ in range(4)]
    assert all((b["length"] == 2048).all() and np.abs(b["wav"]).max() > 0.1 for b in seen)
    mixture = sources.training_mixture(str(tmp_path / "manifest.jsonl"), SECONDS)
    failed = np.concatenate([b["failed"].reshape(-1, 2) for b in seen])
    names = {mixture.sources[n].name(i) for n, i in failed if n >= 0}
    assert {Path(n).name for n in names} == {"0.flac", "1.flac", "2.flac"}
    assert equal(seen[2], next(batches(tmp_path / "manifest.jsonl", config, start=2)))


def test_nothing_readable_gives_padding(tmp_path):
    make_clips(tmp_path)
    for path in tmp_path.glob("*.flac"):
        path.write_bytes(b"")
    batch = next(batches(tmp_path / "manifest.jsonl"))
    assert (batch["length"] == 0).all() and (batch["wav"] == 0).all()
    assert (batch["failed"] >= 0).all()


def test_silence_is_drawn_again(tmp_path):
    make_clips(tmp_path, [1.0] * 4)
    for name in ("0.flac", "1.flac"):
        soundfile.write(tmp_path / name, np.zeros(RATE), RATE)
    source, config = tmp_path / "manifest.jsonl", FLAGS | dict(batch_size=32)
    assert (np.abs(next(batches(source, config))["wav"]).max((1, 2)) > 0).all()
    off = config | dict(silence_db=-1e6)
    assert (np.abs(next(batches(source, off))["wav"]).max((1, 2)) == 0).any()


@pytest.mark.parametrize(
    ("changes", "low", "high"),
    [
        ({}, -21, -19),
        ({"augment_gain_db": 6.0}, -27, -13),
        ({"augment_loudness_db": "-40:-30"}, -40.1, -29.9),
        ({"augment_equalizer_db": 12.0}, -28, -12),
        ({"augment_noise_db": "0:20"}, -21, -16),
    ],
)
def test_levels(clips, changes, low, high):
    config = FLAGS | {"batch_size": 32} | changes
    batch = next(batches(clips, config))
    whole = batch["length"] == 2048
    levels = [files.level_db(w) for w in batch["wav"][whole]]
    assert low < min(levels) and max(levels) < high
    assert np.abs(batch["wav"]).max() <= 1
    assert np.ptp(levels) > 0.5 * (high - low) or not changes


@pytest.mark.parametrize("ratio_db", [-10, 0, 20])
def test_noise_is_as_loud_as_asked_for(rng, ratio_db):
    wav = rng.standard_normal((2, 999)).astype(np.float32)
    noise = pipeline._add_noise(wav, ratio_db, rng) - wav
    assert files.level_db(wav) - files.level_db(noise) == pytest.approx(ratio_db, abs=0.01)


def test_the_equalizer_stays_within_its_gains(rng):
    """Also at the edges of the spectrum, and of clips of a sample or two."""
    for size in (1, 2, 2048):
        wav = rng.standard_normal((1, size)).astype(np.float32)
        found = pipeline._equalize(wav, RATE, 6.0, rng)
        change = np.abs(np.fft.rfft(found)) / np.abs(np.fft.rfft(wav))
        assert found.dtype == np.float32 and found.shape == wav.shape
        assert 0.5 < change.min() and change.max() < 2 and (size == 1 or np.ptp(change) > 0.1)


# --------------------------------------------------------------------------------------- synthetic


def test_synthetic_sounds(tmp_path):
    path = synthetic.write_dataset(tmp_path / "a", RATE, num_clips=40)
    items = manifest.find_items(path)
    assert {i.split for i in items} == {"train", "test"}
    assert {i.domain for i in items} == {"speech", "music", "sound"}
    for item in items:
        wav = soundfile.read(item.path)[0]
        assert np.isfinite(wav).all() and 0.05 < np.abs(wav).max() <= 0.61
    before = path.stat().st_mtime_ns
    assert synthetic.write_dataset(tmp_path / "a", RATE).stat().st_mtime_ns == before
    again = synthetic.write_dataset(tmp_path / "b", RATE, num_clips=40)
    names = [i.path.name for i in items]
    assert all((tmp_path / "a" / n).read_bytes() == (again.parent / n).read_bytes() for n in names)
