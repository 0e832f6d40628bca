"""Data sets, names, disks and checkpoints as people have them: read, or refused by name."""

import contextlib
import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import soundfile
from helpers import GOLDEN, leaves_equal

import moss_tok
from moss_tok import storage, tensors
from moss_tok.audio import files, manifest
from moss_tok.cli import arguments
from moss_tok.cli.main import main
from moss_tok.codec import codes, pretrained
from moss_tok.data import pipeline, prepare, records, sources, tokenize
from moss_tok.data.config import AudioDataConfig
from moss_tok.evaluation import datasets, pages
from moss_tok.language import text

RATE = 8000
SETTINGS = prepare.Settings(num_shards=1)


def write_wav(path, seconds=0.3):
    path.parent.mkdir(parents=True, exist_ok=True)
    wav = 0.1 * np.random.default_rng(0).standard_normal(int(seconds * RATE))
    soundfile.write(os.fspath(path), wav, RATE)


def write_names(folder, names):
    """Recordings of these names, which may be bytes that libsndfile does not take."""
    write_wav(folder / "made.wav")
    for name in names:
        target = folder / os.fsdecode(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "made.wav", target)
    (folder / "made.wav").unlink()


def prepared(source, folder):
    """Prepares a data set in this process; its records and what was rejected."""
    plan = prepare.make_plan(source, folder, SETTINGS)
    for shard in plan.shards:
        prepare.write_shard(plan, shard)
    prepare.finish(plan)
    rows, rejected = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("manifest.jsonl", "rejected.jsonl")
    )
    return rows, rejected


# --------------------------------------------------------------------------------------- manifests

LINES = ['{"path": "a/one.wav"}', '{"path": "b/one.wav"}', '{"path": "ABSOLUTE"}']
TEXT = "".join(line + "\n" for line in LINES)


@pytest.fixture
def recordings(tmp_path):
    for name in ("a/one.wav", "b/one.wav", "c.wav"):
        write_wav(tmp_path / name)
    return tmp_path


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
        ("m.jsonl", TEXT.encode("utf-16"), "must be UTF-8 text, with a JSON object per line"),
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
    rows, rejected = prepared(named, tmp_path / "out")
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
    rows, rejected = prepared(tmp_path / "in", tmp_path / "out")
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


# ------------------------------------------------------------------- files that vanish, or change


def test_files_that_vanish_or_break_while_they_are_read(recordings, tmp_path, monkeypatch):
    for name in ("vanishing.flac", "broken.wav"):
        write_wav(recordings / name)
    plan = prepare.make_plan(recordings, tmp_path / "out", SETTINGS)
    (recordings / "vanishing.flac").unlink()
    read = files.read_native

    def read_native(audio):
        if Path(str(audio)).name == "broken.wav":
            raise OSError(errno.EIO, "Input/output error")
        return read(audio)

    monkeypatch.setattr(files, "read_native", read_native)
    for shard in plan.shards:
        prepare.write_shard(plan, shard)
    summary = prepare.finish(plan)
    assert summary["records"] == 3 and summary["rejected"] == {"cannot be read": 2}
    text = (tmp_path / "out" / "rejected.jsonl").read_text()
    assert "(No such file or directory)" in text and "(Input/output error)" in text


def test_what_is_checked_is_what_is_stored(tmp_path, monkeypatch):
    path = tmp_path / "a.flac"
    write_wav(path)
    before, read = path.read_bytes(), files.read_native

    def read_native(audio):
        found = read(audio)
        write_wav(path, 0.6)
        return found

    monkeypatch.setattr(files, "read_native", read_native)
    item = manifest.AudioItem(path, "train", "sound", 0.3)
    (record,) = prepare.prepare_file(item, SETTINGS)
    assert record.audio == before != path.read_bytes()
    assert record.metadata["duration_s"] == 0.3


def test_training_goes_on_where_a_file_breaks(recordings, monkeypatch):
    def read_segment(audio, *args):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(files, "read_segment", read_segment)
    mixture = sources.training_mixture(str(recordings), 0.1)
    shape = pipeline.SegmentShape(800, RATE, 1)
    stream = pipeline.batches(AudioDataConfig(batch_size=2), mixture, shape)
    assert (next(stream)["failed"][:, :, 0] == 0).all()


@pytest.mark.parametrize("metadata", [{"n": 2**70}, {"speaker": "\udcff"}, {"id": "\ud800"}])
def test_what_a_record_cannot_hold(recordings, tmp_path, metadata):
    row = {"path": "c.wav"} | metadata
    (recordings / "m.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="its metadata cannot be stored"):
        prepare.make_plan(recordings / "m.jsonl", tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------- disks


@contextlib.contextmanager
def largest_file(size_bytes):
    """No file can be larger: writing fails, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_without_room_for_a_checkpoint(micro, tmp_path, monkeypatch):
    used = shutil.disk_usage(tmp_path)._replace(free=9000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: used)
    with pytest.raises(ValueError, match=r"a checkpoint needs 0\.1 MB, 0\.0 MB are free"):
        pretrained.save(tmp_path / "out", micro.config, micro.params)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_while_shards_are_written(recordings, tmp_path):
    plan = prepare.make_plan(recordings, tmp_path / "out", SETTINGS)
    with largest_file(1000), pytest.raises(ValueError, match="record: could not be written .*File"):
        prepare.write_shard(plan, plan.shards[0])
    left = {p.name for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert left == {"prepare.json"}
    rows, _ = prepared(recordings, tmp_path / "out")
    assert len(rows) == 3


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg"])
def test_a_full_disk_while_audio_is_written(tmp_path, suffix, rng, capfd):
    """One line, and none of what libsndfile's callbacks print."""
    path = tmp_path / f"a{suffix}"
    wav = rng.uniform(-1, 1, (1, 40000)).astype(np.float32)
    with largest_file(1000), pytest.raises(OSError, match=re.escape(f"File too large: '{path}'")):
        files.write(path, wav, RATE)
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
    files.write(path, wav, RATE)
    assert soundfile.info(path).frames == 40000


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_folder_of_files_ends_where_there_is_no_room(recordings, tmp_path, number, capsys):
    """What is done stays, what could not be read is named; nothing is computed for nothing."""
    calls = []

    def function(path, target):
        calls.append(path)
        if len(calls) == 1:
            raise OSError(errno.EIO, "Input/output error")
        if len(calls) == 3:
            try:
                raise OSError(number, os.strerror(number))
            except OSError as error:
                raise ValueError("could not be written") from error
        return copy(path, target)

    write_wav(recordings / "d.wav")
    message = f"c.npz: {os.strerror(number)}; 1 of 4 files are done"
    with pytest.raises(ValueError, match=message):
        arguments.each_file(str(recordings), str(tmp_path / "out"), (".wav", ".npz"), function)
    assert len(calls) == 3
    assert "one.wav: [Errno 5] Input/output error" in capsys.readouterr().err
    assert [p.name for p in storage.files_under(tmp_path / "out")] == ["one.npz"]


def test_a_read_only_folder_is_noticed_first(recordings, tmp_path, monkeypatch, capsys):
    def refuse(dir):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    command = ["encode", str(recordings), str(tmp_path / "out")]
    assert main([*command, "--checkpoint", str(GOLDEN / "v1_tiny")]) == 2
    error = capsys.readouterr().err
    assert error == f"error: [Errno 30] Read-only file system: '{tmp_path}/out'\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="of Linux")
def test_printing_onto_a_full_disk():
    command = [sys.executable, "-m", "moss_tok", "info", "tiny"]
    with open("/dev/full", "w") as full:
        found = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert found.returncode == 2
    assert found.stderr == "error: [Errno 28] No space left on device\n"


# ------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def cached(tmp_path):
    """An official checkpoint as the cache of the Hugging Face Hub has it: links into blobs."""
    top = tmp_path / "models--openmoss--tiny"
    snapshot = top / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (top / "blobs").mkdir()
    (top / "refs").mkdir()
    (top / "refs" / "main").write_text("0123abc")
    for number, name in enumerate(("config.json", "model.safetensors")):
        shutil.copy(GOLDEN / "v1_tiny" / name, top / "blobs" / f"{number}")
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    return top


def test_the_cache_of_the_hub(cached, v1_tiny):
    for path in (cached, cached / "snapshots" / "0123abc"):
        assert leaves_equal(moss_tok.load(path).params, v1_tiny.params)
    (cached / "blobs" / "1").unlink()
    with pytest.raises(ValueError, match="model.safetensors: a link to a missing file"):
        moss_tok.load(cached)
    index = cached / "snapshots" / "0123abc" / tensors.INDEX_NAME
    index.write_text('{"weight_map": {"a": "model.safetensors"}}')
    with pytest.raises(ValueError, match="model.safetensors: a link to a missing file"):
        moss_tok.load(cached)
    (cached / "refs" / "main").write_text("another")
    with pytest.raises(ValueError, match="no config.json, so it is not a checkpoint"):
        moss_tok.load(cached)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 7\n"


def test_pointers_of_git_lfs(micro, cached, tmp_path):
    pretrained.save(tmp_path / "ours", micro.config, micro.params)
    largest = max((tmp_path / "ours" / "params").rglob("*"), key=lambda p: p.stat().st_size)
    paths = [cached / "blobs" / "1", largest]
    for name in ("a.npz", "tokenizer.json", "a.array_record"):
        paths.append(tmp_path / name)
    for path in paths:
        path.write_bytes(POINTER)
    for call, name in (
        (lambda: moss_tok.load(cached), "model.safetensors: "),
        (lambda: moss_tok.load(tmp_path / "ours"), "broken checkpoint: params/.*: "),
        (lambda: codes.read(tmp_path / "a.npz", micro), r"a.npz: not a .npz .*\("),
        (lambda: text.load(tmp_path), r"tokenizer.json: not a tokenizer.json \("),
        (lambda: records.shard(tmp_path / "a.array_record"), r"no ArrayRecord files \("),
    ):
        with pytest.raises(
            ValueError, match=f"{name}this is a git-lfs pointer: run `git lfs pull`"
        ):
            call()


def test_a_checkpoint_that_was_copied_halfway(micro, tmp_path, capfd):
    """Whichever file is missing or cut; one line, and nothing that Orbax prints."""
    whole = tmp_path / "whole"
    pretrained.save(whole, micro.config, micro.params)
    names = ["files.json", *json.loads((whole / "files.json").read_text())]
    for name in names:
        for size in (None, 0, 7):
            half = shutil.copytree(whole, tmp_path / "half")
            data = (half / name).read_bytes()
            (half / name).unlink()
            if size is not None:
                (half / name).write_bytes(data[:size])
            if size is None or len(data) != size:
                with pytest.raises(ValueError, match="broken|no config.json") as error:
                    moss_tok.load(half)
                assert "\n" not in str(error.value)
            shutil.rmtree(half)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_weights_of_other_precisions(tmp_path, v1_tiny, dtype):
    """As they are: what was rounded when they were written."""
    folder = shutil.copytree(GOLDEN / "v1_tiny", tmp_path / "official")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    kind = jnp.dtype(dtype)
    rounded = {name: x.astype(kind) for name, x in tensors.items()}
    safetensors.numpy.save_file(rounded, folder / "model.safetensors")
    fields = json.loads((folder / "config.json").read_text()) | {"dtype": dtype}
    (folder / "config.json").write_text(json.dumps(fields))
    found = moss_tok.load(folder)
    back = {name: x.astype(np.float32) for name, x in rounded.items()}
    safetensors.numpy.save_file(back, folder / "model.safetensors")
    assert leaves_equal(found.params, moss_tok.load(folder).params)
    wav = 0.1 * np.sin(np.arange(3840, dtype=np.float32))[None, None]
    assert moss_tok.encode(found, wav).codes.shape == moss_tok.encode(v1_tiny, wav).codes.shape
