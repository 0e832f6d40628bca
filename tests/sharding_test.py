"""Every logical axis has a rule, and parameters land on the mesh as the rules say."""

import dataclasses
import functools
import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax
import pytest
from flax import linen as nn
from helpers import (
    ADVERSARIAL,
    CODEC,
    LANGUAGE,
    PRETRAIN,
    SEMANTIC,
    SHALLOW,
    init_state,
    make_recipe,
    random_batch,
    text_batch,
)

import moss_tok
from moss_tok import sharding
from moss_tok.codec import pretrained
from moss_tok.language import pretrained as language_models
from moss_tok.nn.compute import ComputeConfig
from moss_tok.objectives.config import DiscriminatorSettings
from moss_tok.objectives.discriminators import Discriminators
from moss_tok.training import checkpoints
from moss_tok.training import state as states
from moss_tok.training import step as steps
from moss_tok.training.config import RunConfig
from moss_tok.training.step import sharded_train_step


def boxed_discriminators():
    model = Discriminators(DiscriminatorSettings())
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1, 4096)))["params"]


@pytest.mark.parametrize("name", ["v1", "nano", "tiny", "discriminators", "language"])
def test_every_logical_name_has_a_rule(name):
    if name == "discriminators":
        boxed = boxed_discriminators()
    elif name == "language":
        boxed = language_models.boxed_shapes(LANGUAGE)
    else:
        boxed = pretrained.boxed_shapes(moss_tok.preset(name))
    boxes = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    assert all(isinstance(box, nn.LogicallyPartitioned) for box in boxes)
    names = {axis for box in boxes for axis in box.names if axis is not None}
    assert names <= {rule[0] for rule in sharding.RULES}
    for box in boxes:
        assert len(box.names) == box.value.ndim


@pytest.mark.parametrize(
    ("text", "attention"),
    [
        ("data:8", "auto"),
        ("data:2,fsdp:4", "auto"),
        ("data:2,fsdp:2,tensor:2", "auto"),
        ("data:2,fsdp:2,tensor:2", "splash"),
    ],
)
def test_a_mesh_gives_the_same_codes_and_audio(micro, rng, text, attention):
    mesh = sharding.make_mesh(text)
    boxed = pretrained.boxed_shapes(micro.config)
    shardings = sharding.param_shardings(boxed, mesh)
    params = jax.tree.map(jax.device_put, micro.params, shardings)
    kernel = params["encoder"]["stage_1"]["layers"]["mlp"]["up"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    batch = sharding.batch_sharding(mesh)
    wav = 0.1 * rng.standard_normal((8, 1, 999), np.float32)
    codec = micro.replace(params=params, compute=ComputeConfig(attention=attention))
    expected = moss_tok.encode(micro, wav).codes
    with jax.set_mesh(mesh):
        codes = moss_tok.encode(codec, jax.device_put(wav, batch)).codes
        decoded = moss_tok.decode(codec, jax.device_put(np.asarray(expected), batch)).wav
    np.testing.assert_array_equal(codes, expected)
    for found in (codes, decoded):
        assert found.sharding.is_equivalent_to(batch, 3), found.sharding
    np.testing.assert_allclose(decoded, moss_tok.decode(micro, expected).wav, atol=1e-5)


@pytest.mark.usefixtures("sgd")
@pytest.mark.parametrize(
    ("flags", "codec", "language", "meshes"),
    [
        (
            SEMANTIC | {"language_mask": 0.5, "mel_windows": "64"},
            SHALLOW,
            LANGUAGE,
            ("data:8", "data:2,fsdp:4", "data:2,fsdp:2,tensor:2"),
        ),
        (ADVERSARIAL, CODEC, None, ("data:2,fsdp:2,tensor:2",)),
    ],
    ids=["semantic", "adversarial"],
)
def test_meshes_train_like_one_device(flags, codec, language, meshes):
    """Losses, counts and parameters of 3 steps of SGD, and the first gradients.

    SGD accumulates the gradients first. Adam would make rounding errors of small gradients as large
    as the gradients. With the language model, a mesh computes two microbatches and one device all
    at once.
    """
    recipe = make_recipe(flags | {"batch_size": 8}, codec, language)
    fresh = jax.device_get(init_state(recipe))

    def train(recipe, text):
        mesh = sharding.make_mesh(text)
        shapes = states.state_shapes(recipe, mesh)
        shardings = jax.tree.map(lambda x: x.sharding, shapes)
        state = jax.device_put(fresh, shardings)
        step = sharded_train_step(recipe, shapes, 8)
        begun = (fresh.params, fresh.extra.get("discriminators"))
        rows, first = [], None
        for seed in range(3):
            # In these no vector is so near to two codes that rounding decides.
            batch = text_batch(seed, 8) if language else random_batch(10 + seed, 8)
            batch = jax.tree.map(np.asarray, batch)
            state, metrics = step(state, sharding.global_batch(mesh, 8, batch))
            rows.append({k: float(v) for k, v in metrics.items()})
            opt_states = (state.opt_state, state.extra.get("discriminator_opt_state"))
            first = jax.device_get(opt_states) if first is None else first
        assert jax.tree.map(lambda x: x.sharding, state) == shardings
        gradients = [x for _, x in optax.tree.get_all_with_path(first, "trace")]
        gradients = [tree for tree in gradients if jax.tree.leaves(tree)]
        params = jax.device_get((state.params, state.extra.get("discriminators")))
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), params, begun)
        assert all(max(jax.tree.leaves(tree)) > 1e-4 for tree in moved if tree is not None)
        return rows, gradients, params, jax.device_get((state.extra["code_counts"], state.totals))

    rows, gradients, params, counts = train(recipe, "data:1")
    # Convolutions in a loop are slow on CPUs: the discriminators get all at once.
    in_parts = dataclasses.replace(recipe, num_microbatches=2 if language else 1)
    for text in meshes:
        results = train(in_parts, text)
        mesh_rows, mesh_gradients, mesh_params, mesh_counts = results
        for expected, row in zip(rows, mesh_rows, strict=True):
            for name in (name for name in expected if name.endswith("loss")):
                assert row[name] == pytest.approx(expected[name], rel=1e-4), (text, name)
        assert len(gradients) == 3  # codebooks, the rest, language model or discriminators
        for expected, got in zip(gradients, mesh_gradients, strict=True):
            difference = optax.tree.norm(optax.tree.sub(got, expected))
            assert 0 < optax.tree.norm(expected), text
            assert difference <= 1e-5 * optax.tree.norm(expected), text
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, mesh_params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3), counts, mesh_counts)


def test_moments_are_split_like_their_parameters():
    mesh = sharding.make_mesh("fsdp:4,tensor:2")
    shapes = states.state_shapes(make_recipe(ADVERSARIAL), mesh)
    found = jax.tree_util.tree_leaves_with_path(shapes)
    kernels = [x.sharding.spec for path, x in found if path[-1] == jax.tree_util.DictKey("up")]
    # Two stages on each side; parameters, average, two moments.
    assert kernels == [jax.sharding.PartitionSpec(None, "fsdp", "tensor")] * 4 * 4
    wide = [
        x.sharding.spec
        for path, x in found
        if "period_3" in jax.tree_util.keystr(path) and x.ndim == 3 and x.shape[-1] % 4 == 0
    ]
    # Four layers wide enough to be split; parameters, two moments.
    assert wide == [jax.sharding.PartitionSpec(None, None, "fsdp")] * 4 * 3


@pytest.mark.parametrize(
    ("head_dim", "spec"), [(8, (None, "tensor", "fsdp", None)), (6, (None, "tensor", None, "fsdp"))]
)
def test_the_width_is_split_where_the_head_size_does_not_divide(head_dim, spec):
    names, mesh = ("layers", "heads", "head_dim", "embed"), sharding.make_mesh("fsdp:4,tensor:2")
    found = sharding.fitting(mesh, names, (3, 2, head_dim, 12))
    assert found.spec == jax.sharding.PartitionSpec(*spec)


@pytest.mark.parametrize(
    ("kind", "axis"),
    [
        ("TPU v4", "embed"),
        ("TPU v5 lite", "embed"),
        ("TPU v5", "head_dim"),
        ("TPU v6 lite", "head_dim"),
        ("NVIDIA H200", "head_dim"),
        ("cpu", "head_dim"),
    ],
)
def test_what_fsdp_splits_depends_on_the_chip(kind, axis):
    rules = sharding.rules_of(kind)
    assert set(rules) == set(sharding.RULES)
    for names in (("embed", "qkv", "heads", "head_dim"), ("heads", "head_dim", "embed")):
        spec = nn.logical_to_mesh_axes(names, rules)
        assert names[spec.index("fsdp")] == axis


@pytest.mark.usefixtures("sgd")
def test_the_split_of_v5e_trains_like_others(monkeypatch, tmp_path):
    """Both take the same steps from one checkpoint, which was saved with the split of others."""
    recipe = make_recipe(PRETRAIN | {"batch_size": 8}, SHALLOW)
    mesh = sharding.make_mesh("data:2,fsdp:4")
    batch = sharding.global_batch(mesh, 8, jax.tree.map(np.asarray, random_batch(10, 8)))
    results = []
    with checkpoints.Checkpoints(tmp_path, RunConfig(), recipe.objective, {}) as saver:
        for kinds in ((), ("cpu",)):
            monkeypatch.setattr(sharding, "_WITHOUT_SPARSE_CORES", kinds)
            shapes = states.state_shapes(recipe, mesh)
            if not kinds:
                shardings = jax.tree.map(lambda x: x.sharding, shapes)
                saver.save(jax.device_put(init_state(recipe), shardings))
                saver.wait()
            state = saver.restore_latest(shapes, print)
            specs = jax.tree.map(lambda x: x.sharding.spec, state.params)
            step = sharded_train_step(recipe, shapes, 8)
            losses = []
            for _ in range(3):
                state, metrics = step(state, batch)
                losses.append(float(metrics["loss"]))
            results.append((specs, losses, jax.device_get(state.params)))
    (specs, losses, params), (other_specs, other_losses, other_params) = results
    assert specs != other_specs
    assert losses[0] != losses[2]
    assert other_losses == pytest.approx(losses, rel=1e-5)
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(other_params), strict=True):
        np.testing.assert_allclose(y, x, rtol=0, atol=1e-5)


def test_a_large_parameter_must_not_be_replicated(monkeypatch):
    monkeypatch.setattr(sharding, "LARGE", 500)
    boxed = pretrained.boxed_shapes(CODEC)
    sharding.param_shardings(boxed, sharding.make_mesh("data:8"))
    sharding.param_shardings(boxed, sharding.make_mesh("fsdp:8"))
    with pytest.raises(ValueError, match=r"attention\.qkv .*would be replicated"):
        sharding.param_shardings(boxed, sharding.make_mesh("fsdp:7"))
    with pytest.raises(ValueError, match="would be replicated along fsdp"):  # heads are split
        sharding.param_shardings(boxed, sharding.make_mesh("fsdp:3,tensor:2"))


@pytest.mark.parametrize(
    ("device", "vendor", "libtpu", "expected"),
    [
        ("vfio/0", "0x1ae0", True, True),
        ("accel0", "0x1ae0", True, True),
        ("vfio/0", "0x10de", True, False),  # a GPU passed through
        ("vfio/0", "0x1ae0", False, False),
        ("vfio/vfio", "0x1ae0", True, False),  # no chip; Google's network card
    ],
)
def test_a_cloud_tpu_vm_is_told_from_others(
    tmp_path, monkeypatch, device, vendor, libtpu, expected
):
    for name, text in ((f"dev/{device}", ""), ("sys/bus/pci/devices/0/vendor", f"{vendor}\n")):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sharding, "Path", lambda path: tmp_path / path[1:])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: libtpu or None)
    for name in (
        "JAX_PLATFORMS", "SLURM_STEP_NODELIST", "TPU_LIBRARY_PATH", "TPU_WORKER_HOSTNAMES"
    ):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    assert sharding._in_cluster() == expected


def test_rows_of_a_process_and_batches_that_do_not_fit():
    mesh = sharding.make_mesh("data:2,fsdp:2,tensor:2")
    assert sharding.local_rows(mesh, 12) == list(range(12))
    with pytest.raises(ValueError, match="batch_size 6 must be a multiple of 4"):
        sharding.check_batch_size(mesh, 6)


@pytest.mark.parametrize(("batch_size", "asked", "found"), [(8, 4, 2), (24, 4, 6), (24, 2, 2)])
def test_microbatches_are_split_over_the_mesh(batch_size, asked, found):
    """Else every device would compute all of a microbatch."""
    flags = ADVERSARIAL | dict(batch_size=batch_size, num_microbatches=asked)
    recipe = make_recipe(flags)
    mesh = sharding.make_mesh("data:2,fsdp:2,tensor:2")
    fitted = steps.fit_microbatches(recipe, mesh, batch_size)
    assert fitted == dataclasses.replace(recipe, num_microbatches=found)


@pytest.mark.parametrize(("version", "is_safe"), [("0.11.0", True), ("0.11.2", False)])
def test_ffts_do_not_wait_for_each_other(monkeypatch, version, is_safe):
    """With jaxlib 0.11.1 and 0.11.2, this program hangs on CPUs without the options."""
    monkeypatch.setattr(jaxlib, "__version__", version)
    options = sharding.compiler_options(sharding.make_mesh("data:1"))
    assert options == ({} if is_safe else {"xla_cpu_multi_thread_eigen": False})
    if not is_safe:

        @functools.partial(jax.jit, compiler_options=options)
        def ffts(x):
            rows = [jnp.sin(x + i).reshape(-1, 2**i) for i in range(5, 12)]
            return [jnp.abs(jnp.fft.rfft(row)).sum() for row in rows]

        for _ in range(10):
            jax.block_until_ready(ffts(jnp.ones(2**18)))


def test_an_unknown_flag_of_xla_is_reported():
    """XLA ends the process; pytest would keep the message to itself."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "--collect-only", __file__]
    environment = os.environ | {"XLA_FLAGS": "--xla_unknown=1"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode != 0
    assert "Unknown flag in XLA_FLAGS: --xla_unknown=1" in found.stderr


@pytest.mark.parametrize("address", ["host", ":1", "host:", "host:0", "host:65536", "host:x"])
def test_bad_addresses(address):
    with pytest.raises(ValueError, match="coordinator_address must be HOST:PORT, got"):
        sharding.connect(address, 2, 1)


def test_processes_that_do_not_find_each_other(monkeypatch):
    def initialize(**settings):
        raise RuntimeError(f"DEADLINE_EXCEEDED {sorted(settings)}")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ValueError, match="did not find each other: DEADLINE.*num_processes"):
        sharding.connect("127.0.0.1:1", 2, 1)
