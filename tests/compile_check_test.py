"""What a program costs, read from its HLO, against counting by hand."""

import dataclasses
import functools
import importlib.util
import itertools
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from moss_tok.codec import transformer
from moss_tok.codec.config import TransformerConfig
from moss_tok.codec.presets import load_codec_config
from moss_tok.language.config import LanguageConfig
from moss_tok.nn import kernels
from moss_tok.nn.compute import ComputeConfig

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tpu_scripts"))
import compile_check  # noqa: E402
import estimates  # noqa: E402
import hlo  # noqa: E402
import hlo_costs  # noqa: E402
import hlo_text  # noqa: E402


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


def test_both_passes_of_a_stage_count_what_xla_counts_unrolled():
    """Three layers in a scan; and one after the other, which XLA's own count can see."""
    one = TransformerConfig(
        256, 256, 256, 2, 1, 1024, 96, input_projection=False, output_projection=False
    )
    three = dataclasses.replace(one, num_layers=3)
    compute = ComputeConfig(precision="default", attention="dense")
    x = jnp.zeros((1, 96, 256))
    stage, layer = transformer.Stage(three, compute, 96), transformer.Stage(one, compute, 96)

    def scanned(params, x):
        return (stage.apply(params, x)[0] ** 2).sum()

    def unrolled(params, x):
        for p in params:
            x = layer.apply(p, x)[0]
        return (x**2).sum()

    both = functools.partial(jax.grad, argnums=(0, 1))
    found = jax.jit(both(scanned)).lower(stage.init(jax.random.key(0), x), x).compile()
    expected = jax.jit(both(unrolled)).lower([layer.init(jax.random.key(0), x)] * 3, x).compile()
    counted = hlo.analyse(found.as_text()).flops
    assert counted == hlo.analyse(expected.as_text()).flops
    assert counted == pytest.approx(expected.cost_analysis()["flops"], rel=0.05)


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
    assert hlo_costs.taps(window, 0, size, outputs) == expected


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
    array = hlo_text.Array(dtype, dims, layout)
    assert array.num_bytes == expected and array.in_hbm == ("S(" not in layout)


def test_collectives_of_a_mesh():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", "b"))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a"))
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=split)
    compiled = jax.jit(lambda x: x.sum(1), out_shardings=rows).lower(x).compile()
    (summed,) = hlo.analyse(compiled.as_text()).collectives
    assert summed.opcode == "all-reduce" and summed.group_size == 4 and summed.stride == 1
    assert summed.times == 1 and not summed.is_async
    assert summed.num_bytes == 8 * 4 * 2 * 3 / 4  # eight rows, each sent 2 (n - 1) / n times


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,4},{1,5}}, dimensions={0}", [0, 4]),
        ("replica_groups=[2,4]<=[8], dimensions={0}", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','b'}, x", [0, 2, 4, 6]),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}, x", [0, 2, 4, 6]),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}, x", [0, 1]),
        ("source_target_pairs={{0,1},{1,2}}", [0, 1]),
    ],
)
def test_chips_of_a_transfer(text, group):
    assert hlo_costs.first_group(text) == group


@pytest.mark.parametrize("sizes", [(1, 8), (8, 1)])
def test_weak_scaling_needs_both_axes(sizes):
    mesh = jax.make_mesh((*sizes, 1), ("data", "fsdp", "tensor"))
    with pytest.raises(ValueError, match="scaling needs a mesh of data and fsdp above 1"):
        estimates.check_scaling(mesh)
    mesh = jax.make_mesh((2, 3, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[:6])
    with pytest.raises(ValueError, match="a power of two for fsdp, got 3"):
        estimates.check_scaling(mesh)


def test_what_hides_a_transfer_may_be_too_short():
    gather = hlo_costs.Collective("all-gather", "", 50e9, 2, 2, 1, True, "0", 98.5e12, 0)
    costs = hlo.Costs(collectives=[gather, dataclasses.replace(gather, flops_beside=394e12)])
    estimate = estimates.Estimate(estimates.CHIPS["v5e"], 50e9, 4, costs, 1)
    assert (estimate.links, estimate.short) == (0, 0.5)  # 1 s each, beside 0.5 and 2 s


def test_weak_scaling_grows_the_data_axis(capsys):
    """A gather over fsdp, the same at any number of chips; a sum over data, which grows with it."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))
    gather = hlo_costs.Collective("all-gather", "", 50e9, 2, 2, 1, False)
    summed = hlo_costs.Collective("all-reduce", "", 100e9, 2, 4, 1, False)
    costs = hlo.Costs(197e12, 0, [gather, summed])
    estimate = estimates.Estimate(estimates.CHIPS["v5e"], 0, 8, costs, 8 * 197e12)
    estimates.show_scaling(estimate, mesh, 3, 2_000_000_000, 7_000_000_000)
    rows = [row.split(" | ") for row in capsys.readouterr().out.splitlines()[2:]]
    # Below 256 chips there are lines, which send half.
    assert [float(row[3]) for row in rows[:2]] == [1 + 2 * 0.5, 1 + 2 * (0.5 + 1.5)]
    assert float(rows[3][3]) == pytest.approx(1 + 0.5 + 2 * 63 / 64, abs=1e-3)
    assert {row[2] for row in rows} == {"7"}
    assert [int(row[1]) for row in rows] == [3 * 4**n for n in range(1, 7)]


def test_fewer_chips_hold_more_parameters(capsys):
    costs = hlo.Costs(197e12, 0, [])
    estimate = estimates.Estimate(estimates.CHIPS["v5e"], 0, 16, costs, 8 * 197e12)
    mesh = jax.sharding.AbstractMesh((1, 16, 1), ("data", "fsdp", "tensor"))
    estimates.show_scaling(estimate, mesh, 3, 2_000_000_000, 7_000_000_000)
    rows = [row.split(" | ") for row in capsys.readouterr().out.splitlines()[2:]]
    assert [row[2] for row in rows[:3]] == ["13", "7", "7"]


@pytest.mark.parametrize(
    ("kind", "sizes", "rate"),
    [
        ("v5p", (4, 4, 4), 200e9),
        ("v5p", (2, 4, 4), 100e9),
        ("v4", (2, 2, 1), 50e9),
        ("v5e", (16, 16), 100e9),
        ("v6e", (8, 16), 100e9),
    ],
)
def test_short_axes_are_no_rings(kind, sizes, rate):
    assert estimates.CHIPS[kind].link_rate(sizes) == rate


def test_lines_that_go_on_and_slices_inside_fusions():
    text = """\
%part (p: f32[100,128], i: s32[]) -> f32[1,128] {
  %p = f32[100,128]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %row = f32[1,128]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,128}
}

ENTRY %main (x: f32[100,128], n: s32[]) -> f32[1,128] {
  %x = f32[100,128]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %k = f32[8,128]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={op_name="a
b"}
  ROOT %f = f32[1,128]{1,0} fusion(%x, %n), kind=kLoop, calls=%part
}
"""
    costs = hlo.analyse(text)
    assert costs.kernels == {"ab": 1}
    assert costs.hbm_bytes == 128 * 4 + 128 * 4 + 4  # the row read and written, and its number


@pytest.mark.parametrize(
    ("start", "done"),
    [("call-start(%x), to_apply=%beside", "call"), ("async-start(%x), calls=%started", "async")],
)
def test_what_another_core_does_counts(start, done):
    """A computation of the SparseCore ends with the name of its thread; XLA's dump wraps it."""
    text = f"""\
%beside (p: f32[8,128]) -> f32[8,128] {{
  %p = f32[8,128]{{1,0}} parameter(0)
  ROOT %n = f32[8,128]{{1,0}} negate(%p)
}}, execution_thread="sparsecore"

%started (p: f32[8,128]) -> f32[8,128] {{
  %p = f32[8,128]{{1,0}} parameter(0)
  ROOT %c = f32[8,128]{{1,0}} call(%p), to_apply=%beside
}}, execution_thread="sparsecore"

ENTRY %main (x: f32[8,128]) -> f32[8,128] {{
  %x = f32[8,128]{{1,0}} parameter(0)
  %s = ((f32[8,128]{{1,0}}), f32[8,128]{{1,0}}) {start}, async_execution_thread="sparsecore"
  ROOT %d = f32[8,128]{{1,0}} {done}-done(%s)
}}
"""
    assert hlo.analyse(text).hbm_bytes == 2 * 8 * 128 * 4


@pytest.mark.parametrize(("on", "hidden"), [("TensorCore", False), ("SparseCore", True)])
def test_a_sum_of_which_each_chip_keeps_a_part(on, hidden):
    """It is waited for as a fusion of its own; a SparseCore computes it beside."""
    beside = """
%scattered (p: f32[8,128]) -> f32[2,128] {
  %p = f32[8,128]{1,0} parameter(0)
  %sum = f32[8,128]{1,0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %part = f32[2,128]{1,0} dynamic-slice(%sum, %zero, %zero), dynamic_slice_sizes={2,128}
}

%beside (p: f32[8,128]) -> f32[2,128] {
  %p = f32[8,128]{1,0} parameter(0)
  ROOT %part = f32[2,128]{1,0} reduce-scatter(%p), replica_groups={{0,1,2,3}}, to_apply=%add
}, execution_thread="sparsecore"
"""
    lines = {
        "TensorCore": "ROOT %f = f32[2,128]{1,0} fusion(%x), kind=kCustom, calls=%scattered",
        "SparseCore": "%s = ((f32[8,128]{1,0}), f32[2,128]{1,0}) call-start(%x), "
        'to_apply=%beside, async_execution_thread="sparsecore"\n'
        "  ROOT %d = f32[2,128]{1,0} call-done(%s)",
    }
    text = f"""{beside}
ENTRY %main (x: f32[8,128]) -> f32[2,128] {{
  %x = f32[8,128]{{1,0}} parameter(0)
  {lines[on]}
}}
"""
    (found,) = hlo.analyse(text).collectives
    assert (found.opcode, found.is_async) == ("reduce-scatter", hidden)
    assert found.num_bytes == 8 * 128 * 4 * 3 / 4


def test_a_transfer_spread_over_fusions_counts_once():
    """It starts in one fusion, goes on beside the arithmetic of others, and ends in a last one."""
    attributes = 'replica_groups={{0,1}}, dimensions={0}, frontend_attributes={chain_id="0"}'
    text = f"""\
%start (p: f32[8,128]) -> (f32[8,128], f32[16,128]) {{
  %p = f32[8,128]{{1,0}} parameter(0)
  %g = f32[16,128]{{1,0}} all-gather(%p), {attributes}
  ROOT %s = (f32[8,128]{{1,0}}, f32[16,128]{{1,0}}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}}

%beside (q: f32[8,128], h: f32[16,128], x: f32[1,128]) -> (f32[1,128], f32[8,128], f32[16,128]) {{
  %q = f32[8,128]{{1,0}} parameter(0)
  %h = f32[16,128]{{1,0}} parameter(1)
  %x = f32[1,128]{{1,0}} parameter(2)
  %y = f32[1,128]{{1,0}} negate(%x)
  %g = f32[16,128]{{1,0}} all-gather(%q), {attributes}
  ROOT %t = (f32[1,128]{{1,0}}, f32[8,128]{{1,0}}, f32[16,128]{{1,0}}) tuple(%y, %q, %h)
}}

%done (q: f32[8,128], h: f32[16,128]) -> f32[16,128] {{
  %q = f32[8,128]{{1,0}} parameter(0)
  %h = f32[16,128]{{1,0}} parameter(1)
  %g = f32[16,128]{{1,0}} all-gather(%q), {attributes}
  ROOT %d = f32[16,128]{{1,0}} custom-call(%q, %h, %g), custom_call_target="AsyncCollectiveDone"
}}

ENTRY %main (p: f32[8,128], x: f32[1,128]) -> f32[16,128] {{
  %p = f32[8,128]{{1,0}} parameter(0)
  %x = f32[1,128]{{1,0}} parameter(1)
  %a = (f32[8,128]{{1,0}}, f32[16,128]{{1,0}}) fusion(%p), kind=kCustom, calls=%start
  %q = f32[8,128]{{1,0}} get-tuple-element(%a), index=0
  %h = f32[16,128]{{1,0}} get-tuple-element(%a), index=1
  %b = (f32[1,128]{{1,0}}, f32[8,128]{{1,0}}, f32[16,128]{{1,0}}) fusion(%q, %h, %x), kind=kOutput, calls=%beside
  ROOT %c = f32[16,128]{{1,0}} fusion(%q, %h), kind=kCustom, calls=%done
}}
"""  # noqa: E501
    costs = hlo.analyse(text)
    (gathered,) = costs.collectives
    assert gathered.is_async and gathered.num_bytes == 8 * 128 * 4
    row = 128 * 4
    assert gathered.bytes_beside == 2 * row
    assert costs.hbm_bytes == (8 + 16) * row + 2 * row  # the start; what is computed beside it


def check(*flags):
    script = [sys.executable, str(ROOT / "tpu_scripts" / "compile_check.py")]
    return subprocess.run([*script, *flags], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--codec_precision=low"],
            "codec_precision must be one of highest, high, bfloat16, got 'low'",
        ),
        (["--batch_size=x"], "batch_size"),
    ],
)
def test_bad_flags(flags, message):
    done = check(*flags)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_chips_that_are_not_known():
    with pytest.raises(ValueError, match="topology must be one of v4, v5e, v5p, v6e"):
        compile_check.get_mesh("v3:2x2", "data:-1")


def test_costs_of_an_attention_kernel():
    codec = load_codec_config("tiny")
    compute = ComputeConfig(dtype="bfloat16")
    names = {"jit(f)/encoder/stage_1/layers/splash_mha_fwd": 2.0}
    module, rate = codec.encoder[1], codec.stage_rates("encoder")[1]
    frames = 256
    costs = compile_check.attention_costs

    def attention_of(name):
        return costs.of_codec(name, codec, frames / rate)

    found = costs.kernel_costs(names, attention_of, compute, items=3)
    heads = 2 * 3 * module.num_heads
    assert kernels.splash_block(frames, frames) == 256
    assert found.flops == heads * 2 * 2 * 256 * 256 * module.head_dim
    assert found.hbm_bytes == heads * 256 * 128 * 2 * (2 + 3)
    for precision, passes in (("highest", 6), ("high", 6), ("default", 1)):  # it has no high
        compute = ComputeConfig(precision=precision)
        exact = costs.kernel_costs(names, attention_of, compute, items=3)
        assert exact.flops == passes * found.flops
    compute = ComputeConfig(dtype="bfloat16")
    language = LanguageConfig(8, 257, 256, 128, 1, 2, 1, 64)
    name = "jit(f)/SemanticHead/model/layers/splash_mha_fwd"
    attention = costs.of_codec(name, codec, 200 / codec.frame_rate, language, 54)
    assert attention == costs.Attention(256, 256, 2, 64)
    found = costs.kernel_costs({name: 2.0}, lambda _: attention, compute, 6, (2, 4))
    assert found.flops == 2 * 3 * 2 * 2 * 2 * 256 * 256 * 64  # 2 heads are not split over 4 chips


@pytest.mark.parametrize("source", [["--model=nano"], ["--init_from=CODEC"]])
def test_a_codec_on_a_v5e_host(source, golden_dir):
    pytest.importorskip("libtpu")
    source = [flag.replace("CODEC", str(golden_dir / "nano_tiny")) for flag in source]
    done = check(*source, "--topology=v5e:2x2", "--functions=encode", "--batch_size=4")
    assert done.returncode == 0, done.stderr
    assert "encode, compiled" in done.stdout and "utilisation" in done.stdout


def test_a_train_step_on_a_v5e_host():
    pytest.importorskip("libtpu")
    run = ["--flagfile=experiments/nano_pretrain.flags", "--batch_size=16", "--mesh=fsdp:4"]
    done = check(*run, "--topology=v5e:2x2", "--functions=train_step", "--nocode")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"all-gather .* asynchronous", done.stdout), done.stdout
    assert re.search(r"reduce-scatter .* waited for", done.stdout), done.stdout  # small ones are


def test_a_speech_step_on_a_v5e_host():
    pytest.importorskip("libtpu")
    run = ["--objective=speech", "--codec=tiny", "--batch_size=8", "--mesh=fsdp:4"]
    run += ["--dtype=bfloat16", "--remat=full", "--segment_seconds=2", "--topology=v5e:2x2"]
    done = check(*run, "--nocode")
    assert (done.returncode, done.stderr) == (0, "")
    sizes = "230 positions padded to 256, 100 frames to 128"
    assert f"tiny: 10.8 M parameters; 8 x 2 s, {sizes}\n" in done.stdout
    assert "train_step, optimised" in done.stdout and "utilisation" in done.stdout
    done = check(*run, "--functions=encode")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: functions must be one of train_step, got 'encode'\n"


def test_no_figure_waits_for_the_machine_code():
    pytest.importorskip("libtpu")
    flags = ["--model=nano", "--topology=v5p:2x2x1", "--functions=encode", "--batch_size=4"]
    whole, quick = check(*flags), check(*flags, "--nocode")
    assert (whole.returncode, quick.returncode, quick.stderr) == (0, 0, "")
    whole, quick = whole.stdout.splitlines(), quick.stdout.splitlines()
    assert quick[2].startswith("encode, optimised in ")
    assert quick[3].split(", temp")[0] == whole[3].split(", temp")[0]
    assert quick[4:] == whole[4:]
    code, all_bytes = map(float, re.search(r"code (\S+), peak (\S+)", whole[3]).groups())
    peak = float(re.search(r"peak (\S+)", quick[3])[1])
    assert all_bytes - code == pytest.approx(peak, rel=0.03)  # constants count as code there


def test_what_does_not_fit_is_said():
    pytest.importorskip("libtpu")
    huge = ["--batch_size=200000", "--segment_seconds=12"]
    done = check("--model=tiny", "--topology=v5e:2x2", "--functions=encode", *huge)
    assert (done.returncode, done.stderr) == (1, "")
    assert "encode: DOES NOT FIT: RESOURCE_EXHAUSTED" in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is there")
def test_without_libtpu():
    done = check("--model=tiny", "--train_data=synthetic")
    assert done.returncode == 2 and "TPU support not installed" in done.stderr
    assert done.stderr.count("\n") == 1
