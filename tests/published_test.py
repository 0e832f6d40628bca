"""The real weights, where MOSS_TOK_V1, _V2, _NANO and _TTS name directories."""

import dataclasses
import os
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors

import moss_tok
from moss_tok import tensors
from moss_tok.codec import huggingface
from moss_tok.convert import convert
from moss_tok.speech import config as configs
from moss_tok.speech import huggingface as speech_huggingface

# Parameters, tensors.
MODELS = {
    "v1": (1_774_566_400, 1600),
    "v2": (2_123_701_248, 2094),
    "nano": (21_969_664, 374),
}


@pytest.fixture(params=MODELS)
def published(request):
    folder = os.environ.get(f"MOSS_TOK_{request.param.upper()}")
    if not folder:
        pytest.skip(f"MOSS_TOK_{request.param.upper()} names no directory")
    return request.param, Path(folder)


def test_names_and_sizes(published):
    name, folder = published
    parameters, num_tensors = MODELS[name]
    config = huggingface.read_folder_config(folder)
    table = huggingface.tensor_table(config)
    assert len(table) == len(tensors.tensor_files(folder)) == num_tensors
    assert sum(int(np.prod(t.shape)) for t in table) == parameters
    ours = moss_tok.preset(name)
    assert (config.encoder, config.decoder, config.quantizer) == (
        ours.encoder, ours.decoder, ours.quantizer
    )  # fmt: skip


def test_speech_model():
    """Names and shapes of all tensors, and the settings of the preset."""
    if "MOSS_TOK_TTS" not in os.environ:
        pytest.skip("MOSS_TOK_TTS names no directory")
    folder = Path(os.environ["MOSS_TOK_TTS"])
    config = speech_huggingface.read_folder_config(folder)
    table = speech_huggingface.tensor_table(config)
    read = tensors.read_tensors(folder, tensors.tensor_files(folder), table, wanted=set())
    assert read == {} and len(table) == 556
    expected = configs.published("tts-1.7b")
    ignored = {"official_json": "", "max_positions": expected.max_positions}
    assert dataclasses.replace(config, **ignored) == expected


def test_known_answer_of_v1(published):
    name, folder = published
    if name != "v1":
        pytest.skip("known for v1 only")
    codec = moss_tok.load(folder, component="encoder")
    wav = np.linspace(-0.25, 0.25, 24000, dtype=np.float32)[None, None]
    codes = moss_tok.encode(codec, wav, num_quantizers=4).codes[0].T
    known = [[245, 402, 936, 936], [996, 948, 948, 600], [154, 484, 484, 548], [119, 743, 751, 456]]
    np.testing.assert_array_equal(codes[:4], known)


def test_round_trip(published, tmp_path):
    _, folder = published
    convert(folder, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "official")
    before, after = (tensors.tensor_files(p) for p in (folder, tmp_path / "official"))
    assert before.keys() == after.keys()
    for name in before:
        arrays = []
        for files in (before, after):
            with safetensors.safe_open(files[name], framework="numpy") as file:
                arrays.append(file.get_tensor(name))
        np.testing.assert_array_equal(*arrays)


def test_reconstruction_resembles_its_input(published):
    _, folder = published
    codec = moss_tok.load(folder)
    config = codec.config
    t = np.arange(2 * config.sample_rate) / config.sample_rate
    wav = 0.2 * np.sin(2 * np.pi * 220 * t) * np.ones((config.num_channels, 1))
    codes = moss_tok.encode(codec, wav[None].astype(np.float32)).codes
    wav_hat = np.asarray(moss_tok.decode(codec, codes).wav[0, :, : wav.shape[-1]])
    spectra = [np.abs(np.fft.rfft(x[0])) for x in (wav, wav_hat)]
    assert np.argmax(spectra[0]) == pytest.approx(np.argmax(spectra[1]), abs=2)
    assert jax.tree.leaves(codec.params)[0].dtype == np.float32
