"""Files that vanish while they are read, full disks, folders that cannot be written."""

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

import numpy as np
import pytest
import soundfile
from helpers import GOLDEN, RATE, prepare_folder, write_wav

from moss_tok import storage
from moss_tok.audio import files, manifest
from moss_tok.cli import arguments
from moss_tok.cli.main import main
from moss_tok.codec import pretrained
from moss_tok.data import pipeline, prepare, sources
from moss_tok.data.config import AudioDataConfig

SETTINGS = prepare.Settings(num_shards=1)


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
    rows, _ = prepare_folder(recordings, tmp_path / "out")
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
        return str(shutil.copy(path, target))

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
    assert error == f"error: {tmp_path}/out: Read-only file system\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="of Linux")
def test_printing_onto_a_full_disk():
    command = [sys.executable, "-m", "moss_tok", "info", "tiny"]
    with open("/dev/full", "w") as full:
        found = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert found.returncode == 2
    assert found.stderr == "error: No space left on device\n"
