"""The training step: gradients, numerics, both stages, frozen parts."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    ADVERSARIAL,
    CODEC,
    GOLDEN,
    PRETRAIN,
    RATE,
    SECOND_STAGE,
    SHALLOW,
    init_params,
    init_state,
    leaves_equal,
    make_batch,
    make_recipe,
    micro_config,
    random_batch,
    run_steps,
)

import moss_tok
from moss_tok import sharding
from moss_tok.codec import init as codec_init
from moss_tok.codec import pretrained
from moss_tok.codec.presets import mirror, preset
from moss_tok.objectives import code_use, losses
from moss_tok.objectives.config import all_fields, build_objective, configure
from moss_tok.training import microbatches, optimizer, writer
from moss_tok.training import step as steps
from moss_tok.training.config import OptimizerConfig
from moss_tok.training.state import Recipe

STAGES = pytest.mark.parametrize("flags", [PRETRAIN, ADVERSARIAL], ids=["pretrain", "adversarial"])
GOLDEN_STEPS = json.loads((GOLDEN / "train_step.json").read_text())


def discriminators(recipe):
    """Fresh parameters."""
    return init_state(recipe).extra["discriminators"]


@STAGES
def test_first_step_is_golden(flags):
    """Numbers of a first step, so that a change of the maths does not pass unnoticed."""
    _, metrics = run_steps(make_recipe(flags), 1)
    found = {k: float(v) for k, v in metrics.items() if k != "stop"}
    assert found == pytest.approx(GOLDEN_STEPS[flags.get("stage", "pretrain")], rel=1e-3)


@STAGES
def test_all_parameters_learn_and_nothing_is_lost(flags):
    def parts(state):
        trees = (state.params, state.ema, state.extra.get("discriminators"))
        return jax.tree.map(np.asarray, trees)

    recipe = make_recipe(flags)
    before = parts(init_state(recipe))
    after, _ = run_steps(recipe, 3)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, parts(after))
    still = [
        jax.tree_util.keystr(k) for k, v in jax.tree_util.tree_leaves_with_path(moved) if not v
    ]
    assert still == []
    assert int(after.step) == 3 and int(after.totals.skipped) == 0


def test_microbatches_change_nothing():
    """The second stage, which has all losses of the first one."""
    a, x = run_steps(make_recipe(ADVERSARIAL), 1)
    b, y = run_steps(make_recipe(ADVERSARIAL | {"num_microbatches": 2}), 1)
    for name in x:
        assert float(x[name]) == pytest.approx(float(y[name]), rel=1e-3), name
    np.testing.assert_allclose(a.extra["code_counts"], b.extra["code_counts"])
    np.testing.assert_allclose(a.totals.domain_items, b.totals.domain_items)
    books, others = (state.params["quantizer"]["codebooks"] for state in (a, b))
    np.testing.assert_allclose(books, others, atol=1e-3)  # the dead ones' new vectors as well


def test_windows_that_take_turns_are_the_same_loss_on_average():
    weights = {"loudness_weight": 1.0, "spectrum_weight": 1.0}
    flags = PRETRAIN | {"mel_windows": "64,128,256,512"} | weights
    batch = random_batch()
    wav_hat = jnp.roll(batch["wav"], 24, axis=-1)  # long windows see little of the delay
    whole = jax.jit(make_recipe(flags, SHALLOW).objective.mel_losses)(batch, wav_hat)
    in_turns = make_recipe(flags | {"mel_turns": 2}, SHALLOW)
    losses_of = jax.jit(in_turns.objective.mel_losses)
    of_turns = [losses_of(batch | {"turn": jnp.full(4, turn)}, wav_hat) for turn in range(2)]
    for name, expected in whole.items():
        np.testing.assert_allclose((of_turns[0][name] + of_turns[1][name]) / 2, expected, rtol=1e-5)
        assert not np.allclose(of_turns[0][name], of_turns[1][name], rtol=1e-2)
    state, metrics = run_steps(in_turns, 2)
    assert int(state.totals.skipped) == 0
    assert metrics["loudness_loss"] > 0
    assert metrics["spectrum_loss"] > 0


def test_discriminators_hear_quiet_and_loud_audio_alike():
    recipe = make_recipe(ADVERSARIAL)
    params = discriminators(recipe)
    loud, quiet = random_batch(), random_batch(scale=0.02)

    def judgement(batch):
        name, wav = "window_512", 0.5 * batch["wav"]
        return recipe.objective.features(name, params[name], batch, wav)[0][-1]

    np.testing.assert_allclose(judgement(loud), judgement(quiet), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("flags", "num_steps"), [(PRETRAIN, 70), (ADVERSARIAL, 120)])
def test_overfits_a_clip(flags, num_steps):
    recipe = make_recipe(flags)
    t = np.arange(2048) / RATE
    batch = make_batch(np.tile(0.3 * np.sin(2 * np.pi * 440 * t), (4, 1, 1)))
    _, first = run_steps(recipe, 1, batch=lambda i: batch)
    _, last = run_steps(recipe, num_steps, batch=lambda i: batch)
    assert float(last["reconstruction_loss"]) < 0.5 * float(first["reconstruction_loss"])


def test_frozen_encoder_and_quantizer_stay(micro, tmp_path):
    """Fine-tuning the decoder leaves every code as it was, bit for bit."""
    pretrained.save(tmp_path / "start", micro.config, micro.params)
    start = {"trainable": "decoder", "init_from": str(tmp_path / "start"), "weight_decay": 0.5}
    recipe = make_recipe(SECOND_STAGE | start)
    before = jax.tree.map(np.asarray, micro.params)
    state = init_state(recipe, jax.tree.map(jnp.copy, micro.params))
    after, _ = run_steps(recipe, 6, state)
    for params in (after.params, after.ema):
        for part in ("encoder", "quantizer"):
            assert leaves_equal(params[part], before[part])
        changed = jax.tree.map(
            lambda a, b: bool((a != b).any()), params["decoder"], before["decoder"]
        )
        assert all(jax.tree.leaves(changed))
    wav = random_batch()["wav"]
    codes = [moss_tok.encode(moss_tok.Codec(p, CODEC), wav).codes for p in (before, after.ema)]
    np.testing.assert_array_equal(*codes)


def test_padding_reaches_no_loss_and_no_discriminator():
    """What lies in the padding changes nothing but the codec's own view of it."""
    clean = random_batch()["wav"].at[..., 1500:].set(0)
    parts = microbatches.split(make_batch(clean, 1500), 1)
    spoiled = parts | {"wav": parts["wav"].at[..., 1500:].set(jnp.nan)}
    recipe = make_recipe(ADVERSARIAL)
    params = discriminators(recipe)
    wav_hat = 0.1 * jnp.ones_like(parts["wav"])
    judge = jax.jit(recipe.objective.discriminator_gradient)
    found = [judge(params, x, wav_hat) for x in (parts, spoiled)]
    assert leaves_equal(*found)
    zeros = jnp.zeros(4)
    outputs = {"wav_hat": wav_hat[0], "commitment_loss": zeros, "codebook_loss": zeros}
    part = jax.tree.map(lambda x: x[0], parts)
    differentiate = jax.jit(recipe.objective.output_gradient, static_argnums=3)
    gradient, _ = differentiate({"discriminators": params}, part, outputs, 1)
    np.testing.assert_array_equal(gradient["wav_hat"][..., 1500:], 0)
    assert (np.abs(gradient["wav_hat"][..., 200:1400]).max(-1) > 0).all()


def test_updates_that_are_not_finite_are_skipped():
    recipe = make_recipe(PRETRAIN)
    state, _ = run_steps(recipe, 2)
    before = jax.tree.map(np.asarray, state)
    broken = random_batch()
    broken["wav"] = broken["wav"].at[0, 0, 100].set(jnp.nan)
    for number in (1, 2):
        state, metrics = steps.train_step(recipe, state, broken)
        assert int(metrics["skipped_in_row"]) == number
    assert writer.summarize(recipe, state)["loss"] > 0  # of the two steps before
    zeros = jax.tree.map(jnp.zeros_like, before.totals)
    values = writer.summarize(recipe, state.replace(totals=zeros))
    assert not any(name.endswith(("loss", "_norm")) for name in values)
    kept = ("params", "ema", "opt_state", "extra")
    assert all(leaves_equal(getattr(state, k), getattr(before, k)) for k in kept)
    assert leaves_equal(state.totals.metrics, before.totals.metrics)
    assert not np.isfinite(metrics["reconstruction_loss"])
    state, metrics = steps.train_step(recipe, state, random_batch())
    assert int(state.step) == 5
    assert (int(state.totals.skipped), int(state.totals.skipped_in_row)) == (2, 0)
    assert np.isfinite(float(metrics["loss"]))


def test_dropout_draws_all_numbers():
    key, positions = jax.random.key(0), jnp.arange(4000)
    full = code_use.draw_dropout(4, 1.0, key, positions)
    counts = np.bincount(np.asarray(full.sum(-1)), minlength=5)
    assert counts[0] == 0 and counts[1:].min() > 900
    some = code_use.draw_dropout(4, 1.0, key, positions[100:200])
    np.testing.assert_array_equal(some, full[100:200])
    assert code_use.draw_dropout(4, 0.0, key, positions).all()


def test_counts_leave_padding_and_dropped_quantizers_out():
    codes = jnp.zeros((2, 3, 4), int).at[1].set(2)  # [B, Q, T]
    used = jnp.ones(codes.shape, bool).at[0, :, 3].set(False).at[1, 2].set(False)
    counts = code_use.histogram(codes, used, 4)
    np.testing.assert_array_equal(counts, [[3, 0, 4, 0], [3, 0, 4, 0], [3, 0, 0, 0]])


def test_reseeding_moves_dead_codes_only(rng):
    """Onto vectors that the quantizer has coded; the last one has coded none."""
    books = jnp.asarray(rng.standard_normal((3, 8, 3)), jnp.float32)
    counts = jnp.array([[8.0] * 5 + [0.0] * 3, [1.0] * 8, [8.0] * 7 + [0.0]])
    projected = 5 + jnp.asarray(rng.random((3, 12, 3)), jnp.float32)
    used = jnp.array([[False, True] * 6, [True] * 12, [False] * 12])
    trees, after = code_use.reseed(
        {"params": books, "ema": 2 * books}, counts, projected, used, jax.random.key(0)
    )
    for name, start in (("params", books), ("ema", 2 * books)):
        changed = np.asarray((trees[name] != start).any(-1))
        assert changed.tolist() == [[False] * 5 + [True] * 3, [False] * 8, [False] * 8]
    for code in range(5, 8):
        matches = np.flatnonzero((projected[0] == trees["params"][0, code]).all(-1))
        assert matches.size == 1 and matches[0] % 2 == 1
        np.testing.assert_array_equal(trees["params"][0, code], trees["ema"][0, code])
    np.testing.assert_array_equal(after[0, 5:], 5.0)
    np.testing.assert_array_equal(after[1:], counts[1:])


def test_average_follows_the_parameters():
    recipe = make_recipe(PRETRAIN)
    state, _ = run_steps(recipe, 1)
    before = jax.tree.map(np.asarray, state.ema)
    state, _ = run_steps(recipe, 1, state)
    weight = 1 - 2 / 11  # second step: (1 + 1) / (10 + 1)
    expected = jax.tree.map(lambda e, p: e + weight * (p - e), before, state.params)
    for a, b in zip(jax.tree.leaves(state.ema), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_learning_rate_schedules():
    schedule = optimizer.learning_rate(OptimizerConfig(warmup_steps=10, decay_steps=110), 1.0)
    values = [float(schedule(s)) for s in (0, 4, 9, 10, 60, 110, 500)]
    np.testing.assert_allclose(values, [0.1, 0.5, 1, 1, 0.5, 0, 0], atol=1e-6)
    schedule = optimizer.learning_rate(OptimizerConfig(warmup_steps=10), 1.0)
    assert float(schedule(10 + 10**5)) == pytest.approx(0.999996**1e5, rel=1e-3)


def test_fresh_model_is_a_low_pass_codec():
    """Without quantizer the untrained codec hands low frequencies through."""
    quiet = [
        dataclasses.replace(m, layer_scale=0.01) if hasattr(m, "layer_scale") else m
        for m in CODEC.encoder
    ]
    codec = micro_config(encoder=tuple(quiet), decoder=mirror(tuple(quiet)))
    params = init_params(codec)
    t = np.arange(2048) / RATE
    wav = jnp.asarray(0.3 * np.sin(2 * np.pi * 100 * t), jnp.float32)[None, None]
    model = moss_tok.Codec(params, codec).model

    @jax.jit
    def without_quantizer(params, wav):
        return model.apply({"params": params}, wav, method=lambda m, x: m.audio(m.latents(x)))

    wav_hat = without_quantizer(params, wav)
    correlation = np.corrcoef(wav[0, 0], wav_hat[0, 0])[0, 1]
    assert correlation > 0.9


def test_fresh_quantizer_knows_sizes():
    """Codes are chosen by angle; the constant dimension makes them follow the size as well."""
    quantizer = init_params(CODEC)["quantizer"]
    np.testing.assert_array_equal(quantizer["codebooks"][..., -1], 1)
    np.testing.assert_array_equal(quantizer["in_projections"]["bias"][..., -1], 1)
    np.testing.assert_array_equal(quantizer["in_projections"]["gain"][..., -1], 0)


@pytest.mark.parametrize(
    "sizes", [(16, 96, 8), (32, 512, 8), (4, 6, 3), (32, 16, 8), (3, 4, 8), (1, 5, 1)]
)
def test_fresh_quantizers_share_out_the_dimensions(sizes):
    """Each sees different ones; those of a group see no dimension twice where there are enough."""
    kernels = np.asarray(codec_init._dimension_kernels(*sizes))
    num_quantizers, rvq_dim, codebook_dim = sizes
    seen = min(codebook_dim - 1, rvq_dim)
    assert (kernels.sum((1, 2)) == seen).all() and kernels.sum(2).max() <= 1
    group = kernels[: max(1, num_quantizers // 4)]
    if seen * len(group) <= rvq_dim:
        assert group.sum((0, 2)).max() <= 1


def test_bfloat16_is_close_to_float32():
    """Compute in half precision; parameters, losses and spectra stay in float32."""
    half = make_recipe(SECOND_STAGE | {"dtype": "bfloat16", "remat": "dots"})
    state, found = run_steps(half, 1)
    for name in ("reconstruction_loss", "adversarial_loss", "discriminator_loss"):
        assert found[name].dtype == jnp.float32
    expected = GOLDEN_STEPS["adversarial"]["reconstruction_loss"]
    assert float(found["reconstruction_loss"]) == pytest.approx(expected, rel=0.05)
    for tree in (state.params, state.ema, state.extra, state.opt_state):
        assert all(leaf.dtype != jnp.bfloat16 for leaf in jax.tree.leaves(tree))


def test_bfloat16_discriminators_judge_like_float32_ones():
    """The same audio: in half precision the codec itself finds other codes, so other audio."""
    params = discriminators(make_recipe(ADVERSARIAL))
    batch = random_batch()

    @functools.partial(jax.jit, static_argnums=0)
    def judged(dtype):
        objective = make_recipe(ADVERSARIAL | {"dtype": dtype}).objective
        waves = (batch["wav"], random_batch(1)["wav"])
        found = []
        for name in params:
            real, fake = objective.features(name, params[name], batch, *waves)
            found.append(
                (
                    losses.discriminator_loss(real, fake),
                    losses.adversarial_loss(fake),
                    losses.feature_matching_loss(real, fake),
                )
            )
        return jnp.asarray(found).mean(0)  # over discriminators

    for expected, found in zip(judged("float32"), judged("bfloat16"), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0.05)


@pytest.mark.parametrize("name", ["nano_pretrain", "v1_adversarial", "finetune_decoder"])
def test_flag_files_trace(name):
    """The full-size steps of the flagfiles fit together, as far as shapes tell."""
    text = (Path(__file__).parents[1] / "experiments" / f"{name}.flags").read_text()
    lines = [line[2:].split("=") for line in text.splitlines() if line.startswith("--")]
    kinds = {name: type(field.default) for name, field in all_fields().items()}
    numbers = (int, float)
    flags = {k: kinds[k](v) if kinds[k] in numbers else v for k, v in lines}
    config = configure(**flags)
    objective = build_objective(config, codec=preset(flags.get("model", "v1")))
    recipe = Recipe(objective, config.optimizer, 0, config.devices.num_microbatches)
    batch = steps.batch_shapes(recipe, config.data.batch_size, sharding.make_mesh("data:1"))
    state = jax.eval_shape(lambda: init_state(recipe))
    after, metrics = jax.eval_shape(lambda s, b: steps.train_step(recipe, s, b), state, batch)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), after, state)
    assert all(jax.tree.leaves(same)) and metrics["loss"].shape == ()


def test_weight_decay_is_for_matrices():
    """Each is made by `nn.layers.parameter`; vectors, codebooks and weight norms do not decay."""
    boxed = jax.eval_shape(lambda: codec_init.init_boxed(CODEC, jax.random.key(0)))
    decayed = jax.tree_util.tree_leaves_with_path(optimizer.decayed_leaves(boxed))
    names = {path[-1].key for path, decays in decayed if decays}
    assert names == {"kernel", "qkv", "out", "up", "down"}
    others = {path[-1].key for path, decays in decayed if not decays}
    assert {"codebooks", "direction", "gain", "bias", "scale", "attention_scale"} <= others
