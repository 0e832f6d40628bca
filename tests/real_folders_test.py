"""Manifests, names and links as people have them: read, or refused by name."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import RATE, prepare_folder, write_wav

from moss_tok import storage
from moss_tok.audio import files, manifest
from moss_tok.cli import arguments
from moss_tok.data import records, sources, tokenize
from moss_tok.evaluation import datasets, pages


def write_names(folder, names):
    """Recordings of these names, which may be bytes that libsndfile does not take."""
    write_wav(folder / "made.wav")
    for name in names:
        target = folder / os.fsdecode(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "made.wav", target)
    (folder / "made.wav").unlink()


# --------------------------------------------------------------------------------------- manifests

LINES = ['{"path": "a/one.wav"}', '{"path": "b/one.wav"}', '{"path": "ABSOLUTE"}']
TEXT = "".join(line + "\n" for line in LINES)


@pytest.mark.parametrize(
    ("data", "is_a_data_set"),
    [
        (TEXT.encode(), True),
        (TEXT.rstrip().encode(), True),
        (TEXT.encode("utf-8-sig"), True),
        (TEXT.replace("\n", "\r\n").encode(), True),
        (TEXT.replace("\n", "\r\n").encode("utf-8-sig"), True),
        (TEXT.replace("\n", "\r").encode(), True),
        ((TEXT + "\n\n").encode(), False),
        ((TEXT + "  \r\n\t\n").encode(), False),
        (TEXT.replace("\n", "\n\n").encode(), False),
    ],
)
def test_manifests_of_any_editor(recordings, data, is_a_data_set):
    """Blank lines are an error in the data sets of the evaluation protocol only."""
    path = recordings / "m.jsonl"
    path.write_bytes(data.replace(b"ABSOLUTE", os.fsencode(recordings / "c.wav")))
    items = manifest.find_items(path)
    names = [str(item.path.relative_to(recordings)) for item in items]
    assert names == ["a/one.wav", "b/one.wav", "c.wav"]
    assert {item.duration_seconds for item in items} == {0.3}
    assert len({key for key, _ in tokenize.find_items(str(path))}) == 3
    if is_a_data_set:
        output_names = datasets.read_dataset(path).output_names()
        assert output_names == ["000000_one.flac", "000001_one.flac", "000002_c.flac"]
    else:
        with pytest.raises(ValueError, match=r"m.jsonl:\d: a blank line"):
            datasets.read_dataset(path)


NO_OBJECT = 'must be a JSON object like {"path": "a.wav"}, got '


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("m.csv", b"path,split\na.wav,train\n", f"{NO_OBJECT}'path,split'"),
        ("m.jsonl", b"path\tsplit\r\na.wav\ttrain\r\n", f"{NO_OBJECT}'path\\tsplit'"),
        ("m.txt", b"a.wav\nb.wav\n", f"{NO_OBJECT}'a.wav'"),
        ("m.json", b'[\n  {"path": "a.wav"}\n]\n', f"{NO_OBJECT}'['"),
        ("m.json", b'[{"path": "a.wav"}]', f'{NO_OBJECT}\'[{{"path": "a.wav"}}]\''),
        ("m.jsonl", b"x" * 1000, f"{NO_OBJECT}'{'x' * 60}...'"),
        ("m.jsonl", b'{"path": ' + b"1" * 5000 + b"}", NO_OBJECT),
        ("m.jsonl", TEXT.encode("utf-16"), "must be UTF-8 text"),
        ("m.jsonl", b'{"path": "\xe9.wav"}', "must be UTF-8 text"),
        ("m.wav", b"RIFF\xff\xff\xff\xff", "m.wav: is a recording"),
        ("m.jsonl", b"", "no lines"),
        ("m.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "got 'version https://git-l"),
    ],
)
def test_what_is_no_manifest(tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    for read in (manifest.find_items, datasets.read_dataset, sources.locate):
        with pytest.raises(ValueError, match=name) as error:
            read(path if read is not sources.locate else str(path))
        assert message in str(error.value)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_manifests_that_name_no_file(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"path": "\\ud800.wav"}\n')
    with pytest.raises(ValueError, match="m.jsonl:1: path must be a file's name, got"):
        manifest.find_items(tmp_path / "m.jsonl")
    with pytest.raises(ValueError, match="m.jsonl:1: no such file"):
        datasets.read_dataset(tmp_path / "m.jsonl")


# ------------------------------------------------------------------------------------------- names

NAMES = [
    b"new\nline.wav",
    "\U0001f600 \u202ex.wav".encode(),
    b"-dash.wav",
    b"~tilde.wav",
    b"*[star]?.wav",
    b"%s{}.wav",
    b"a,b:1.wav",
    251 * b"x" + b".wav",
    125 * "é".encode() + b".wav",
    b"sub/same.wav",
    b"other/same.wav",
]
NOT_UTF8 = b"\xff\xfe.wav"


@pytest.fixture
def named(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    write_names(folder, [*NAMES, NOT_UTF8])
    rows = [{"path": os.fsdecode(name)} for name in NAMES]
    (tmp_path / "names.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_names_in_shards_for_training(named, tmp_path):
    rows, rejected = prepare_folder(named, tmp_path / "out")
    assert len(rows) + len(rejected) == len(NAMES) + 1
    stems = {Path(os.fsdecode(name)).stem for name in NAMES}
    assert stems <= {row["id"] for row in rows} <= stems | {"\\xff\\xfe"}
    items = tokenize.find_items(str(tmp_path / "out"))
    assert len({key for key, _ in items}) == len(rows)


def test_names_of_recordings_to_tokenize(named):
    for key, item in tokenize.find_items(str(named)):
        records.check_metadata(key, item.metadata)
        assert key == os.fsencode(item.path.relative_to(named)).decode(errors="backslashreplace")


def test_names_that_training_draws_from(named):
    mixture = sources.training_mixture(str(named), 0.1)
    for index in range(len(mixture)):
        source = mixture.sources[0]
        if NOT_UTF8 not in os.fsencode(source.name(index)):
            assert files.read_segment(source[index].audio, 0.0, 0.1, RATE).shape == (1, 800)


def test_names_of_an_evaluation(named, tmp_path):
    source = named / "names.jsonl"
    shutil.copy(tmp_path / "names.jsonl", source)
    names = datasets.read_dataset(source).output_names()
    assert len(set(names)) == len(NAMES)
    for name in names:
        assert len(name) <= 255 and len(Path(name).with_suffix(".npz").name) <= 255
        picture = pages._shortened(f"{'system' * 9}_names_{Path(name).stem}")
        assert len(f"{picture}.png".encode()) <= 255
    short = [f"reference_names_{Path(name).stem}" for name in names if len(name) < 100]
    assert [pages._shortened(name) for name in short] == short
    odd = tmp_path / os.fsdecode(b"\xff.jsonl")
    shutil.copy(source, odd)
    with pytest.raises(ValueError, match="the name of a data set must be UTF-8"):
        datasets.read_dataset(odd)


def copy(path, target):
    shutil.copy(path, target)
    return str(target)


def test_names_of_a_folder_to_encode(named, tmp_path, capsys):
    assert arguments.each_file(str(named), str(tmp_path / "out"), (".wav", ".npz"), copy) == 0
    found = {p.relative_to(tmp_path / "out") for p in storage.files_under(tmp_path / "out")}
    wanted = [Path(os.fsdecode(name)).with_suffix(".npz") for name in [*NAMES, NOT_UTF8]]
    assert found == set(wanted)


def test_any_name_can_be_printed(tmp_path):
    """In a locale of ASCII, too: what it has no letters for becomes an escape."""
    for name, shown in ((b"\xff", b"\\udcff"), ("é".encode(), b"\\xe9")):
        code = (
            "import os, sys; from moss_tok.cli import main; main._print_any_name(); "
            f"print(os.fsdecode({name!r}))"
        )
        environment = os.environ | {"PYTHONIOENCODING": "ascii"}
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
        assert out.stdout == shown + b"\n"


# ------------------------------------------------------------------------------------------- links


def test_links_in_circles(tmp_path, monkeypatch):
    write_wav(tmp_path / "in" / "real" / "a.wav")
    write_wav(tmp_path / "elsewhere" / "b.wav")
    links = {
        "in/real/up": "..",
        "in/self": ".",
        "in/away": "../elsewhere",
        "elsewhere/back": "../in",
        "in/alias": "real",
        "in/gone.wav": "nothing.wav",
        "in/x.wav": "y.wav",
        "in/y.wav": "x.wav",
    }
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)
    found = [str(p.relative_to(tmp_path / "in")) for p in storage.files_under(tmp_path / "in")]
    assert found == ["away/b.wav", "gone.wav", "real/a.wav", "x.wav", "y.wav"]
    monkeypatch.chdir(tmp_path)
    for pattern in ("in/**/?.wav", "**/?.wav", f"{tmp_path}/**/?.wav", "in/**", "*n/**/*.w?v"):
        names = [path.name for path in storage.find(pattern) if path.exists()]
        assert sorted(names) == ["a.wav", "b.wav"]
    assert [str(path) for path in storage.find("in/**/real/*")] == ["in/real/a.wav"]
    rows, rejected = prepare_folder(tmp_path / "in", tmp_path / "out")
    assert {row["id"] for row in rows} == {"a", "b"}
    assert {Path(row["rejected"]).name for row in rejected} == {"gone.wav", "x.wav", "y.wav"}


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """Not left out: root may read all, so the refusal is made."""
    (tmp_path / "closed").mkdir()
    (tmp_path / "lost+found").mkdir()
    scan = os.scandir

    def scandir(path):
        if os.path.basename(path) in ("closed", "lost+found"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="closed"):
        storage.files_under(tmp_path)
    (tmp_path / "closed").rmdir()
    assert storage.files_under(tmp_path) == []
