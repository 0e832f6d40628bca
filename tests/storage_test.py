"""Buckets, against an emulator of Google Cloud Storage: data, runs, checkpoints."""

import importlib.util
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from helpers import (
    PRETRAIN,
    free_port,
    leaves_equal,
    make_clips,
    rows_without_timing,
    small_run,
    start,
    train,
    wait_for,
)

import moss_tok
from moss_tok import storage
from moss_tok.audio import files, manifest
from moss_tok.cli import main as cli
from moss_tok.data import records, sources

needs_emulator = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gcsfs", "gcp_storage_emulator")),
    reason="needs gcsfs and gcp-storage-emulator",
)


# TensorStore wants to know the generation of what it downloads, and the emulator does not say.
EMULATOR = """
import sys
from gcp_storage_emulator.handlers import objects

def download(request, response, storage, *args, _download=objects.download, **kwargs):
    found = storage.objects.get(request.params["bucket_name"], {})
    found = found.get(request.params["object_id"], {})
    response["x-goog-generation"] = found.get("generation", "0")
    return _download(request, response, storage, *args, **kwargs)

objects.download = download
from gcp_storage_emulator.server import create_server
create_server("127.0.0.1", int(sys.argv[1]), True, "moss").run()
"""


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """Its address; the variables that lead there are set."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    emulator = subprocess.Popen(
        [sys.executable, "-c", EMULATOR, str(port)],
        cwd=tmp_path_factory.mktemp("emulator"),
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    variables = {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "MOSS_TOK_CACHE": str(tmp_path_factory.mktemp("cache")),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        wait_for(lambda: not storage._unreachable.__wrapped__("moss"), emulator)
        yield "gs://moss"
    os.killpg(emulator.pid, signal.SIGKILL)
    emulator.wait()


def upload(folder, address):
    for path in storage.files_under(folder):
        (storage.to_path(address) / path.relative_to(folder)).write_bytes(path.read_bytes())


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return make_clips(tmp_path_factory.mktemp("clips"), [1.0, 0.7, 0.1, 2.0, 0.6, 1.2])


@needs_emulator
def test_a_run_in_a_bucket_is_the_run_on_disk(bucket, clips, tmp_path, capsys):
    """Killed while it saves and started again, with data and workdir in the bucket."""
    local = small_run(PRETRAIN, clips, tmp_path, num_steps=6, num_eval_clips=2, checkpoint_every=2)
    assert train(local)
    upload(clips, f"{bucket}/clips")
    remote = local | dict(train_data=f"{bucket}/clips/manifest.jsonl", workdir=f"{bucket}/run")
    process = start(remote)
    assert any("step 5/6" in line for line in process.stdout)  # 2 is saved, 4 is being saved
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    capsys.readouterr()
    assert train(remote, draws_curves=True)
    assert "resuming from step 2" in capsys.readouterr().out
    workdir = storage.to_path(remote["workdir"])
    mirror = storage.Mirror(workdir)
    mirror.fetch("metrics.jsonl", "evaluation.md", "curves.png")
    assert len(storage.files_under(mirror.local)) == 3
    assert rows_without_timing(mirror.local) == rows_without_timing(local["workdir"])
    found, expected = (moss_tok.load(c["workdir"]) for c in (remote, local))
    assert leaves_equal(found.params, expected.params)
    assert [p for p in (workdir / "samples").iterdir() if p.suffix == ".wav"]
    with pytest.raises(ValueError, match="holds another run"):
        train(remote | dict(learning_rate=1.0))


@needs_emulator
def test_audio_in_a_bucket(bucket, clips):
    upload(clips, f"{bucket}/audio")
    for item in manifest.find_items(clips):
        remote = f"{bucket}/audio/{item.path.name}"
        assert files.duration_seconds(remote) == files.duration_seconds(item.path)
        np.testing.assert_array_equal(*(files.read_native(x)[0] for x in (remote, item.path)))
        parts = (files.read_segment(x, 0.05, 0.2, 8000) for x in (remote, item.path))
        np.testing.assert_array_equal(*parts)
    assert len(sources.training_mixture(f"{bucket}/audio/**/*.flac", 1.0)) > 1
    storage.to_path(f"{bucket}/bad.flac").write_bytes(b"nothing" * 9)
    for name, message in (("gone.flac", "no such file"), ("bad.flac", "not audio")):
        with pytest.raises(ValueError, match=f"^{bucket}/{name}: {message}"):
            files.read_segment(f"{bucket}/{name}", 0.0, 1.0, 8000)


@needs_emulator
def test_shards_in_a_bucket(bucket, clips, tmp_path, monkeypatch):
    assert cli.main(["prepare", str(clips), str(tmp_path / "shards")]) == 0
    upload(tmp_path / "shards", f"{bucket}/shards")
    config = small_run(PRETRAIN, clips, tmp_path, num_steps=2, num_eval_clips=0)
    local = config | dict(train_data=str(tmp_path / "shards"))
    train(local)
    remote = config | dict(
        train_data=f"{bucket}/shards/*.array_record", workdir=str(tmp_path / "remote")
    )
    train(remote)
    assert rows_without_timing(remote["workdir"]) == rows_without_timing(local["workdir"])
    cache = pathlib.Path(os.environ["MOSS_TOK_CACHE"])
    copies = [p for p in storage.files_under(cache) if p.suffix == records.SUFFIX]
    shards = [p for p in storage.files_under(tmp_path / "shards") if p.suffix == records.SUFFIX]
    assert copies and [p.read_bytes() for p in copies] == [p.read_bytes() for p in shards]
    assert storage.files_under(cache) == copies  # nothing half-written
    used = shutil.disk_usage(cache)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: used)
    remote = storage.find(f"{bucket}/shards/*.array_record")
    assert len(records.Shards(remote))  # nothing is missing
    copies[0].unlink()
    with pytest.raises(ValueError, match=r"have to be copied to .*MOSS_TOK_CACHE"):
        records.Shards(remote)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("s3://bucket/data", "must be a path, or an address that starts with gs://"),
        ("gs:/bucket/data", "must be a path, or an address that starts with gs://"),
        pytest.param("gs://gone/data", "bucket 'gone' does not exist", marks=needs_emulator),
    ],
)
def test_addresses_that_lead_nowhere(name, message, request):
    if name.startswith("gs://"):
        request.getfixturevalue("bucket")
    with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
        storage.to_path(name)


def test_without_gcsfs(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs gcsfs, pip install 'moss_tok\[gcs\]'"):
        storage.to_path("gs://some-bucket/data")
