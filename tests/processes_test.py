"""Several processes on this machine train like one, through jax.distributed."""

import dataclasses
import os
import signal
import socket
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from run_test import clips, rows_without_timing, small_run, start, wait_for  # noqa: F401
from training_test import ADVERSARIAL, CODEC, CONFIG

from moss_tok import checkpoint, sharding
from moss_tok.training import checkpoints, loop, writer
from moss_tok.training import state as states

MESH = "data:2,fsdp:2"
# As on the torus of a TPU slice, where a process's devices do not lie side by side in the mesh.
INTERLEAVED = """
import jax, numpy, runpy, sys
def make_mesh(shape, names, *, devices, **options):
    devices = numpy.array(devices)[[0, 2, 1, 3]].reshape(shape)
    return jax.sharding.Mesh(devices, names, **options)
jax.make_mesh = make_mesh
sys.argv.pop(0)
import optax
from moss_tok import checkpoint
from moss_tok.training import state
state._adamw = lambda config, peak: optax.sgd(2e-5, momentum=0.8)  # Adam would blow up rounding
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def free_port(first=0):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", first))
        return probe.getsockname()[1]


def start_two(*configs, python=()):
    """Two processes of two devices each, connected by flags."""
    address = f"--coordinator_address=127.0.0.1:{free_port()}"
    return [
        start(config, address, "--num_processes=2", f"--process_id={n}", num_devices=2,
              python=python)
        for n, config in enumerate(configs)
    ]  # fmt: skip


def slurm_environments():
    """What Slurm says to each of two processes; jax takes its port from the job's number."""
    port = free_port(61_440 + os.getpid() % 4096)
    common = {"SLURM_JOB_ID": str(port - 61_440), "SLURM_STEP_NODELIST": "127.0.0.1",
              "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "1"}  # fmt: skip
    return [common | {"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)} for n in range(2)]


def start_two_by_slurm(*configs):
    """`start_two`, connected by what Slurm says."""
    return [
        start(config, num_devices=2, environment=environment)
        for config, environment in zip(configs, slurm_environments(), strict=True)
    ]


def finish(processes, code=0):
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), outputs
    return outputs


@pytest.fixture
def pretrain(clips, tmp_path):  # noqa: F811
    """A short run of the first stage, which compiles faster."""
    return small_run(CONFIG, clips, tmp_path, num_eval_clips=1)


def test_two_processes_give_what_one_gives(clips, tmp_path, monkeypatch):  # noqa: F811
    """They go on from what one process saved, and one from what they saved; the second stage.

    Each holds every other row of a batch.
    """
    monkeypatch.setattr(states, "_adamw", lambda config, peak: optax.sgd(2e-5, momentum=0.8))
    config = small_run(ADVERSARIAL, clips, tmp_path, num_eval_clips=0)
    loop.train(dataclasses.replace(config, num_steps=5))
    parts = dataclasses.replace(config, workdir=str(tmp_path / "parts"))
    loop.train(dataclasses.replace(parts, num_steps=1))
    two = dataclasses.replace(parts, num_steps=4, mesh=MESH, num_workers=1)
    outputs = finish(start_two(two, two, python=("-c", INTERLEAVED)))
    assert "going on from step 1" in outputs[0]
    assert "step 4/4" in outputs[0] and "step 4/4" not in outputs[1]
    loop.train(dataclasses.replace(parts, num_steps=5))
    for a, b in zip(*map(rows_without_timing, (config.workdir, parts.workdir)), strict=True):
        assert a["step"] == b["step"]
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-6, err_msg=name)
    like = states.state_shapes(config, CODEC, sharding.make_mesh("data:1"))
    found = [
        checkpoints.Checkpoints(Path(c.workdir), CODEC, c).restore_latest(like, print)
        for c in (config, parts)
    ]
    for name in ("params", "discriminators"):
        trees = [getattr(state, name) for state in found]
        for x, y in zip(*map(jax.tree.leaves, trees), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)
    momenta = [(state.opt_state, state.discriminator_opt_state) for state in found]
    difference = optax.tree.norm(optax.tree.sub(*momenta))
    assert difference <= 1e-5 * optax.tree.norm(momenta[0])


def test_a_signal_to_one_process_stops_all_at_one_step(pretrain):
    config = dataclasses.replace(pretrain, mesh=MESH, num_steps=100000, checkpoint_every=100000)
    processes = start_two_by_slurm(config, config)
    metrics = Path(config.workdir) / writer.METRICS
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    finish(processes, code=143)
    steps = checkpoint.saved_steps(Path(config.workdir))
    assert len(steps) == 1 and rows_without_timing(config.workdir)[-1]["step"] == steps[0]


def test_a_workdir_that_is_not_shared_is_refused(pretrain, tmp_path):
    own = [
        dataclasses.replace(pretrain, mesh=MESH, workdir=str(tmp_path / f"own{n}"))
        for n in range(2)
    ]
    processes = start_two(*own)
    for output in finish(processes, code=2):
        assert "must be a folder that all processes share" in output.strip().split("\n")[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_processes=2"], "num_processes 2 needs coordinator_address"),
        (["--num_processes=2", "--process_id=2"], "process_id must be 0..1, got 2"),
        (
            ["--mesh=data:3,tensor:-1"],
            "mesh 'data:3,tensor:-1' needs a multiple of 3 devices, there are 1",
        ),
        (
            ["--num_processes=2", "--coordinator_address=host"],
            "coordinator_address must be HOST:PORT, got 'host'",
        ),
        (["--mesh=rows:2"], "mesh must be data:N,fsdp:N,tensor:N"),
        (["--workdir=gs:/bucket/run"], "gs:/bucket/run: must be a path, or an address"),
        (["--compilation_cache_dir=s3://b/x"], "s3://b/x: must be a path, or an address"),
    ],
)
def test_bad_flags(pretrain, flags, message):
    output, _ = (process := start(pretrain, *flags)).communicate()
    assert process.returncode == 2
    assert output.startswith("error: ") and message in output and output.count("\n") == 1
    assert not Path(pretrain.workdir).exists()
