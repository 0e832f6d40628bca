"""Which files of a folder are taken, and that the rest is said once, in one line."""

import pytest
import soundfile
from audio_helpers import RATE, encoded, sound

from moss_tok import storage
from moss_tok.audio import files, folders, kinds, manifest, notes
from moss_tok.data import prepare, sources

NAMES = (
    "a.wav", "sub/b.FLAC", "c.aiff", "d.oga", "e.w64", "f.caf", "g.au", "h.rf64", "i.aif",
    "._a.wav", ".hidden/x.wav", "sub/.DS_Store", "k.m4a", "l.txt", "m.txt", "notes",
    "manifest.jsonl",
)  # fmt: skip
READABLE = ["a.wav", "c.aiff", "d.oga", "e.w64", "f.caf", "g.au", "h.rf64", "i.aif", "sub/b.FLAC"]


@pytest.fixture
def folder(tmp_path):
    notes.forget()
    for name in NAMES:
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return tmp_path / "in"


@pytest.mark.parametrize("has_ffmpeg", [True, False])
def test_what_is_left_out_is_said_once(monkeypatch, capsys, folder, has_ffmpeg):
    monkeypatch.setattr(kinds, "has_ffmpeg", lambda: has_ffmpeg)
    for _ in range(2):
        items = manifest.find_items(folder)
    names = [str(item.path.relative_to(folder)) for item in items]
    assert sorted(names) == sorted(READABLE + ["k.m4a"] * has_ffmpeg)
    needed = "1 files that need PyAV (pip install 'moss_tok[ffmpeg]'), "
    rest = "3 hidden, 2 .txt, 1 without a suffix"
    said = f"note: {folder}: left out {'' if has_ffmpeg else needed}{rest}\n"
    assert capsys.readouterr().err == said


def test_every_suffix_that_can_be_read_is_taken(tmp_path):
    """Each of libsndfile's, of a file of that kind."""
    kinds_of = {"aif": "AIFF", "aifc": "AIFF", "snd": "AU", "bwf": "WAV", "oga": "OGG",
                "sph": "NIST", "wave": "WAV", "opus": "OGG", "mp2": "MP3",
                "mpga": "MP3"}  # fmt: skip
    for suffix in files.SUFFIXES:
        kind = kinds_of.get(suffix[1:], suffix[1:].upper())
        (tmp_path / f"a{suffix}").write_bytes(encoded(sound(0.5), RATE, kind))
    items = manifest.find_items(tmp_path)
    assert len(items) == len(files.SUFFIXES)
    for item in items:
        assert item.duration_seconds == 0.5, item.path


def test_an_empty_folder_says_what_was_there(folder):
    for name in READABLE + ["k.m4a"]:
        (folder / name).unlink()
    message = r"in: no audio files \(.wav, .*\); left out: 3 hidden, 2 .txt"
    with pytest.raises(ValueError, match=message):
        manifest.find_items(folder)
    with pytest.raises(ValueError, match=r"in: no files \(.npz\); left out: 3 hidden, 2 .txt"):
        folders.select(folder, storage.files_under(folder), (".npz",))


def test_a_pattern_names_what_it_finds(tmp_path, capsys):
    """Hidden folders above the files are the user's choice."""
    root = tmp_path / ".cache"
    root.mkdir()
    for name in ("a.wav", "b.wav", "c.txt"):
        soundfile.write(root / name, sound(), RATE, format="WAV")
    (root / "folder").mkdir()
    _, items = sources.locate(f"{root}/*")
    assert [item.path.name for item in items] == ["a.wav", "b.wav"]
    assert capsys.readouterr().err == f"note: {root}/*: left out 1 .txt\n"


def test_prepare_passes_notes_of_its_workers_on(tmp_path, capfd):
    """A manifest with lengths: only the workers open the files."""
    notes.forget()
    data = encoded(sound(), RATE, "WAV", "PCM_16")
    at = data.index(b"data") + 4
    (tmp_path / "a.wav").write_bytes(data[:at] + bytes(4) + data[at + 4 :])
    listing = tmp_path / "m.jsonl"
    listing.write_text('{"path": "a.wav", "duration_s": 1.0, "split": "train"}\n')
    plan = prepare.make_plan(listing, tmp_path / "out", prepare.Settings())
    prepare.run_local(plan, 2)
    assert prepare.finish(plan)["records"] == 1
    assert capfd.readouterr().err.count("a.wav: its header announces no audio") == 1
