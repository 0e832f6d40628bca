"""Several processes on this machine train like one, through jax.distributed."""

import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    PRETRAIN,
    SECOND_STAGE,
    SHALLOW,
    as_flags,
    finish,
    free_port,
    make_clips,
    make_recipe,
    rows_without_timing,
    sgd_for_adam,
    slurm_environments,
    small_run,
    start,
    train,
    train_py,
    wait_for,
)
from jax.experimental.compilation_cache import compilation_cache

from moss_tok import checkpoint, sharding
from moss_tok.training import checkpoints, loop, writer
from moss_tok.training import state as states
from moss_tok.training.config import RunConfig

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
from moss_tok.training import optimizer
def plain_sgd(config, peak, decayed):  # Adam would make rounding errors large
    return optax.sgd(2e-5, momentum=0.8)
optimizer.adamw = plain_sgd
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start_two(*configs, python=()):
    """Two processes of two devices each, connected by flags."""
    address = f"--coordinator_address=127.0.0.1:{free_port()}"
    return [
        start(config, address, "--num_processes=2", f"--process_id={n}", num_devices=2,
              python=python)
        for n, config in enumerate(configs)
    ]  # fmt: skip


def start_two_by_slurm(*configs, python=()):
    """`start_two`, connected by what Slurm says."""
    return [
        start(config, num_devices=2, environment=environment, python=python)
        for config, environment in zip(configs, slurm_environments(), strict=True)
    ]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return make_clips(tmp_path_factory.mktemp("clips"), [1.0, 0.7, 0.1, 2.0, 0.6, 1.2])


@pytest.fixture
def pretrain(clips, tmp_path):
    """A short run of the first stage, which compiles faster."""
    return small_run(PRETRAIN, clips, tmp_path, num_eval_clips=1)


@pytest.fixture(scope="module", autouse=True)
def sgd():
    with sgd_for_adam():
        yield


@pytest.fixture(scope="module")
def four_steps(clips, tmp_path_factory):
    """A run of the second stage: one step in this process, three in two processes.

    Also what the two printed. Each of them holds every other row of a batch.
    """
    folder = tmp_path_factory.mktemp("four_steps")
    config = small_run(SECOND_STAGE, clips, folder, num_eval_clips=0)
    assert train(config | dict(num_steps=1))
    two = config | dict(num_steps=4, mesh=MESH, num_workers=1)
    return config, finish(start_two(two, two, python=("-c", INTERLEAVED)))


@pytest.fixture
def halfway(four_steps, tmp_path):
    """The same with a copy of the workdir."""
    config, _ = four_steps
    workdir = shutil.copytree(config["workdir"], tmp_path / "copy")
    return config | dict(workdir=str(workdir))


def test_two_processes_give_what_one_gives(four_steps, halfway, tmp_path):
    """They go on from what one process saved, and one from what they saved; the second stage."""
    _, outputs = four_steps
    assert "resuming from step 1" in outputs[0]
    assert "step 4/4" in outputs[0] and "step 4/4" not in outputs[1]
    config, parts = halfway | dict(workdir=str(tmp_path / "whole")), halfway
    for run in (config, parts):
        assert train(run | dict(num_steps=5))
    for a, b in zip(*map(rows_without_timing, (config["workdir"], parts["workdir"])), strict=True):
        assert a["step"] == b["step"]
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-6, err_msg=name)
    recipe = make_recipe(config, SHALLOW)
    like = states.state_shapes(recipe, sharding.make_mesh("data:1"))
    found = []
    for run in (config, parts):
        saver = checkpoints.Checkpoints(Path(run["workdir"]), RunConfig(), recipe.objective, {})
        found.append(saver.restore_latest(like, print))
    for part in (lambda s: s.params, lambda s: s.extra["discriminators"]):
        trees = [part(state) for state in found]
        for x, y in zip(*map(jax.tree.leaves, trees), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)
    momenta = [(state.opt_state, state.extra["discriminator_opt_state"]) for state in found]
    difference = optax.tree.norm(optax.tree.sub(*momenta))
    assert difference <= 1e-5 * optax.tree.norm(momenta[0])


def test_a_signal_to_one_process_stops_all_at_one_step(halfway):
    """Of the same run as above, whose program is compiled already."""
    config = halfway | dict(mesh=MESH, num_steps=100000, checkpoint_every=100000)
    processes = start_two_by_slurm(config, config, python=("-c", INTERLEAVED))
    metrics = Path(config["workdir"]) / writer.METRICS
    wait_for(lambda: metrics.read_text().count("\n") >= 7, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    finish(processes, code=143)
    steps = checkpoint.saved_steps(Path(config["workdir"]))
    new_steps = [step for step in steps if step > 4]
    assert len(new_steps) == 1
    assert rows_without_timing(config["workdir"])[-1]["step"] == new_steps[0]


def test_a_workdir_that_is_not_shared_is_refused(pretrain, tmp_path):
    own = [pretrain | dict(mesh=MESH, workdir=str(tmp_path / f"own{n}")) for n in range(2)]
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
            "mesh 'data:3,tensor:-1' needs a multiple of 3 devices, there are 8",
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
def test_bad_flags(pretrain, capsys, flags, message):
    assert train_py(*as_flags(pretrain), *flags) == 2
    output = "".join(capsys.readouterr())
    assert output.startswith("error: ") and message in output and output.count("\n") == 1
    assert not Path(pretrain["workdir"]).exists()


@pytest.fixture
def other_cache():
    """Nothing is compiled yet; after the test, the cache of the tests is in use again."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    values = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[1], 0)
    compilation_cache.reset_cache()
    yield
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.usefixtures("other_cache")
def test_the_next_start_takes_programs_from_the_cache(pretrain, monkeypatch, tmp_path):
    def compile_something(*_):
        jax.jit(lambda x: 3 * jnp.sin(x))(np.ones(7, np.float32))  # each time a new function
        return True

    monkeypatch.setattr(loop, "train", compile_something)
    events = []

    def note(event, **_):
        events.append(event)

    jax.monitoring.register_event_listener(note)
    try:
        for hits in (0, 1):
            events.clear()
            assert not train_py(*as_flags(pretrain), f"--compilation_cache_dir={tmp_path}/cache")
            assert events.count("/jax/compilation_cache/cache_hits") == hits
            assert any((tmp_path / "cache").iterdir())
    finally:
        jax.monitoring.unregister_event_listener(note)
