"""moss-tok evaluate: the files and results of the published protocol, resumed without loss."""

import csv
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers import GOLDEN, micro_config

import moss_tok
from moss_tok.cli.main import main
from moss_tok.codec import pretrained
from moss_tok.evaluation import datasets, metrics, reconstruction, report, scoring
from moss_tok.evaluation.results import describe_failures, write_results, write_summary

CODEC = str(GOLDEN / "v1_tiny")
ALL = ["--output", "out", "--name", "tiny", "--num-workers", "1", "--num-quantizers", "2,8"]
SOME = ["--metrics", "mel_loss,sisdr"]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A folder with two data sets, evaluated."""
    folder = tmp_path_factory.mktemp("evaluated")
    rng = np.random.default_rng(0)
    rows = {"speech": [], "mixed": []}
    for i, (name, rate, size) in enumerate(
        [("speech", 24000, 30000), ("speech", 16000, 20001), ("mixed", 44100, 9000)]
    ):
        soundfile.write(folder / f"a b{i}.wav", 0.1 * rng.standard_normal(size), rate)
        rows[name].append({"audio": f"a b{i}.wav", "domain": f"d{i}"})
    for name, lines in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in lines)
        (folder / f"{name}.jsonl").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run("speech", "mixed") == 0
    return folder


def run(*names, extra=()):
    options = [x for name in names for x in ("--dataset", f"{name}.jsonl")]
    return main(["evaluate", "--checkpoint", CODEC, *options, *ALL, *SOME, *extra])


def test_layout(evaluated):
    folder = evaluated / "out" / "tiny" / "rvq2" / "speech"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["schema_version"] == 1
    assert manifest["nq"] == 2
    assert manifest["dataset"]["output_names"] == ["000000_a_b0.flac", "000001_a_b1.flac"]
    info = soundfile.info(folder / "gt_audios" / "000001_a_b1.flac")
    assert (info.samplerate, info.frames, info.subtype) == (24000, 30002, "PCM_16")
    results = json.loads((folder.parent / "results.json").read_text())
    assert results["_meta"] == {"bps": 150}
    assert results["speech"]["mel_loss"] == pytest.approx(
        np.mean([results["speech"]["_domains"][d]["mel_loss"] for d in ("d0", "d1")])
    )
    assert set(results) == {"_meta", "speech", "mixed"}


def test_files_and_scores_are_those_of_the_public_functions(evaluated, v1_tiny):
    folder = evaluated / "out" / "tiny" / "rvq8" / "speech"
    name = "000000_a_b0.flac"
    wav, _ = soundfile.read(evaluated / "a b0.wav", dtype="float32")
    codes = moss_tok.encode(v1_tiny, wav[None, None]).codes
    saved = np.load(evaluated / "out" / "tiny" / "codes" / "speech" / "000000_a_b0.npz")["codes"]
    np.testing.assert_array_equal(saved, codes[0])
    pair = [soundfile.read(folder / kind / name, dtype="float32")[0] for kind in KINDS]
    np.testing.assert_allclose(pair[0], wav, atol=1e-4)
    expected = np.clip(moss_tok.decode(v1_tiny, codes).wav[0, 0, :30000], -1, 1)
    np.testing.assert_allclose(pair[1], expected, atol=1e-4)
    row = json.loads((folder / "scores.jsonl").read_text().splitlines()[0])
    found = metrics.compute(pair[0][None], pair[1][None], 24000, ("mel_loss", "sisdr"))
    assert found == {name: pytest.approx(row[name]) for name in found}


KINDS = ("gt_audios", "syn_audios")


def test_summary(evaluated):
    text = (evaluated / "out" / "summary.md").read_text()
    for part in ("## speech\n", "## speech, d1\n", "| tiny/rvq2 | 150 |", "Bits used of a code"):
        assert part in text
    with (evaluated / "out" / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["system"] for row in rows} == {"tiny/rvq2", "tiny/rvq8"}
    bits = json.loads((evaluated / "out" / "tiny" / "entropy.json").read_text())["speech"]
    assert len(bits) == 8 and all(0 <= b <= 6 for b in bits)


def test_goes_on(evaluated, tmp_path, monkeypatch, capsys):
    """What is missing is made again, nothing else; another codec does not go on."""
    folder = tmp_path / "copy"
    shutil.copytree(evaluated, folder)
    monkeypatch.chdir(folder)
    rated = folder / "out" / "tiny" / "rvq8" / "speech"
    gone, kept = (rated / "syn_audios" / f"00000{i}_a_b{i}.flac" for i in (0, 1))
    results = json.loads((rated.parent / "results.json").read_text())
    was, data = kept.stat().st_mtime_ns, gone.read_bytes()
    gone.unlink()
    lines = (rated / "scores.jsonl").read_text().splitlines()
    (rated / "scores.jsonl").write_text(lines[0] + "\n" + lines[1][:20])
    (rated.parent / "results.json").unlink()
    # The jsonl moved, and manifests name it: they are of this place.
    for file in folder.rglob("manifest.json"):
        file.write_text(file.read_text().replace(str(evaluated), str(folder)))
    assert run("speech", "mixed") == 0
    assert json.loads((rated.parent / "results.json").read_text()) == results
    assert kept.stat().st_mtime_ns == was
    assert gone.read_bytes() == data
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "fingerprint", lambda codec: "another")
        capsys.readouterr()
        assert run("speech") == 2
    assert "holds results of another codec or data set" in capsys.readouterr().err


def test_scores_of_torch_models_stay(evaluated, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(evaluated, folder)
    path = folder / "out" / "tiny" / "rvq2" / "results.json"
    results = json.loads(path.read_text())
    results["speech"] |= {"utmos": 3.5, "sim": math.nan}
    path.write_text(json.dumps(results))
    dataset = datasets.read_dataset(folder / "speech.jsonl")
    rows = scoring.read_scores(path.parent / "speech" / "scores.jsonl")
    write_results(path.parent / "speech", dataset, rows, ["mel_loss"], 150)
    written = json.loads(path.read_text())["speech"]
    assert (written["utmos"], math.isnan(written["sim"])) == (3.5, True)
    assert "| utmos |" in write_summary(folder / "out")
    assert main(["report", str(folder / "out")]) == 0
    text = (folder / "out" / "report.html").read_text()
    assert "<th>utmos</th>" in text and "<td>3.500</td>" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.jsonl: no lines"),
        ('{"path": "in.wav"}\n\n{"path": "in.wav"}', "a.jsonl:2: a blank line"),
        ('{"path": "no.wav"}', "a.jsonl:1: no such file"),
        ('{"file": "in.wav"}', "a.jsonl:1: no audio path; accepted keys: audio_path"),
        ("[1]", "a.jsonl:1: must be a JSON object like .* got list"),
        ('{"path": "in.wav"}\n{"path": "bad.wav"}', "a.jsonl:2: .*bad.wav"),
        ('{"path": "empty.wav"}', "a.jsonl:1: .*empty.wav: empty audio"),
    ],
)
def test_bad_data_sets(tmp_path, text, message):
    soundfile.write(tmp_path / "in.wav", np.zeros(100), 24000)
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 24000)
    (tmp_path / "bad.wav").write_bytes(b"RIFFnothing")
    (tmp_path / "_a.jsonl").write_text(text)
    with pytest.raises(ValueError, match="must not begin with _"):
        datasets.read_dataset(tmp_path / "_a.jsonl")
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        datasets.read_dataset(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--num-quantizers", "0"], "num_quantizers must be all, or numbers"),
        (["--num-quantizers", "1..9"], "of 1..8"),
        (
            ["--dataset", "mixed.jsonl", "--metrics", "pesq-nb"],
            "pesq-nb is not defined for any",
        ),
        (["--metrics", "snr"], "unknown metric 'snr'"),
        (["--num-workers", "0"], "num_workers must be at least 1"),
        (["--dataset", "speech.jsonl"], "two data sets have the same file name"),
        (["--metrics", ","], "unknown metric ''"),
        (["--checkpoint", "no"], "no: no such checkpoint"),
        (["--output", ""], "output must be a folder"),
        (["--output", "speech.jsonl"], "output must be a folder, got 'speech.jsonl'"),
        (["--output", "."], "is not empty, and has no results to resume"),
        (["--name", ".."], "must be a folder's name"),
        (["--name", "a/b"], "must be a folder's name"),
        (["--baselines", "mp3:64"], "baselines must be opus:KBPS"),
        (["--baselines", "../x=out"], "must be a folder's name"),
        (["--baselines", "x=out,x=out"], "x more than once"),
        (["--baselines", "tiny=out"], "the codec and a baseline are both called tiny"),
        (["--baselines", "x=empty"], "x: no reconstruction called a b0"),
    ],
)
def test_errors(evaluated, monkeypatch, capsys, extra, message):
    monkeypatch.chdir(evaluated)
    (evaluated / "empty").mkdir(exist_ok=True)
    before = set(evaluated.rglob("*"))
    assert run("speech", extra=["--output", "new", *extra]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    if "pesq-nb" not in extra:  # known when all is reconstructed
        assert set(evaluated.rglob("*")) == before


def test_another_data_set_of_the_name(evaluated, tmp_path, monkeypatch, capsys):
    """It shares the codes, so that it is refused at bitrates that were not there, too."""
    folder = tmp_path / "copy"
    shutil.copytree(evaluated, folder)
    monkeypatch.chdir(folder)
    before = set(folder.rglob("*"))
    assert run("speech", extra=["--num-quantizers", "4"]) == 2
    assert "holds results of another codec or data set" in capsys.readouterr().err
    assert set(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [("[]", "expected a JSON object"), ('{"a": 5}', "a must be a JSON object, got 5"),
     ('{"a": {"stoi": "x"}}', "stoi of a must be a number, got 'x'"),
     ('{"a": {"stoi": true}}', "stoi of a must be a number, got True"),
     ('{"bps": "x"}', "bps must be a number, got 'x'"),
     ('{"a": {"_domains": null}}', "_domains of a must be a JSON object, got None"),
     ('{"a": {"_domains": {"b": 5}}}', "a, b must be a JSON object, got 5")],
)  # fmt: skip
def test_broken_results(tmp_path, capsys, text, message):
    (tmp_path / "rvq1").mkdir()
    (tmp_path / "rvq1" / "results.json").write_text(text)
    assert main(["report", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_broken_entropy(tmp_path, capsys):
    (tmp_path / "results.json").write_text('{"a": {"stoi": 0.5}}')
    (tmp_path / "entropy.json").write_text('{"a": 3}')
    assert main(["report", str(tmp_path)]) == 2
    assert "entropy.json: a must be a list of numbers, got 3" in capsys.readouterr().err


def test_numbers():
    assert reconstruction.parse_numbers("all", 3) == [1, 2, 3]
    assert reconstruction.parse_numbers("8, 1..3,2", 8) == [1, 2, 3, 8]


def test_a_row_holds_a_recording_that_resampling_rounds_up():
    """At 8 kHz it has a quarter of a sample more than 2048 frames, so 2049 frames."""
    num_samples = 12 * 16 * 2048 + 3
    task = reconstruction._Task(num_samples / 96000, Path("a.wav"), "a", [1])
    config = micro_config()
    (batch,) = reconstruction._batches([task], config)
    wav = metrics.resample(np.zeros((1, num_samples), np.float32), 96000, 8000)
    assert config.num_frames(wav.shape[1]) == 2049 <= batch.num_frames


def test_fingerprint(v1_tiny, nano_tiny):
    found = {pretrained.fingerprint(c) for c in (v1_tiny, nano_tiny, v1_tiny)}
    assert len(found) == 2


def sources(page):
    """The files that a page shows."""
    text = page.read_text()
    assert "http" not in text  # it works without network
    return [page.parent / name for name in re.findall(r'src="([^"]+)"', text)]


def test_page_of_an_evaluation(evaluated):
    page = evaluated / "out" / "report.html"
    files = sources(page)
    assert files and all(file.is_file() for file in files)
    kinds = {file.suffix for file in files}
    assert kinds == {".png", ".flac"}
    text = page.read_text()
    for part in ("speech: 000000_a_b0", "<option>mixed", "tiny/rvq8", "reference", "mel_loss",
                 "<h2>Bits used of a code, tiny on mixed"):  # fmt: skip
        assert part in text


def test_page_of_a_run(tmp_path, capsys, rng):
    folder = tmp_path / "a <run>"
    (folder / "samples").mkdir(parents=True)
    (folder / "train_config.json").write_text('{"stage": "pretrain"}')
    assert main(["report", str(folder)]) == 0  # before its first step
    for name in ("speech_input", "speech_1_quantizer", "speech_16_quantizers"):
        soundfile.write(folder / "samples" / f"{name}.wav", 0.1 * rng.standard_normal(900), 24000)
    rows = [{"step": 50, "loss": 2.5, "audio_seconds_per_second": 51.0}]
    (folder / "metrics.jsonl").write_text(json.dumps(rows[0]) + '\n{"step": 1')
    table = {"speech": {"silence": {"mel_loss": 9.0}, "1 quantizer": {"mel_loss": 2.0}}}
    lines = [json.dumps({"step": 50, "table": good}) for good in (table, [], {"speech": 3})]
    (folder / "evaluation.jsonl").write_text("\n".join(lines))
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.split("\n")[-2] == str(folder / "report.html")
    assert len(sources(folder / "report.html")) == 7  # the curves are drawn
    text = (folder / "report.html").read_text()
    for part in (
        "Run: a &lt;run&gt;",
        "Step 50, loss 2.5",
        "51 s of audio per s",
        "<td>9.000</td>",
    ):
        assert part in text
    order = [text.index(x) for x in ("<b>input", "<b>16 quantizers", "<b>1 quantizer")]
    assert order == sorted(order)


def test_a_log_with_a_speed_that_is_no_number(tmp_path):
    (tmp_path / "train_config.json").write_text('{"stage": "pretrain"}')
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.5, "audio_seconds_per_second": "fast"}\n'
    )
    assert main(["report", str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text()
    assert "loss 2.5" in text and "Speed at the end" not in text


def test_pages_of_nothing(tmp_path, capsys):
    assert main(["report", str(tmp_path / "no")]) == 2
    assert main(["report", str(tmp_path)]) == 2
    assert "no results.json in it" in capsys.readouterr().err


def test_rates_with_published_values(tmp_path):
    curves = {"ours": [(1000, {"stoi": 0.9, "sisdr": 1.0}), (2000, {"stoi": 0.92})]}
    report.save_rates(tmp_path / "a.png", curves, "speech")
    report.save_rates(tmp_path / "b.png", curves, "other")
    assert (tmp_path / "a.png").stat().st_size > (tmp_path / "b.png").stat().st_size


def test_a_system_has_one_color(tmp_path, monkeypatch):
    """Also where the first of them lacks a metric."""
    figures = []
    monkeypatch.setattr(report, "_save", lambda figure, path: figures.append(figure))
    curves = {"a": [(1000, {"stoi": 0.9})], "b": [(1000, {"stoi": 0.8, "sim": 0.5})]}
    report.save_rates(tmp_path / "a.png", curves, "other")
    lines = [line for axis in figures[0].axes for line in axis.get_lines()]
    colors = {(line.get_label(), line.get_color()) for line in lines}
    assert len(lines) == 3 and len(colors) == 2
    assert [t.get_text() for t in figures[0].legends[0].get_texts()] == ["a", "b"]


def test_recordings_without_a_metric_are_counted():
    scores = {
        "a.flac": {"stoi": 0.5, "pesq-wb": 2.0, "_errors": {}},
        "b.flac": {"stoi": 0.5, "_errors": {"pesq-wb": "no speech"}},
    }
    lines = describe_failures(Path("out/codec/rvq4/speech"), scores, ["stoi", "pesq-wb"])
    assert lines == ["rvq4, speech: pesq-wb is left out for 1 of 2 recordings; b.flac: no speech"]
