"""Configs: published sizes, JSON there and back, errors that say what is wrong."""

import json
import math

import jax
import pytest
from helpers import micro_config

import moss_tok
from moss_tok import settings
from moss_tok.codec import pretrained
from moss_tok.codec.config import CodecConfig
from moss_tok.nn.compute import ComputeConfig
from moss_tok.objectives.config import all_fields, configure

PUBLISHED = {
    # name: parameters, hop_length, encoder windows
    "v1": (1_774_566_400, 1920, (1000, 500, 250, 125)),
    "v2": (2_123_701_248, 3840, (400, 400, 400, 400, 250, 125)),
    "nano": (21_969_664, 3840, (1600, 1200, 800, 500)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_sizes(name):
    config = moss_tok.preset(name)
    parameters, hop_length, windows = PUBLISHED[name]
    shapes = jax.tree.leaves(pretrained.param_shapes(config))
    assert sum(math.prod(x.shape) for x in shapes) == parameters
    assert config.hop_length == hop_length
    assert config.frame_rate == 12.5
    assert tuple(w for w in config.windows("encoder") if w) == windows
    assert tuple(w for w in config.windows("decoder") if w) == windows[::-1]


def test_tiny_is_small():
    config = moss_tok.preset("tiny")
    shapes = jax.tree.leaves(pretrained.param_shapes(config))
    assert 0.5e6 < sum(math.prod(x.shape) for x in shapes) < 3e6
    assert (config.sample_rate, config.num_channels) == (24000, 1)
    assert config.quantizer.num_quantizers == 16


@pytest.mark.parametrize("name", ["v1", "v2", "nano", "tiny"])
def test_json_round_trip(name):
    config = moss_tok.preset(name)
    assert CodecConfig.from_json(config.to_json()) == config
    assert hash(CodecConfig.from_json(config.to_json())) == hash(config)


def test_bitrate_and_frames():
    config = moss_tok.preset("v1")
    assert config.bitrate() == 4000
    assert config.bitrate(1) == 125
    assert [config.num_frames(n) for n in (1, 1920, 1921)] == [1, 1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(frob=1), "unknown key 'frob'"),
        (lambda c: c.pop("sample_rate"), "missing key 'sample_rate'"),
        (lambda c: c.update(format="other"), "format"),
        (lambda c: c["encoder"][0].update(type="conv"), "module type must be one of"),
        (lambda c: c["encoder"][0].update(patch_size=0), "patch_size must be a positive number"),
        (lambda c: c["encoder"][1].update(input_dim=7), "encoder module 1: input_dim must be 8"),
        (lambda c: c["encoder"][1].update(num_heads=3), "model_dim must be a multiple"),
        (lambda c: c["quantizer"].update(codebook_size="big"), "codebook_size must be a positive"),
        (lambda c: c.update(layout="v9"), "layout must be v1 or v2"),
        (lambda c: c.update(decoder=c["decoder"][:-1]), "the decoder must end in one sample"),
        (lambda c: c.update(quantizer=3), "quantizer must be an object"),
        (lambda c: c["encoder"][1].update(layer_scale=None), "layer_scale must be a finite number"),
        (lambda c: c["encoder"][1].update(input_projection=[1]), "must be of type bool"),
        (lambda c: c["encoder"][1].update(max_period=1e-300), "max_period must be at least 1"),
        (lambda c: c["encoder"][1].update(model_dim=2**31), "model_dim must be at most 1048576"),
        (lambda c: c["encoder"][1].update(num_layers=10**30), "num_layers must be at most 4096"),
        (lambda c: c.update(official_json=[]), "official_json must be of type str"),
        (lambda c: c.update(sample_rate=10**30), "sample_rate must be at most"),
    ],
)
def test_broken_json_is_named(change, message):
    fields = json.loads(micro_config().to_json())
    change(fields)
    with pytest.raises(ValueError, match=message):
        CodecConfig.from_json(json.dumps(fields))


@pytest.mark.parametrize("text", ["{", "[1]", "", "[" * 100_000])
def test_no_json(text):
    with pytest.raises(ValueError, match="JSON"):
        CodecConfig.from_json(text)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_steps", 0),
        ("batch_size", 7),
        ("segment_seconds", 0.0),
        ("learning_rate", float("nan")),
        ("quantizer_dropout", 1.5),
        ("beta1", 1.0),
        ("dtype", "float16"),
        ("remat", "some"),
        ("workdir", ""),
        ("reseed_every", -1),
        ("seed", 10**20),
        ("segment_seconds", 1e300),
        ("learning_rate", "x"),
        ("beta1", None),
        ("num_steps", True),
    ],
)
def test_train_config_refuses(field, value):
    with pytest.raises(ValueError, match=field):
        configure(**{"num_microbatches": 4, field: value})


def test_compute_config_refuses():
    with pytest.raises(ValueError, match="attention must be one of auto, dense, blocked"):
        ComputeConfig(attention="flash")


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({"discriminator_channels": 4}, "discriminator_channels"),
        ({"adversarial_weight": 0.0, "stage": "pretrain"}, "adversarial_weight"),
        ({"trainable": "language", "mel_windows": "64"}, "mel_windows"),
        ({"learning_rat": 1.0}, "learning_rat"),
    ],
)
def test_flags_that_an_objective_does_not_have(flags, name):
    with pytest.raises(ValueError, match=f"the objective [a-z]+ has no setting {name}"):
        configure(**flags)


def test_settings_there_and_back():
    """Flat values of any run, as flags and train_config.json have them, give the run again."""
    flags = {"stage": "adversarial", "mel_windows": "64,128", "discriminator_periods": "3",
             "augment_noise_db": "0:20", "profile_steps": "3:5", "mesh": "data:2"}  # fmt: skip
    config = configure(**flags)
    values = settings.flatten(config)
    assert flags.items() <= values.items()
    assert configure(**values) == config
    assert set(values) <= set(all_fields())
