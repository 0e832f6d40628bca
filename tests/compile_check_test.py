"""What a program costs, read from its HLO, against counting by hand."""

import itertools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tpu_scripts"))
import hlo  # noqa: E402


def analyse(function, *shapes):
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return hlo.analyse(jax.jit(function).lower(*shapes).compile().as_text())


def test_loops_count_as_often_as_they_run():
    def scanned(x, ws):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

    def twice(x, ws):
        return jax.lax.fori_loop(0, 3, lambda _, x: scanned(x, ws), x)

    assert analyse(scanned, (32, 64), (7, 64, 64)).flops == 7 * 2 * 32 * 64 * 64
    assert analyse(twice, (32, 64), (7, 64, 64)).flops == 3 * 7 * 2 * 32 * 64 * 64


def test_both_passes_of_a_loop_equal_those_without():
    def loss(ws, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0].sum()

    def unrolled(ws, x):
        for w in ws:
            x = jnp.tanh(x @ w)
        return x.sum()

    shapes = ((5, 64, 64), (32, 64))
    # The first layer needs no gradient in x; a loop does not know.
    extra = 2 * 32 * 64 * 64
    assert (
        analyse(jax.grad(loss), *shapes).flops == analyse(jax.grad(unrolled), *shapes).flops + extra
    )


@pytest.mark.parametrize(
    ("kernel", "stride", "low", "base", "dilation"),
    list(itertools.product((1, 3, 24), (1, 2, 23), (0, 2), (1, 3, 24), (1, 2))),
)
def test_taps_of_a_convolution(kernel, stride, low, base, dilation):
    size, outputs = 7, 11
    expected = sum(
        0 <= o * stride + t * dilation - low <= base * (size - 1)
        and (o * stride + t * dilation - low) % base == 0
        for o in range(outputs)
        for t in range(kernel)
    )
    window = {"size": str(kernel), "stride": str(stride), "pad": f"{low}_0",
              "lhs_dilate": str(base), "rhs_dilate": str(dilation)}  # fmt: skip
    assert hlo._taps(window, 0, size, outputs) == expected


@pytest.mark.parametrize(
    ("dtype", "dims", "layout", "expected"),
    [
        ("f32", (10,), "0", 40),
        ("bf16", (24, 4, 60), "2,1,0:T(8,128)(2,1)", 24 * 8 * 128 * 2),
        ("f32", (5, 100, 3), "1,2,0:T(8,128)S(1)", 5 * 128 * 8 * 4),
        ("pred", (), "", 1),
    ],
)
def test_bytes_are_those_of_whole_tiles(dtype, dims, layout, expected):
    array = hlo.Array(dtype, dims, layout)
    assert array.num_bytes == expected and array.in_hbm == ("S(" not in layout)


def test_collectives_of_a_mesh():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", "b"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=split)
    compiled = jax.jit(lambda x: x.sum(1), out_shardings=whole).lower(x).compile()
    found = {c.opcode: c for c in hlo.analyse(compiled.as_text()).collectives}
    summed = found["all-reduce"]
    assert summed.group_size in (4, 8) and summed.times == 1 and not summed.is_async


def check(*flags):
    script = [sys.executable, str(ROOT / "tpu_scripts" / "compile_check.py")]
    return subprocess.run([*script, *flags], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology=v3:2x2"], "topology must be one of v4, v5e, v5p, v6e"),
        (["--precision=low"], "precision must be one of highest, high, bfloat16, got 'low'"),
        (["--functions=train"], "functions must be one of train_step, encode, decode"),
        (["--batch_size=x"], "batch_size"),
    ],
)
def test_bad_flags(flags, message):
    done = check(*flags)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_nano_on_a_v5e_host():
    pytest.importorskip("libtpu")
    done = check("--flagfile=experiments/nano_pretrain.flags", "--topology=v5e:2x2")
    assert done.returncode == 0, done.stderr
    assert "train_step" in done.stdout and "DOES NOT FIT" not in done.stdout
