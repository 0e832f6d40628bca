"""The command line, run in this process: what it writes."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers import GOLDEN

import moss_tok
from moss_tok import checkpoint
from moss_tok.audio import files, writing
from moss_tok.cli.main import COMMANDS, build_parser, main
from moss_tok.codec import inference

CODEC = str(GOLDEN / "v1_tiny")


def test_encode_writes_what_decode_needs(coded_folder):
    with np.load("in.npz", allow_pickle=False) as file:
        fields = {k: file[k] for k in file}
    assert fields.pop("codes").shape == (8, 16)
    assert len(str(fields.pop("quantizer"))) == 16
    numbers = {k: int(v) for k, v in fields.items()}
    assert numbers == {"sample_rate": 24000, "num_samples": 30000, "num_channels": 1,
                       "hop_length": 1920, "codebook_size": 64}  # fmt: skip


@pytest.mark.parametrize("options", [[], ["--num-quantizers", "3"]])
def test_decode_is_exactly_as_long(coded_folder, options, v1_tiny):
    assert main(["decode", "in.npz", "out.wav", "--checkpoint", CODEC, *options]) == 0
    wav, rate = soundfile.read("out.wav", always_2d=True)
    assert (wav.shape, rate) == ((30000, 1), 24000)
    codes = np.load("in.npz")["codes"][: int(options[1]) if options else 8]
    expected = moss_tok.decode(v1_tiny, codes[None]).wav[0, 0, :30000]
    np.testing.assert_allclose(wav[:, 0], np.clip(expected, -1, 1), atol=1e-4)


def test_encode_num_quantizers(coded_folder):
    main(["encode", "in.wav", "few.npz", "--checkpoint", CODEC, "--num-quantizers", "2"])
    np.testing.assert_array_equal(np.load("few.npz")["codes"], np.load("in.npz")["codes"][:2])
    assert main(["decode", "few.npz", "few.wav", "--checkpoint", CODEC]) == 0


@pytest.mark.parametrize("output", ["out.wav", "out.flac", "out.ogg"])
def test_reconstruct(coded_folder, capsys, output):
    assert main(["reconstruct", "in.wav", output, "--checkpoint", CODEC]) == 0
    assert soundfile.info(output).frames == 30000
    assert "600 bit/s (8 quantizers), mel_loss" in capsys.readouterr().out


def test_stereo_48k_of_a_mono_file(coded_folder):
    nano = str(GOLDEN / "nano_tiny")
    assert main(["reconstruct", "in.wav", "out.wav", "--checkpoint", nano]) == 0
    info = soundfile.info("out.wav")
    assert (info.channels, info.samplerate, info.frames) == (2, 48000, 60000)


def test_convert_and_info(coded_folder, capsys):
    assert main(["convert", CODEC, "ours"]) == 0
    assert main(["convert", "ours", "official"]) == 0
    capsys.readouterr()
    outputs = []
    for name in (CODEC, "ours", "official"):
        assert main(["info", name]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] == outputs[2]
    assert "75 to 600 bit/s" in outputs[0] and "window 100 frames (1 s)" in outputs[0]


@pytest.mark.parametrize(("preset", "count"), [("v1", "1,774,566,400"), ("nano", "21,969,664")])
def test_info_of_presets(capsys, preset, count):
    assert main(["info", preset]) == 0
    assert count in capsys.readouterr().out
    assert main(["info", "--checkpoint", preset]) == 0
    assert count in capsys.readouterr().out


def test_help_lists_every_command():
    argv = [sys.executable, "-m", "moss_tok", "--help"]
    out = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert all(f"  {name}" in out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_an_example(capsys, name):
    """Which the command accepts."""
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    example = capsys.readouterr().out.splitlines()[-1]
    program, command, *argv = shlex.split(example)
    assert (program, command) == ("moss-tok", name)
    build_parser(name).parse_args(argv)


def test_a_training_workdir_is_a_checkpoint(coded_folder, micro):
    from moss_tok.codec import pretrained

    steps = coded_folder / "run" / "checkpoints"
    steps.mkdir(parents=True)
    for step in (3, 20):
        pretrained.save(steps / checkpoint.step_name(step), micro.config, micro.params)
    (steps / "00000030.orbax-checkpoint-tmp").mkdir()
    assert checkpoint.find_checkpoint(coded_folder / "run").name == "00000020"
    assert main(["info", "run"]) == 0
    assert json.loads((steps / "00000020" / "config.json").read_text())["format"] == "moss_tok"


def test_long_files_go_in_blocks(coded_folder, monkeypatch, capsys):
    """With the codes of the whole; the last block is cut."""
    assert main(["reconstruct", "in.wav", "at_once.wav", "--checkpoint", CODEC]) == 0
    monkeypatch.setattr(inference, "WHOLE_SECONDS", 0.4)
    monkeypatch.setattr(inference, "CHUNK_SECONDS", 0.4)
    assert main(["reconstruct", "in.wav", "blocks.wav", "--checkpoint", CODEC]) == 0
    said = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert float(said[1]) == pytest.approx(float(said[0]), rel=0.05)  # frames at the seams
    assert main(["encode", "in.wav", "long.npz", "--checkpoint", CODEC]) == 0
    np.testing.assert_array_equal(np.load("long.npz")["codes"], np.load("in.npz")["codes"])
    assert main(["decode", "long.npz", "long.wav", "--checkpoint", CODEC]) == 0
    monkeypatch.undo()
    os.chdir(coded_folder)
    assert main(["decode", "in.npz", "whole.wav", "--checkpoint", CODEC]) == 0
    wavs = [soundfile.read(f"{name}.wav")[0] for name in ("long", "whole")]
    wavs += [soundfile.read(f"{name}.wav")[0] for name in ("blocks", "at_once")]
    assert all(wav.shape == (30000,) for wav in wavs)
    for wav in wavs[1:]:
        np.testing.assert_allclose(wav, wavs[0], atol=1e-4)


def test_folders(coded_folder, capsys):
    """Files keep their places; a bad one is listed, and the others are done."""
    Path("audio/sub").mkdir(parents=True)
    shutil.copy("in.wav", "audio/a.wav")
    soundfile.write("audio/sub/b.flac", np.full(9000, 0.1), 16000)
    Path("audio/bad.ogg").write_bytes(b"nothing")
    assert main(["encode", "audio", "codes", "--checkpoint", CODEC]) == 1
    captured = capsys.readouterr()
    assert "codes: 2 of 3 files" in captured.out
    assert "failed: audio/bad.ogg: not audio" in captured.err
    np.testing.assert_array_equal(np.load("codes/a.npz")["codes"], np.load("in.npz")["codes"])
    assert main(["decode", "codes", "back", "--checkpoint", CODEC]) == 0
    assert soundfile.info("back/a.wav").frames == 30000
    assert soundfile.info("back/sub/b.wav").frames == 13500
    Path("audio/bad.ogg").unlink()
    assert main(["reconstruct", "audio", "again", "--checkpoint", CODEC]) == 0
    wavs = [soundfile.read(f"{name}/a.wav")[0] for name in ("again", "back")]
    np.testing.assert_allclose(*wavs, atol=1e-4)
    shutil.copy("in.wav", "audio/sub/b.wav")
    capsys.readouterr()
    assert main(["encode", "audio", "more", "--checkpoint", CODEC]) == 2
    assert "would both become more/sub/b.npz" in capsys.readouterr().err
    for argv in (["audio", "audio"], ["audio", "audio/sub/new"], ["in.wav", "in.wav"]):
        before = sorted(Path().rglob("*"))
        assert main(["reconstruct", *argv, "--checkpoint", CODEC]) == 2
        assert "the output must not be the input" in capsys.readouterr().err
        assert sorted(Path().rglob("*")) == before
    assert main(["encode", "back", "back", "--checkpoint", CODEC]) == 0  # codes beside audio
    assert Path("back/sub/b.npz").exists()
    Path("empty").mkdir()
    assert main(["encode", "empty", "more", "--checkpoint", CODEC]) == 2
    assert "empty: no files (.wav, .flac" in capsys.readouterr().err


def test_decoding_into_the_folder_does_not_replace_the_recordings(coded_folder, capsys):
    Path("songs").mkdir()
    shutil.copy("in.wav", "songs/a.wav")
    before = Path("songs/a.wav").read_bytes()
    assert main(["encode", "songs", "songs", "--checkpoint", CODEC]) == 0
    assert main(["decode", "songs", "songs", "--checkpoint", CODEC]) == 2
    message = "songs/a.wav: exists, maybe the original; decode into another folder"
    assert message in capsys.readouterr().err
    assert Path("songs/a.wav").read_bytes() == before
    assert main(["decode", "songs", "decoded", "--checkpoint", CODEC]) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_ended_leaves_no_partial_file(coded_folder, monkeypatch, number):
    def write(path, blocks, *args):
        def write_half(file):
            file.write(b"half")
            os.kill(os.getpid(), number)
            time.sleep(10)

        writing.write_atomically(path, write_half)

    monkeypatch.setattr(files, "write_blocks", write)
    before = signal.signal(number, signal.SIG_DFL)  # nohup ignores SIGHUP
    try:
        with pytest.raises(SystemExit) as ended:
            main(["stream", "--input", "in.wav", "--output", "out.wav", "--checkpoint", CODEC])
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert ended.value.code == 128 + number
    assert not list(Path().glob(".incomplete*")) and not Path("out.wav").exists()


def test_an_interruption_inside_of_libsndfile_is_raised(tmp_path):
    """Raised in a callback from C, it would only be printed."""

    class InterruptionError(BaseException):
        """As KeyboardInterrupt, which would end the tests."""

    class Interrupted:
        def write(self, data):
            raise InterruptionError

    target = writing._Target(Interrupted())
    assert target.write(b"x") == 0
    with (
        pytest.raises(InterruptionError),
        writing._named_failures(tmp_path / "a.wav", target),
    ):
        pass


@pytest.mark.parametrize(
    "argv",
    [
        ["encode", "songs", "gs://b/x", "--checkpoint", CODEC],
        ["decode", "songs", "gs://b/x", "--checkpoint", CODEC],
        ["evaluate", "--dataset", "songs.jsonl", "--output", "gs://b/x", "--checkpoint", CODEC],
    ],
)
def test_outputs_in_buckets_are_refused(coded_folder, capsys, argv):
    Path("songs").mkdir()
    shutil.copy("in.wav", "songs/a.wav")
    shutil.copy("in.npz", "songs/a.npz")
    Path("songs.jsonl").write_text('{"path": "songs/a.wav"}\n')
    assert main(argv) == 2
    assert capsys.readouterr().err == "error: gs://b/x: must be on this machine\n"
    assert not Path("gs:").exists()


def test_a_full_standard_output_is_one_line(coded_folder):
    command = [sys.executable, "-m", "moss_tok", "info", "tiny"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True,
                              env=environment, check=False)  # fmt: skip
    assert (done.returncode, done.stderr) == (2, "error: No space left on device\n")


@pytest.mark.parametrize("training", [{"train_data": [{}]}, {"machine": "x"}, {"init_from": "x"}])
def test_a_training_json_of_something_else(coded_folder, capsys, training):
    shutil.copytree(CODEC, "other")
    Path("other/training.json").write_text(json.dumps(training))
    assert main(["info", "other"]) == 2
    assert "other/training.json: not as train.py writes it" in capsys.readouterr().err
