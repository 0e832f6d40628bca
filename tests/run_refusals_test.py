"""What a run refuses before it writes anything: settings, flags, flag files."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import PRETRAIN, ROOT, make_clips, small_run, train, train_py


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "huge"}, "model must be one of v1, v2, nano, tiny or a config.json"),
        ({"train_data": "/nowhere"}, "/nowhere: no such folder or manifest"),
        ({"eval_data": "/nowhere"}, "/nowhere: no such folder or manifest"),
        ({"segment_seconds": 0.05}, "segment_seconds must be at least 0.064"),
        ({"init_from": "/nowhere"}, "/nowhere: no such checkpoint directory"),
    ],
)
def test_nothing_is_written_where_a_setting_is_wrong(tmp_path, changes, message):
    config = small_run(PRETRAIN, make_clips(tmp_path), tmp_path, num_steps=1)
    with pytest.raises(ValueError, match=message):
        train(config | changes)
    assert not Path(config["workdir"]).exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rat=1"], "Unknown command line flag 'learning_rat'"),
        (["--num_steps=many"], "num_steps"),
        (["--num_steps=0"], "num_steps must be at least 1, got 0"),
        (["--flagfile=gone.flags"], "gone.flags"),
        (["--train_data=gone"], "gone: no such folder or manifest"),
        (["--train_data=a:1,b"], "give all sources a weight or none"),
        (["--dtype=float16"], "dtype must be one of float32, bfloat16, got 'float16'"),
        (["--learning_rate=nan"], "learning_rate must be a finite number, got nan"),
        (["--stage=gan"], "stage must be one of pretrain, adversarial, got 'gan'"),
        (["--trainable=decoder"], "trainable=decoder needs init_from"),
        (["--beta1=1"], "beta1 must be at least 0 and below 1, got 1.0"),
        (["--augment_loudness_db=-10:-20"], "augment_loudness_db must be LOW:HIGH"),
        (["--augment_noise_db=20"], "augment_noise_db must be LOW:HIGH"),
        (["--mel_windows=100"], "mel_windows must be one or more multiples of 32"),
        (
            ["--stage=adversarial", "--discriminator_windows=100"],
            "discriminator_windows must be multiples of 64",
        ),
        (["--workdir=/proc/nothing"], "/proc/nothing"),
        (["extra"], "unexpected argument 'extra'"),
    ],
)
def test_train_py_refuses_in_one_line(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    assert train_py(f"--workdir={tmp_path / 'run'}", *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_train_py_as_a_program(tmp_path):
    """Nothing that it imports prints anything before the error."""
    flags = [f"--workdir={tmp_path / 'run'}", "--train_data=gone"]
    argv = [sys.executable, str(ROOT / "train.py"), *flags]
    result = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_flag_files_are_valid(capsys):
    for path in sorted((ROOT / "experiments").glob("*.flags")):
        flags = ["--train_data=none", "--init_from=", "--trainable=all", "--model=none"]
        assert train_py(f"--flagfile={path}", *flags) == 2
        error = capsys.readouterr().err
        expected = "error: model must be one of"
        if path.name.startswith("tts"):
            expected = "error: the objective speech trains on codes"
        assert expected in error, (path, error)
