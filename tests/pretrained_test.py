"""Our own checkpoints: parts, damage, and where `load` looks."""

import json

import jax
import numpy as np
import pytest
from helpers import leaves_equal, micro_config

import moss_tok
from moss_tok.codec import pretrained


@pytest.fixture
def checkpoint(micro, tmp_path):
    pretrained.save(tmp_path / "checkpoint", micro.config, micro.params)
    return tmp_path / "checkpoint"


def test_there_and_back(checkpoint, micro):
    codec = moss_tok.load(checkpoint)
    assert codec.config == micro.config
    assert leaves_equal(codec.params, micro.params)


@pytest.mark.parametrize("component", ["encoder", "decoder"])
def test_one_side(checkpoint, micro, component):
    codec = moss_tok.load(checkpoint, component=component)
    assert sorted(codec.params) == sorted([component, "quantizer"])
    wav = np.sin(np.arange(500, dtype=np.float32))[None, None]
    if component == "encoder":
        expected = moss_tok.encode(micro, wav).codes
        np.testing.assert_array_equal(moss_tok.encode(codec, wav).codes, expected)
    else:
        codes = np.ones((1, 4, 9), int)
        expected = moss_tok.decode(micro, codes).wav
        np.testing.assert_array_equal(moss_tok.decode(codec, codes).wav, expected)


def test_unknown_component(checkpoint):
    with pytest.raises(
        ValueError, match="component must be one of all, encoder, decoder, quantizer"
    ):
        moss_tok.load(checkpoint, component="middle")


def test_weights_of_another_model_are_named(checkpoint):
    other = micro_config().to_json().replace('"mlp_dim": 32', '"mlp_dim": 48')
    (checkpoint / "config.json").write_text(other)
    with pytest.raises(ValueError, match=r"bad parameters: .*\['mlp'\]\['up'\] has shape"):
        moss_tok.load(checkpoint)


def test_every_file_is_listed(checkpoint):
    sizes = json.loads((checkpoint / "files.json").read_text())
    assert sizes == {
        str(p.relative_to(checkpoint)): p.stat().st_size
        for p in [checkpoint / "config.json", *(checkpoint / "params").rglob("*")]
        if p.is_file()
    }


def test_saving_over_something_is_refused(checkpoint, micro, tmp_path):
    with pytest.raises(ValueError, match="exists already"):
        pretrained.save(checkpoint, micro.config, micro.params)
    with pytest.raises(ValueError, match="no such folder"):
        pretrained.save(tmp_path / "no" / "folder", micro.config, micro.params)
    assert leaves_equal(moss_tok.load(checkpoint).params, micro.params)


def test_a_workdir_without_checkpoints(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="no checkpoint was saved yet"):
        moss_tok.load(tmp_path)


def test_a_name_that_might_be_on_the_hub(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install huggingface_hub"):
        moss_tok.load("some-org/some-model")


def test_restored_arrays_are_on_the_device(checkpoint):
    leaves = jax.tree.leaves(moss_tok.load(checkpoint).params)
    assert all(isinstance(x, jax.Array) and x.dtype == np.float32 for x in leaves)
