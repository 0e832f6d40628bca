"""What a program costs, read from its HLO, against counting by hand."""

import dataclasses
import functools
import itertools

import hlo
import hlo_costs
import hlo_text
import jax
import jax.numpy as jnp
import pytest

from moss_tok.codec import transformer
from moss_tok.codec.config import TransformerConfig
from moss_tok.nn.compute import ComputeConfig


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
    of_stage, of_layer = (jax.eval_shape(m.init, jax.random.key(0), x) for m in (stage, layer))
    found = jax.jit(both(scanned)).lower(of_stage, x).compile()
    expected = jax.jit(both(unrolled)).lower([of_layer] * 3, x).compile()
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
