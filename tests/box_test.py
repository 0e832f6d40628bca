"""The codec that comes with the package, and the record of what produced a checkpoint."""

import errno
import hashlib
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers import GOLDEN, PRETRAIN, RATE, leaves_equal, make_clips, small_run, train

import moss_tok
from moss_tok import assets, checkpoint
from moss_tok.cli.main import main
from moss_tok.codec import pretrained
from moss_tok.convert import convert
from moss_tok.evaluation import report
from moss_tok.objectives.config import configure
from moss_tok.training import provenance

TRAINING = {
    "steps": 7,
    "flags": {"batch_size": 8},
    "seed": 0,
    "train_data": [
        {"name": "a.jsonl", "weight": 0.5, "sha256": "ab" * 32, "recordings": 2, "minutes": 3.5,
         "licences": {"CC0": 3.5}},
    ],
    "machine": {"device": "cpu", "num_devices": 1, "num_cores": 2, "processor": "x86_64"},
    "init_from": {"name": "first_run", "steps": 5, "seed": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def packed(tmp_path_factory, micro):
    """An official directory in float16."""
    folder = tmp_path_factory.mktemp("packed")
    files = {"training.json": json.dumps(TRAINING)}
    pretrained.save(folder / "ours", micro.config, micro.params, files)
    convert(folder / "ours", folder / "codec", "float16")
    return folder / "codec"


@pytest.fixture
def box(packed, tmp_path, monkeypatch):
    """A working directory with `in.wav`; the codec in the package is that of the tests."""
    monkeypatch.setattr(assets, "CODEC", packed)
    monkeypatch.chdir(tmp_path)
    wav = 0.1 * np.random.default_rng(0).standard_normal(RATE)
    soundfile.write("in.wav", wav, RATE)
    return tmp_path


def test_the_default_codec(box, micro):
    codec = moss_tok.load()
    rounded = [np.float32(np.float16(leaf)) for leaf in map(np.asarray, leaves(micro.params))]
    assert {leaf.dtype.name for leaf in leaves(codec.params)} == {"float32"}
    assert leaves_equal(leaves(codec.params), rounded)


def leaves(tree):
    import jax

    return jax.tree.leaves(tree)


def test_commands_without_a_checkpoint(box, capsys):
    assert main(["encode", "in.wav", "a.npz"]) == 0
    assert main(["decode", "a.npz", "a.wav"]) == 0
    assert main(["reconstruct", "in.wav", "b.wav"]) == 0
    assert main(["stream", "--input", "in.wav", "--output", "c.wav"]) == 0
    decoded = [soundfile.read(name)[0] for name in ("a.wav", "b.wav", "c.wav")]
    for wav in decoded[1:]:
        np.testing.assert_allclose(wav, decoded[0], atol=1e-4)
    capsys.readouterr()
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for line in (
        "trained       7 steps, seed 0",
        "  machine     1 x cpu, 2 cores, x86_64",
        f"  data        a.jsonl, weight 0.5, 2 recordings, 3.5 minutes, sha256 {'ab' * 32}",
        "              3.5 minutes: CC0",
        "  --batch_size=8",
        "started from  first_run",
        "trained       5 steps, seed 1",
        f"note          {assets.NOTE}",
    ):
        assert line in out.splitlines()


def test_compare(box, capsys, monkeypatch):
    assert main(["compare", "in.wav", "compared"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "in.wav: 1.0 s; 500 frames per second"
    header = next(i for i, line in enumerate(out) if line.split()[:1] == ["quantizers"])
    rows = [line.split() for line in out[header + 1 : -1]]
    assert [row[:2] for row in rows] == [["1", "2000"], ["2", "4000"], ["4", "8000"]]
    assert all(len(row) == 5 for row in rows)
    names = {"original.wav", "1_quantizer.wav", "2_quantizers.wav", "4_quantizers.wav",
             "spectrograms.png"}  # fmt: skip
    assert {path.name for path in Path("compared").iterdir()} == names
    assert soundfile.info("compared/4_quantizers.wav").frames == RATE
    shutil.copy("in.wav", "compared/8_quantizers.wav")  # as of a codec with more quantizers
    assert main(["compare", "in.wav", "compared"]) == 0  # again
    assert {path.name for path in Path("compared").iterdir()} == names
    Path("compared/my_quantizer_notes.wav").touch()
    earlier = {path: path.read_bytes() for path in Path("compared").iterdir()}

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(report, "save_spectrograms", fail)
        assert main(["compare", "in.wav", "compared"]) == 2
        assert main(["compare", "in.wav", "new"]) == 2
    assert {path: path.read_bytes() for path in Path("compared").iterdir()} == earlier
    assert not Path("new").exists()
    assert capsys.readouterr().err == 2 * "error: No space left on device\n"
    for argv, message in (
        (["gone.wav", "x"], "gone.wav: no such file"),
        (["in.wav", "in.wav"], "in.wav: not a folder"),
        (["in.wav", "gone/x"], "no such folder: gone"),
        (["in.wav", "."], ". is not empty, and has no earlier comparison to replace"),
        (
            ["compared/original.wav", "compared"],
            "compared/original.wav is in compared, whose files would be replaced",
        ),
    ):
        assert main(["compare", *argv]) == 2
        assert capsys.readouterr().err == f"error: {message}\n"


def test_without_the_codec(box, capsys, monkeypatch):
    monkeypatch.setattr(assets, "CODEC", box / "gone")
    for command in (["speak", "hello", "a.wav"], ["transcribe", "in.wav"]):
        with pytest.raises(SystemExit, match="2"):  # these need another checkpoint in any case
            main(command)
        assert "the following arguments are required: --checkpoint" in capsys.readouterr().err
    (box / "a.npz").touch()
    for argv in (["info"], ["encode", "in.wav", "b.npz"], ["decode", "a.npz", "a.wav"]):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: this copy of moss_tok has no codec")
        assert error.count("\n") == 1
    with pytest.raises(ValueError, match="has no codec"):
        moss_tok.load()


def test_codes_of_another_codec_are_refused(box, capsys, micro):
    pretrained.save(box / "other", micro.config, micro.params)  # float32: other codebooks
    assert main(["encode", "in.wav", "a.npz", "--checkpoint", "other"]) == 0
    assert main(["decode", "a.npz", "a.wav"]) == 2
    assert "a.npz: the codes are of another codec (quantizer " in capsys.readouterr().err
    assert not Path("a.wav").exists()
    assert main(["decode", "a.npz", "a.wav", "--checkpoint", "other"]) == 0
    with np.load("a.npz") as file:  # files of earlier versions do not say
        np.savez("b.npz", **{name: file[name] for name in file if name != "quantizer"})
    assert main(["decode", "b.npz", "b.wav"]) == 0


def test_streams_of_another_codec_are_refused(box, capsys, micro, monkeypatch):
    pretrained.save(box / "other", micro.config, micro.params)
    pcm = io.TextIOWrapper(io.BytesIO(bytes(2 * RATE)))
    monkeypatch.setattr(sys, "stdin", pcm)
    assert main(["stream", "--checkpoint", "other"]) == 0
    lines = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert main(["stream", "--decode"]) == 2
    assert "line 1: the codes are of another codec" in capsys.readouterr().err


def test_fingerprint_of_the_quantizer(packed, micro):
    """Equal for both sides, both layouts and another decoder; different for other codebooks."""
    parts = [moss_tok.load(packed, part) for part in ("encoder", "decoder", "quantizer", "all")]
    assert len({pretrained.quantizer_fingerprint(part) for part in parts}) == 1
    assert pretrained.quantizer_fingerprint(micro) != pretrained.quantizer_fingerprint(parts[0])
    tuned = moss_tok.Codec(micro.params | {"decoder": None}, micro.config)
    assert pretrained.quantizer_fingerprint(tuned) == pretrained.quantizer_fingerprint(micro)


def test_too_large_for_float16(tmp_path, micro):
    params = micro.params | {"decoder": leaves_times(micro.params["decoder"], 1e7)}
    pretrained.save(tmp_path / "ours", micro.config, params)
    with pytest.raises(ValueError, match="float16 holds numbers up to 65504, the largest weight"):
        convert(tmp_path / "ours", tmp_path / "official", "float16")
    assert not (tmp_path / "official").exists()


def leaves_times(tree, factor):
    import jax

    return jax.tree.map(lambda x: x * factor, tree)


def test_description_of_a_run(tmp_path):
    rows = [
        {"path": "a.wav", "split": "train", "duration_s": 90, "licence": "CC0"},
        {"path": "b.wav", "duration_s": 30, "license": "CC-BY-3.0"},
        {"path": "c.wav", "split": "test", "duration_s": 600, "licence": "CC0"},
    ]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = configure(
        train_data=f"{manifest}:0.5,{tmp_path}:0.5",
        model=str(tmp_path / "codec.json"),
        init_from=str(tmp_path / "gone"),
        seed=3,
        batch_size=2,
        workdir="runs/x",
    )
    fields = provenance.describe(config)
    assert fields["flags"] == {"batch_size": 2, "model": "codec.json"}
    assert fields["seed"] == 3
    assert fields["init_from"] == {"name": "gone"}
    first, second = fields["train_data"]
    assert len(first.pop("sha256")) == 64
    assert first == {"name": "m.jsonl", "weight": 0.5, "recordings": 2, "minutes": 2.0,
                     "licences": {"CC-BY-3.0": 0.5, "CC0": 1.5}}  # fmt: skip
    assert second == {"name": tmp_path.name, "weight": 0.5}
    assert json.loads(provenance.to_text(fields, 9))["steps"] == 9
    assert str(tmp_path) not in json.dumps(fields)


def test_a_run_records_what_produced_it(tmp_path, capsys):
    clips = tmp_path / "clips"
    clips.mkdir()
    make_clips(clips)
    flags = small_run(PRETRAIN, clips, tmp_path, num_steps=2, num_eval_clips=0)
    assert train(flags)
    argv = ["convert", str(tmp_path / "run"), str(tmp_path / "codec"), "--dtype", "float16"]
    assert main(argv) == 0
    fields = json.loads((tmp_path / "codec" / checkpoint.TRAINING_NAME).read_text())
    assert (fields["steps"], fields["seed"]) == (2, 0)
    assert fields["flags"]["batch_size"] == 4
    assert fields["train_data"][0]["recordings"] == 4
    step = tmp_path / "run" / "checkpoints" / "00000002"
    assert checkpoint.read_training(step) == fields
    (step / checkpoint.TRAINING_NAME).unlink()  # as in checkpoints of earlier versions
    earlier = checkpoint.read_training(step)
    assert (earlier["steps"], earlier["seed"]) == (2, 0)
    assert earlier["flags"]["batch_size"] == 4


@pytest.mark.skipif(not assets.CODEC.exists(), reason=f"{assets.CODEC} is not there yet")
class TestCodecInThePackage:
    def test_size(self):
        files = [path for path in assets.CODEC.iterdir() if path.is_file()]
        assert sum(path.stat().st_size for path in files) <= 12 * 2**20
        names = {path.name for path in files}
        assert names == {"config.json", "model.safetensors", "training.json"}

    def test_record(self):
        fields = checkpoint.read_training(assets.CODEC)
        assert fields["steps"] > 0
        for source in fields["train_data"]:
            assert source["sha256"]
            assert source["licences"]
            assert "not stated" not in source["licences"]
        assert fields["machine"]

    @pytest.fixture
    def answers(self):
        """Made by experiments/official_answers.py; make them again when the weights change."""
        return dict(np.load(GOLDEN / "codec" / "expected.npz"))

    def test_answers_of_the_official_class(self, answers):
        weights = (assets.CODEC / "model.safetensors").read_bytes()
        assert hashlib.sha256(weights).hexdigest() == str(answers["weights_sha256"])
        codec = moss_tok.load()
        wav = answers["wav_int16"].astype(np.float32) / 32768
        codes = np.asarray(moss_tok.encode(codec, wav[None, None]).codes)[0]
        np.testing.assert_array_equal(codes, answers["codes"])
        for number in (4, len(codes)):
            wav_hat = moss_tok.decode(codec, codes[None, :number]).wav[0, 0]
            np.testing.assert_allclose(wav_hat, answers[f"audio_{number}"], atol=5e-4)

    def test_audio_keeps_its_sign_and_gains_from_every_doubling(self, answers):
        """Losses of magnitudes alone would allow the opposite sign."""
        codec = moss_tok.load()
        wav = answers["wav_int16"].astype(np.float32) / 32768
        for sign in (1, -1):
            codes = moss_tok.encode(codec, sign * wav[None, None]).codes
            correlations = []
            for number in (1, 2, 4, 8, 16):
                wav_hat = moss_tok.decode(codec, codes[:, :number]).wav[0, 0, : len(wav)]
                correlations.append(np.corrcoef(sign * wav, wav_hat)[0, 1])
            assert correlations == sorted(correlations)
            assert correlations[-1] > 0.7
