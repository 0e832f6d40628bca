"""`moss-tok prepare`: shards, resume, rejected files, refusals."""

import dataclasses
import io
import json
import os
import subprocess
import sys
from concurrent.futures import BrokenExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers import RATE, ROOT, make_clips

from moss_tok.audio import manifest
from moss_tok.cli import main as cli
from moss_tok.data import pipeline, prepare, records, sources
from moss_tok.data.config import AudioDataConfig
from moss_tok.data.pipeline import SegmentShape

SHAPE = SegmentShape(2048, RATE, 1)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder with manifest: six clips, one shorter than a segment, two for testing."""
    return make_clips(tmp_path_factory.mktemp("clips"))


HERE = ("--num-workers", 1)  # no other process


def run_prepare(*argv):
    return cli.main(["prepare", *map(str, argv)])


def manifest_rows(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def test_prepare_writes_what_training_reads(clips, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_prepare(clips / "manifest.jsonl", out, "--num-shards", 2, "--num-workers", 2) == 0
    printed = capsys.readouterr().out
    assert "6 records in 4 shards" in printed and "music" in printed and "0.00 h" in printed
    assert len(list(out.glob("train-*-of-00002.array_record"))) == 2
    rows = manifest_rows(out)
    assert {r["transcript"] for r in rows} == {f"T{i}" for i in range(6)}
    for row in rows:
        audio, metadata = records.shard(out / row["path"]).read(row["record"])
        assert metadata["id"] == row["id"] == row["transcript"][1]
        assert audio.data == (clips / f"{row['id']}.flac").read_bytes()
    for source in (out, out / "manifest.jsonl", out / "*.array_record", f"{out}:1"):
        mixture = sources.training_mixture(str(source), SHAPE.num_samples / RATE)
        batch = next(pipeline.batches(AudioDataConfig(batch_size=3), mixture, SHAPE))
        assert batch["wav"].shape == (3, 1, 2048) and (batch["failed"] == -1).all()
        assert set(batch["domain"]) == {manifest.DOMAINS.index("music")}
        items = sources.evaluation_items(str(source), 5)
        assert len(items) == 2 and sources.open_item(items[0]).domain == "speech"


def test_prepare_goes_on_where_it_stopped(clips, tmp_path, monkeypatch):
    settings = prepare.Settings(num_shards=2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    plans = [prepare.make_plan(clips / "manifest.jsonl", path, settings) for path in (whole, parts)]
    shards = plans[0].shards
    assert len(shards) == 4 and plans[1].shards == shards
    for shard in shards:
        prepare.write_shard(plans[0], shard)
    prepare.write_shard(plans[1], shards[0])
    before = (parts / shards[0].name).stat().st_mtime_ns
    real, calls = prepare.prepare_file, []

    def broken(item, settings):
        calls.append(item)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(item, settings)

    monkeypatch.setattr(prepare, "prepare_file", broken)
    with pytest.raises(KeyboardInterrupt):
        for shard in shards:
            prepare.write_shard(plans[1], shard)
    monkeypatch.undo()
    assert not [p for p in parts.iterdir() if p.name.startswith(".incomplete")]
    abandoned = parts / f".incomplete-{shards[1].name}@elsewhere@1"  # by a killed process
    abandoned.touch()
    os.utime(abandoned, (0, 0))
    assert run_prepare(clips / "manifest.jsonl", parts, "--num-shards", 2, *HERE) == 0
    assert not abandoned.exists()
    assert (parts / shards[0].name).stat().st_mtime_ns == before
    prepare.finish(plans[0])
    for shard in shards:
        a, b = (records.Shards([folder / shard.name]) for folder in (whole, parts))
        assert [a.read(i) for i in range(len(a))] == [
            (dataclasses.replace(audio, name=a.name(i)), metadata)
            for i, (audio, metadata) in enumerate(b.read(i) for i in range(len(b)))
        ]
    assert manifest_rows(whole) == manifest_rows(parts)


def test_prepare_rejects_with_reasons(tmp_path, capsys):
    folder = make_clips(tmp_path, [1.0] * 6)
    (folder / "0.flac").write_bytes(b"not audio at all")
    soundfile.write(folder / "1.flac", np.zeros(RATE), RATE)
    soundfile.write(folder / "2.flac", np.full(100, 0.5), RATE)
    assert run_prepare(folder / "manifest.jsonl", tmp_path / "out", *HERE) == 0
    printed = capsys.readouterr().out
    for reason in ("not audio", "silent", "shorter than 0.1 s"):
        assert f"rejected: 1 files, {reason}" in printed
    lines = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    names = {Path(json.loads(line)["rejected"]).name for line in lines}
    assert names == {"0.flac", "1.flac", "2.flac"}
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["records"] == 3 and sum(summary["rejected"].values()) == 3


def test_prepare_keeps_metadata_that_looks_like_its_own(tmp_path):
    folder = make_clips(tmp_path, [1.0] * 3)
    rows = [{"path": f"{index}.flac"} for index in range(3)]
    rows[0]["rejected"] = "by the publisher"
    rows[1]["id"] = None
    rows[2]["id"] = 7
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run_prepare(folder / "manifest.jsonl", tmp_path / "out", *HERE) == 0
    written = manifest_rows(tmp_path / "out")
    assert sorted(row["id"] for row in written) == ["0", "1", "7"]
    assert [row["rejected"] for row in written if "rejected" in row] == ["by the publisher"]
    assert not (tmp_path / "out" / "rejected.jsonl").read_text()


def test_a_twentieth_of_the_recordings_without_a_split_is_held_out(tmp_path):
    rows = [{"path": f"{index}.flac", "split": "train", "duration_s": 1} for index in range(400)]
    rows += [{"path": f"new/{index}.flac", "duration_s": 1} for index in range(40)]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = manifest.find_items(tmp_path / "manifest.jsonl")
    held_out = [item.path.parent.name for item in items if item.split == "test"]
    assert held_out == ["new", "new"]


def test_prepare_cuts_and_resamples(tmp_path):
    wav = 0.1 * np.random.default_rng(0).standard_normal((2 * RATE, 2))
    soundfile.write(tmp_path / "a.wav", wav, RATE, subtype="PCM_24")
    settings = prepare.Settings(sample_rate=16000, max_seconds=0.9)
    item = manifest.AudioItem(tmp_path / "a.wav", "train", "sound", 2.0)
    found = prepare.prepare_file(item, settings)
    assert [r.metadata["id"] for r in found] == ["a_0000", "a_0001", "a_0002"]
    sizes = [records.unpack(records.pack(r.audio, r.metadata), "x")[0] for r in found]
    read = [soundfile.read(io.BytesIO(a.data)) for a in sizes]
    assert sum(len(x) for x, _ in read) == 32000 and {rate for _, rate in read} == {16000}
    spoken = dataclasses.replace(item, metadata={"transcript": "kept whole"})
    assert len(prepare.prepare_file(spoken, settings)) == 1


def test_shards_are_balanced():
    generator = np.random.default_rng(0)
    items = [
        manifest.AudioItem(Path(f"{i}.wav"), "train", "sound", float(s))
        for i, s in enumerate(generator.uniform(1, 20, 1000))
    ]
    shards = prepare.make_shards(items, prepare.Settings(shard_hours=0.5))
    hours = [sum(i.duration_seconds for i in s.items) / 3600 for s in shards]
    assert len(shards) == 6 and np.ptp(hours) < 0.01
    assert sum(len(s.items) for s in shards) == 1000


def test_prepare_as_a_beam_pipeline(clips, tmp_path, capsys):
    pytest.importorskip("apache_beam")
    argv = (clips / "manifest.jsonl", tmp_path / "beam", "--num-shards", 2)
    code = (
        f"from moss_tok.cli import main; raise SystemExit(main.main(['prepare', "
        f"{str(argv[0])!r}, {str(argv[1])!r}, '--num-shards', '2', '--runner', 'DirectRunner', "
        "'--beam-flags=--direct_num_workers=2']))"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT)
    assert run_prepare(argv[0], tmp_path / "local", *argv[2:], *HERE) == 0
    assert manifest_rows(tmp_path / "beam") == manifest_rows(tmp_path / "local")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["gone", "OUT"], "gone: no such folder or manifest"),
        (["IN", "FULL"], "exists and is not empty"),
        (["IN", "OUT", "--sample-rate", "5"], "sample_rate must be 1000..384000 Hz, got 5"),
        (["IN", "OUT", "--shard-hours", "0"], "shard_hours must be at least 1e-06, got 0"),
        (["IN", "OUT", "--min-seconds", "99"], "min_seconds must be 0..max_seconds 60"),
        (["IN", "OUT", "--num-workers", "0"], "num_workers must be at least 1, got 0"),
        (["IN", "OUT", "--beam-flags=--project=x"], "--beam-flags needs --runner"),
        (["IN", "OUT", "--max-second", "9"], "--max-second"),
    ],
)
def test_prepare_refuses_in_one_line(clips, tmp_path, capsys, argv, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("keep me")
    names = {"IN": clips, "OUT": tmp_path / "out", "FULL": tmp_path / "full"}
    try:
        code = run_prepare(*[names.get(a, a) for a in argv])
    except SystemExit as error:
        code = error.code
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and message in error
    assert not (tmp_path / "out").exists()


def test_prepare_of_other_files_is_refused(clips, tmp_path, capsys):
    assert run_prepare(clips / "manifest.jsonl", tmp_path / "out", *HERE) == 0
    assert run_prepare(clips / "manifest.jsonl", tmp_path / "out", "--num-shards", 3) == 2
    assert "holds a preparation of other files or settings" in capsys.readouterr().err


def test_broken_records_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"x\[3\]: no record of audio and metadata"):
        records.unpack(b"\xc1", "x[3]")
    with pytest.raises(ValueError, match="no record"):
        records.unpack(records.pack("text", {}), "x")


def test_a_damaged_shard_is_written_again(clips, tmp_path):
    out = tmp_path / "out"
    assert run_prepare(clips / "manifest.jsonl", out, *HERE) == 0
    shards = sorted(out.glob("*.array_record"))
    before = [shard.read_bytes() for shard in shards]
    for content in (b"", before[0][:-100]):
        shards[0].write_bytes(content)
        assert run_prepare(clips / "manifest.jsonl", out, *HERE) == 0
        assert sorted(out.glob("*.array_record")) == shards
        assert len(records.Shards(shards[:1])) > 0
        assert shards[0].stat().st_size == len(before[0])


def test_a_worker_that_was_killed_is_named(clips, tmp_path, monkeypatch):
    class Killed(prepare.ProcessPoolExecutor):
        def submit(self, function, *args):
            return super().submit(os._exit, 1)

    monkeypatch.setattr(prepare, "ProcessPoolExecutor", Killed)
    plan = prepare.make_plan(clips / "manifest.jsonl", tmp_path / "out", prepare.Settings())
    with pytest.raises(BrokenExecutor):
        prepare.run_local(plan, 2)
