"""What a program needs on a chip, and the command `compile_check.py`."""

import dataclasses
import importlib.util
import re
import subprocess
import sys

import compile_check
import estimates
import hlo
import hlo_costs
import jax
import pytest
import speech_check
from helpers import ROOT

from moss_tok.codec.presets import load_codec_config
from moss_tok.language.config import LanguageConfig
from moss_tok.nn import kernels
from moss_tok.nn.compute import ComputeConfig


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


def test_the_programs_of_speech_trace():
    """The steps of generation and of the decoder take the shapes that `speech_check` gives them."""
    traced = []

    class Tracer(speech_check.Compiler):
        def seconds(self, title, function, *args):
            jax.eval_shape(function, *args)
            traced.append(title)
            return 1e-3

    args = speech_check.parser().parse_args(["--num_quantizers=2", "--codec=tiny"])
    speech_check.estimate(Tracer(estimates.CHIPS["v5e"], jax.devices()[0]), args)
    assert traced == ["prompt", "depth Transformer", "frame", "decoder, a frame"]


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
