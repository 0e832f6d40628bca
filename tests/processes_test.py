"""Several processes on this machine train like one, through jax.distributed."""

import dataclasses
import signal
import socket
from pathlib import Path

import jax
import numpy as np
import pytest
from run_test import clips, config, finished, rows_without_timing, start, wait_for  # noqa: F401

import moss_tok
from moss_tok.codec import pretrained
from moss_tok.training import loop, writer

MESH = "data:2,fsdp:2"


def start_two(*configs):
    """Two processes of two devices each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"--coordinator_address=127.0.0.1:{probe.getsockname()[1]}"
    return [
        start(config, address, "--num_processes=2", f"--process_id={n}", num_devices=2)  # noqa: F811
        for n, config in enumerate(configs)  # noqa: F811
    ]


def finish(processes, code=0):
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [code, code], outputs
    return outputs


@pytest.fixture
def pretrain(config):  # noqa: F811
    """The first stage, which compiles faster."""
    return dataclasses.replace(config, stage="pretrain", mesh=MESH)


def test_two_processes_give_what_one_gives(pretrain, tmp_path):
    """Also when one goes on from what the two saved, and the other way round."""
    config = dataclasses.replace(pretrain, num_steps=6, checkpoint_every=3)  # noqa: F811
    loop.train(config)
    two = dataclasses.replace(config, workdir=str(tmp_path / "two"), num_steps=3)
    outputs = finish(start_two(two, two))
    assert "step 3/3" in outputs[0] and "step 3/3" not in outputs[1]
    loop.train(dataclasses.replace(two, num_steps=4, mesh="data:1"))
    outputs = finish(start_two(*[dataclasses.replace(two, num_steps=6, num_workers=1)] * 2))
    assert "going on from step 4" in outputs[0]
    for a, b in zip(*map(rows_without_timing, (config.workdir, two.workdir)), strict=True):
        assert a["step"] == b["step"]
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-6, err_msg=name)
    a, b = (moss_tok.load(c.workdir).params for c in (config, two))
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-3)


def test_a_signal_to_one_process_stops_all_at_one_step(pretrain):
    config = dataclasses.replace(pretrain, num_steps=100000, checkpoint_every=100000)  # noqa: F811
    processes = start_two(config, config)
    metrics = Path(config.workdir) / writer.METRICS
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    finish(processes, code=143)
    steps = pretrained.saved_steps(Path(config.workdir))
    assert len(steps) == 1 and rows_without_timing(config.workdir)[-1]["step"] == steps[0]


def test_a_workdir_that_is_not_shared_is_refused(pretrain, tmp_path):
    own = [dataclasses.replace(pretrain, workdir=str(tmp_path / f"own{n}")) for n in range(2)]
    processes = start_two(*own)
    for output in finish(processes, code=2):
        assert "must be a folder that all processes share" in output.strip().split("\n")[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_processes=2"], "num_processes 2 needs coordinator_address"),
        (["--num_processes=2", "--process_id=2"], "process_id must be 0..1, got 2"),
        (["--mesh=data:3,tensor:-1"], "mesh 'data:3,tensor:-1' does not fit"),
        (["--mesh=rows:2"], "mesh must be data:N,fsdp:N,tensor:N"),
    ],
)
def test_bad_flags(config, flags, message):  # noqa: F811
    output, _ = (process := start(dataclasses.replace(config, mesh="data:1"), *flags)).communicate()
    assert process.returncode == 2
    assert output.startswith("error: ") and message in output and output.count("\n") == 1
    assert not Path(config.workdir).exists()
