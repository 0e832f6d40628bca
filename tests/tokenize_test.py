"""moss-tok tokenize: the codes of each recording alone, whatever its batch, whatever killed it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import grain
import jax
import numpy as np
import pytest
import soundfile
from array_record.python.array_record_module import ArrayRecordWriter
from helpers import GOLDEN, SHALLOW, finish, init_params, slurm_environments

import moss_tok
from moss_tok import sharding
from moss_tok.cli.main import main
from moss_tok.codec import inference, pretrained
from moss_tok.data import batches, codes, jobs, read_codes, records, tokenize

SIZES = (900, 4000, 4100, 4200, 8000, 15, 7000, 30000, 4300, 1)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with recordings, two of them broken, and a codec; here."""
    folder = tmp_path_factory.mktemp("tokenize")
    (folder / "in" / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, size in enumerate(SIZES):
        name = f"in/{'sub/' if i % 2 else ''}{i}.wav"
        soundfile.write(folder / name, 0.1 * rng.standard_normal(size), 8000 if i % 3 else 16000)
    (folder / "in" / "bad.wav").write_bytes(b"RIFFnothing")
    (folder / "in" / "empty.flac").write_bytes(b"")
    rows = [
        {"path": f"in/{i}.wav", "transcript": f"text {i}", "domain": "speech"} for i in (2, 4, 6)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "some.jsonl").write_text(text)
    pretrained.save(folder / "codec", SHALLOW, init_params(SHALLOW))
    return folder


def run(root, source, output, *options):
    short = ["--shard-hours", "0.0006", "--batch-seconds", "2"]  # shards of two seconds
    codec = ["--checkpoint", str(root / "codec")]
    return main(["tokenize", str(root / source), "--output", str(output), *codec, *short, *options])


@pytest.fixture(scope="module")
def whole(root):
    """The folder, tokenized in one go."""
    assert run(root, "in", root / "whole") == 0
    return root / "whole"


def contents(folder):
    return {item.id: (item.codes.tolist(), item.num_samples) for item in read_codes(folder)}


def test_codes_are_those_of_the_recording_alone(root, whole):
    codec = moss_tok.load(root / "codec")
    found = read_codes(whole)
    assert sorted(item.id for item in found) == sorted(
        f"{'sub/' if i % 2 else ''}{i}.wav" for i in range(len(SIZES))
    )
    for item in found:
        wav = moss_tok_read(root / "in" / item.id)
        expected = moss_tok.encode(codec, wav[None]).codes[0]
        np.testing.assert_array_equal(item.codes, expected)
        assert item.num_samples == wav.shape[1]
        assert item.codes.dtype == np.int16
    assert len(list(whole.glob("codes-*"))) > 2
    failures = [json.loads(line) for line in (whole / "failures.jsonl").read_text().splitlines()]
    assert {row["id"] for row in failures} == {"bad.wav", "empty.flac"}
    summary = json.loads((whole / "summary.json").read_text())
    assert (summary["num_items"], summary["num_failures"]) == (len(SIZES), 2)


def moss_tok_read(path):
    from moss_tok.audio import files

    return files.read(path, 8000, 1)


def test_records_that_do_not_say_how_long_they_are(root, tmp_path):
    data = (root / "in" / "2.wav").read_bytes()
    path = tmp_path / "a-00000-of-00001.array_record"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    writer.write(records.pack(data, {"id": "a"}))
    writer.write(b"broken")
    writer.close()
    items = tokenize.find_items(str(path))
    assert [item.duration_seconds for _, item in items] == [SIZES[2] / 8000, 0]


def test_as_a_source_for_grain(whole):
    dataset = grain.MapDataset.source(read_codes(whole)).shuffle(seed=0)
    dataset = dataset.map(lambda item: item.codes.shape[0])
    assert [dataset[i] for i in range(len(dataset))] == [4] * len(SIZES)


def test_json_lines_and_metadata(root, tmp_path, capsys):
    """What the fine-tuning of MOSS-TTS reads: text, and codes [T, Q]."""
    options = ["--format", "jsonl", "--num-quantizers", "2", "--verify", "2"]
    assert run(root, "some.jsonl", tmp_path / "out", *options) == 0
    assert "verified 2 items, 0 codes differ" in capsys.readouterr().out
    paths = (tmp_path / "out").glob("codes-*")
    lines = [line for p in paths for line in p.read_text().splitlines()]
    rows = {row["id"]: row for row in map(json.loads, lines)}
    assert rows["in/2.wav"]["text"] == "text 2"
    assert rows["in/2.wav"]["domain"] == "speech"
    codes = np.array(rows["in/4.wav"]["audio_codes"])
    assert codes.shape == (-(-8000 // 16), 2)
    item = next(item for item in read_codes(tmp_path / "out") if item.id == "in/4.wav")
    np.testing.assert_array_equal(item.codes.T, codes)
    assert item.metadata["transcript"] == "text 4"


def test_array_record_sets(root, tmp_path):
    """Shards of `prepare`, by their folder or by a pattern, give the codes of their audio."""
    assert main(["prepare", str(root / "some.jsonl"), str(tmp_path / "shards")]) == 0
    assert run(root, "some.jsonl", tmp_path / "a") == 0
    by_folder = ["tokenize", str(tmp_path / "shards"), "--checkpoint", str(root / "codec")]
    assert main([*by_folder, "--output", str(tmp_path / "b")]) == 0
    pattern = ["tokenize", str(tmp_path / "shards" / "*.array_record"), *by_folder[2:]]
    assert main([*pattern, "--output", str(tmp_path / "c")]) == 0
    found = [sorted(c for c, _ in contents(tmp_path / n).values()) for n in "abc"]
    assert found[0] == found[1] == found[2]
    texts = {item.metadata.get("transcript") for item in read_codes(tmp_path / "c")}
    assert texts == {"text 2", "text 4", "text 6"}


def test_records_have_the_split_of_their_shard(root, tmp_path):
    audio = (root / "in" / "4.wav").read_bytes()
    (tmp_path / "shards").mkdir()
    for split in ("train", "test"):
        path = tmp_path / "shards" / f"{split}-00000-of-00001.array_record"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        writer.write(records.pack(audio, {"id": split}))
        writer.close()
    options = ["--checkpoint", str(root / "codec"), "--output", str(tmp_path / "out")]
    assert main(["tokenize", str(tmp_path / "shards"), *options]) == 0
    splits = {item.id: item.metadata["split"] for item in read_codes(tmp_path / "out")}
    assert splits == {"train": "train", "test": "test"}


def test_machines_share_the_work(root, whole, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(root, "in", out, "--shard-index", "1", "--num-shards", "2") == 0
    assert "this machine's shards are written, those of others are not" in capsys.readouterr().out
    with pytest.raises(ValueError, match="shards are there"):
        read_codes(out)
    assert run(root, "in", out, "--shard-index", "0", "--num-shards", "2") == 0
    assert contents(out) == contents(whole)


def test_processes_of_jax_distributed_share_the_work(root, whole, tmp_path):
    """Two processes of two devices, started at once, write what one writes."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "moss_tok", "tokenize", str(root / "in"), "--output", str(out),
               "--checkpoint", str(root / "codec"), "--shard-hours", "0.0006",
               "--batch-seconds", "2", "--verify", "2"]  # fmt: skip
    devices = {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=2")}
    processes = [
        subprocess.Popen(command, env=os.environ | devices | environment, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for environment in slurm_environments()
    ]  # fmt: skip
    outputs = finish(processes)
    assert all("10 items" in output and "2 failures" in output for output in outputs), outputs
    assert all("verified 1 items, 0 codes" in output for output in outputs), outputs
    for path in whole.rglob("*"):
        if path.is_file():
            assert (out / path.relative_to(whole)).read_bytes() == path.read_bytes(), path


def test_an_output_that_processes_do_not_share_is_refused(root, tmp_path):
    command = [sys.executable, "-m", "moss_tok", "tokenize", str(root / "in"),
               "--checkpoint", str(root / "codec"), "--output"]  # fmt: skip
    outputs = [tmp_path / "a", tmp_path / "b"]
    processes = [
        subprocess.Popen([*command, str(output)], env=os.environ | environment, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for environment, output in zip(slurm_environments(), outputs, strict=True)
    ]  # fmt: skip
    for process, output in zip(processes, outputs, strict=True):
        text, _ = process.communicate(timeout=120)
        assert process.returncode == 2, text
        assert f"error: output {output}: must be a folder that all processes share" in text
        assert not output.exists()


def test_a_plan_that_is_being_written(tmp_path):
    (tmp_path / ".incomplete-1").touch()
    jobs.check_folder(tmp_path, "plan.json")
    (tmp_path / "other").touch()
    with pytest.raises(ValueError, match="is not empty"):
        jobs.check_folder(tmp_path, "plan.json")


def test_on_all_devices(root, tmp_path, whole, monkeypatch):
    """Eight devices, or one, give the same codes."""
    assert len(jax.local_devices()) == 8
    one = sharding.make_mesh("data:1")
    monkeypatch.setattr(sharding, "make_mesh", lambda *args: one)
    assert run(root, "in", tmp_path / "out") == 0
    assert contents(tmp_path / "out") == contents(whole)


def test_long_recordings_side_by_side(root, whole, tmp_path, monkeypatch):
    """Each is a stream in a slot, also one that is cut off, and what waits takes its place."""
    shutil.copytree(root / "in", tmp_path / "in")
    data = (root / "in" / "sub" / "7.wav").read_bytes()
    (tmp_path / "in" / "cut.wav").write_bytes(data[: len(data) // 2])
    assert main(["prepare", str(root / "some.jsonl"), str(tmp_path / "shards")]) == 0
    monkeypatch.setattr(inference, "WHOLE_SECONDS", 0.2)
    monkeypatch.setattr(batches, "SLOT_SECONDS", 0.1)
    two = sharding.make_mesh("data:2", jax.devices()[:2])
    monkeypatch.setattr(sharding, "make_mesh", lambda *args: two)
    command = ["--checkpoint", str(root / "codec"), "--batch-seconds", "0.2", "--output"]
    assert main(["tokenize", str(tmp_path / "in"), *command, str(tmp_path / "out")]) == 0
    assert contents(tmp_path / "out") == contents(whole)
    failures = (tmp_path / "out" / "failures.jsonl").read_text().splitlines()
    reasons = {row["id"]: row["reason"] for row in map(json.loads, failures)}
    assert reasons.keys() == {"bad.wav", "empty.flac", "cut.wav"}
    assert "truncated" in reasons["cut.wav"]
    assert main(["tokenize", str(tmp_path / "shards"), *command, str(tmp_path / "b")]) == 0
    expected = contents(whole)
    assert sorted(contents(tmp_path / "b").values()) == sorted(
        expected[f"{i}.wav"] for i in (2, 4, 6)
    )


@pytest.mark.parametrize("longest", [20, 600])
def test_padding_on_many_devices(micro, rng, monkeypatch, longest):
    """Less than a tenth, where a shard has an hour for each of the devices, long ones too."""
    monkeypatch.setattr(inference, "encode", lambda codec, wav, lengths, n: zeros(wav, n))
    monkeypatch.setattr(batches, "encode_step", lambda c, s, wav, lengths, n: (s, zeros(wav, n)[0]))
    rate = micro.config.sample_rate

    def zeros(wav, n):
        return inference.Encoded(np.zeros((len(wav), n, wav.shape[2] // 16), np.int32), None)

    encoder = batches.BatchEncoder(micro, 1, 120)
    long, found = [], {}
    seconds = np.sort(rng.lognormal(np.log(longest / 4), 0.7, round(8 * 3600 / longest * 3)))
    for i, x in enumerate(np.clip(seconds, 0.5, longest)):
        wav = np.zeros((1, int(x * rate)), np.float32)
        if not inference.is_long(x):
            encoder.add(str(i), wav, found)
        else:
            long.append((str(i), lambda wav=wav: [wav]))
    encoder.flush(found)
    with ThreadPoolExecutor(1) as pool:
        encoder.encode_long(long[::-1], pool, found)
    assert len(found) == len(seconds)
    assert found["9"][0].shape[1] == -(-found["9"][1] // 16)
    assert encoder.statistics.padded_seconds < 1.1 * encoder.statistics.audio_seconds


@pytest.mark.parametrize(
    ("lengths", "program_frames", "expected"),
    [
        ([], 10, []),
        ([3, 4, 5, 6], 5, [6]),
        ([3, 4, 5, 6], 3, [4, 6]),
        ([3, 4, 5, 6], 0.5, [3, 4, 5, 6]),
        ([4] * 100 + [5, 6], 99, [4, 6]),
        ([17, 30, 100], 1000, [104]),
    ],
)
def test_buckets_of_few_recordings_are_joined(lengths, program_frames, expected):
    assert batches.choose_sizes(lengths, program_frames) == expected


def test_few_short_recordings_need_one_program(micro, rng):
    encoder = batches.BatchEncoder(micro, 1, batch_seconds=1000.0)
    wavs = [rng.standard_normal((1, size)).astype(np.float32) for size in range(400, 2000, 80)]
    encoder.expect([wav.shape[1] / micro.config.sample_rate for wav in wavs])
    found = {}
    for number, wav in enumerate(wavs):
        encoder.add(str(number), wav, found)
    encoder.flush(found)
    assert len(found) == len(wavs) and len(encoder.statistics.shapes) == 1


def test_killed_and_gone_on_with(root, whole, tmp_path):
    """A run killed between its shards leaves them; the next one does the others only."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "moss_tok", "tokenize", str(root / "in"), "--output", str(out),
               "--checkpoint", str(root / "codec"), "--shard-hours", "0.0006",
               "--batch-seconds", "2"]  # fmt: skip
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    while not list(out.glob("codes-*")) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    old, new = (out / f".incomplete-codes-0.array_record@elsewhere@{n}" for n in (1, 2))
    old.touch()
    new.touch()
    os.utime(old, (0, 0))
    done = {p.name: p.stat().st_mtime_ns for p in out.glob("codes-*")}
    parts = {p.stem for p in (out / "parts").glob("*")}
    assert run(root, "in", out) == 0
    assert contents(out) == contents(whole)
    for name, modified in done.items():
        assert name not in parts or (out / name).stat().st_mtime_ns == modified
    assert list(out.rglob(".incomplete-*")) == [new]  # somebody may be at work on another host


def test_a_damaged_shard_is_written_again(root, whole, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    shard = min(copy.glob("codes-*"))
    content = shard.read_bytes()
    for damaged in (b"", content[:-100]):
        shard.write_bytes(damaged)
        if damaged:
            with pytest.raises(ValueError, match="no ArrayRecord files"):
                codes.read_codes(copy)
        assert run(root, "in", copy) == 0
        assert contents(copy) == contents(whole)
    part = min((copy / "parts").iterdir())
    part.write_text("{}\n")
    capsys.readouterr()
    assert run(root, "in", copy) == 2
    assert f"{part}: is damaged; delete it" in capsys.readouterr().err
    part.unlink()
    assert run(root, "in", copy) == 0


def test_lines_of_something_else(tmp_path):
    (tmp_path / "plan.json").write_text('{"format": "jsonl"}')
    (tmp_path / "codes-00000-of-00001.jsonl").write_text('{"id": "a", "audio_codes": [[1]]}\n')
    source = codes.read_codes(tmp_path)
    with pytest.raises(ValueError, match="00001.jsonl:1: has no num_samples"):
        source[0]


def test_shards_must_not_be_absurdly_short(root, tmp_path, capsys):
    assert run(root, "in", tmp_path / "out", "--shard-hours", "1e-320") == 2
    assert "shard_hours must be at least 1e-06, got 1e-320" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_plan_of_something_else(tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(ValueError, match="plan.json: has no format, so no output of moss-tok"):
        codes.read_codes(tmp_path)


def test_another_codec_or_setting_does_not_go_on(root, whole, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    for options, name in [
        (["--num-quantizers", "2"], "num_quantizers was 4, now 2"),
        (["--precision", "bfloat16"], "dtype was float32, now bfloat16"),
        (["--checkpoint", str(GOLDEN / "v1_tiny")], "codec was "),
        (["--format", "jsonl"], "format was arrayrecord, now jsonl"),
    ]:
        capsys.readouterr()
        assert run(root, "in", copy, *options) == 2
        assert name in capsys.readouterr().err
    assert run(root, "in", copy) == 0


def test_other_texts_do_not_go_on(root, tmp_path, capsys):
    """They are in the shards, too."""
    source = root / "other.jsonl"
    text = (root / "some.jsonl").read_text()
    source.write_text(text)
    assert run(root, source.name, tmp_path / "out") == 0
    source.write_text(text.replace("text 4", "text five"))
    assert run(root, source.name, tmp_path / "out") == 2
    assert "data was " in capsys.readouterr().err


def test_what_a_shard_cannot_hold(root, tmp_path, capsys):
    row = {"path": "in/2.wav", "speaker": 2**64}
    (root / "huge.jsonl").write_text(json.dumps(row) + "\n")
    assert run(root, "huge.jsonl", tmp_path / "out") == 2
    assert "'in/2.wav': its metadata cannot be stored: Int" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_full_disk(root, tmp_path, monkeypatch, capsys):
    def close(writer):
        raise RuntimeError("write() failed: No space left on device")

    monkeypatch.setattr(tokenize.codes.Writer, "__exit__", lambda self, *args: close(self))
    assert run(root, "some.jsonl", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "could not be written (write() failed: No space left" in error
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["plan.json"]


def test_nothing_could_be_read(root, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(root / "in" / "bad.wav", tmp_path / "in")
    assert run(root, tmp_path / "in", tmp_path / "out") == 1
    assert "bad.wav" in (tmp_path / "out" / "failures.jsonl").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "csv"], "format must be one of arrayrecord, jsonl"),
        (["--precision", "low"], "precision must be one of highest, high, bfloat16"),
        (["--shard-index", "0"], "--shard-index and --num-shards must be given together"),
        (["--shard-index", "2", "--num-shards", "2"], "shard-index must be 0..1, got 2"),
        (["--batch-seconds", "0"], "batch_seconds must be above 0"),
        (["--num-quantizers", "5"], "num_quantizers must be 1..4"),
        (["--num-quantizers", "0"], "num_quantizers must be 1..4"),
        (["--batch-seconds", "inf"], "batch_seconds must be above 0 and finite, got inf"),
        (["--verify", "-1"], "verify must be at least 0"),
        (["--output", ""], "output must be a folder"),
        (["--output", "SRC/0.wav"], "output must be a folder"),
        (["--output", "SRC"], "is not empty, and has no plan.json"),
    ],
)
def test_errors(root, tmp_path, capsys, options, message):
    options = [x.replace("SRC", str(root / "in")) for x in options]
    assert run(root, "in", tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_no_source(root, capsys):
    with pytest.raises(ValueError, match="no source of recordings"):
        tokenize.find_items("")


def test_two_recordings_of_one_name(root, tmp_path):
    rows = [{"path": str(root / "in" / "0.wav")}] * 2
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="is there more than once"):
        tokenize.find_items(str(tmp_path / "a.jsonl"))


def test_shards_of_recordings_with_one_name(tmp_path, rng):
    """As data sets have that are a folder per track."""
    for name in "ab":
        (tmp_path / "in" / name).mkdir(parents=True)
        wav = 0.1 * rng.standard_normal(9000)
        soundfile.write(tmp_path / "in" / name / "mix.wav", wav, 8000)
    assert main(["prepare", str(tmp_path / "in"), str(tmp_path / "shards")]) == 0
    items = tokenize.find_items(str(tmp_path / "shards"))
    assert len({key for key, _ in items}) == 2
