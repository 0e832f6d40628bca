"""What a notebook prints of big objects: one line."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import PRETRAIN, init_state, make_recipe

import moss_tok
from moss_tok import language, summary
from moss_tok.audio.manifest import AudioItem
from moss_tok.codec import codes as code_files
from moss_tok.codec import model, pretrained
from moss_tok.data import codes, jobs, prepare, tokenize
from moss_tok.evaluation import datasets, sweep
from moss_tok.language import config as language_configs
from moss_tok.language import pretrained as language_models
from moss_tok.language import text
from moss_tok.nn.compute import ComputeConfig

WAV = np.zeros((2, 1, 64), np.float32)
MICRO = (
    "patch 8 - 2 layers of 16 - patch 2 - 1 layer of 16, 8000 Hz, 1 channel, 500 frames/s, "
    "4 quantizers of 16 codes"
)


def test_a_codec(micro):
    total = sum(x.size for x in jax.tree.leaves(micro.params))
    assert repr(micro) == f"Codec({MICRO}, {total:,} parameters)"
    half = micro.replace(params={k: v for k, v in micro.params.items() if k != "decoder"})
    assert repr(half).endswith(" parameters, without decoder)")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("v1", "v1, 24000 Hz, 1 channel, 12.5 frames/s, 32 quantizers of 1024 codes, "
         "1,774,566,400 parameters"),
        ("v2", "v2, 48000 Hz, 2 channels, 12.5 frames/s, 32 quantizers of 1024 codes, "),
        ("nano", "nano, 48000 Hz, 2 channels, 12.5 frames/s, 16 quantizers of 1024 codes, "),
    ],
)  # fmt: skip
def test_presets_of_shapes_alone(name, line):
    config = dataclasses.replace(
        moss_tok.preset(name), official_json="{}"
    )  # as those that are read
    codec = moss_tok.Codec(pretrained.param_shapes(config), config)
    assert repr(codec).startswith(f"Codec({line}")


def language_model(latents_dim):
    words = text.load("bytes")
    config = language_configs.preset("tiny", latents_dim, 257, words.end_id, "codes")
    params = nn_shapes(config)
    return language.Language(params, config, words, ComputeConfig())


def nn_shapes(config):
    return jax.eval_shape(lambda key: language_models.init(config, key), jax.random.key(0))


def test_everything_is_one_short_line(micro, tmp_path):
    items = tuple(AudioItem(Path(f"{i}.wav"), "train", "sound", 1.0) for i in range(9999))
    array = np.zeros((16, 9999), np.int16)
    encoded = moss_tok.encode(micro, WAV)
    coder = moss_tok.EncoderStream(micro, 2, chunk_frames=[1, 8])
    state = moss_tok.init_encoder_stream(micro, 2)
    quantized = micro.apply(jnp.asarray(WAV), 4, method="encode")
    objects = {
        "Encoded(codes: int32 [2, 4, 4], lengths: int32 [2])": encoded,
        "Decoded(wav: float32 [2, 1, 64], lengths: int32 [2])": moss_tok.decode(micro, *encoded),
        "StreamState(position: [0, 0], caches of 0.0 MB)": state,
        "Cache(keys: float32 [2, 2, 2, 5, 8], values: float32 [2, ": state.caches["stage_1"],
        "Quantized(latents: float32 [2, 4, 8], codes: int32 [2, 4, 4], ": quantized,
        f"EncoderStream({MICRO}, 2 used, 1 slot, chunks of [1, 8] frames)": coder,
        "Language(4 layers of 192, vocabulary of 257, input: codes, 1,": language_model(8),
        "Item('a', codes: int16 [16, 9999], 9 samples, metadata: ['transcript'])": codes.Item(
            "a", array, 9, {"transcript": "long " * 9999}
        ),
        "CodeFile(codes: int16 [16, 9999], num_samples: 9)": code_files.CodeFile(array, 9),
        "TrainState(step: 0, ": init_state(make_recipe(PRETRAIN)),
        "Shard(name='a')": jobs.Shard("a", items),
        "Record(metadata={})": prepare.Record(bytes(9999), {}),
        "Plan(folder=": jobs.Plan(tmp_path, tokenize.Settings(4), (), ".json"),
        "Dataset(name='a', path=": datasets.Dataset("a", tmp_path, items, ("a",) * 9999, ()),
        "Clip(domain='music', text='')": sweep.Clip(WAV, "music"),
    }
    for line, found in objects.items():
        assert repr(found).startswith(line)
        assert "\n" not in repr(found) and len(repr(found)) < 300
    coder.close()
    assert repr(coder).endswith("closed)")


def test_traces_placeholders_and_used_states(micro):
    """As JAX's messages, debuggers and `in_axes` have them."""
    lines = []

    def trace(codec, state, wav):
        encoded = moss_tok.encode(codec, wav)
        lines.extend(repr(x) for x in (codec, state, encoded, moss_tok.decode(codec, *encoded)))
        return wav

    state = moss_tok.init_encoder_stream(micro, 2)
    jax.make_jaxpr(trace)(micro, state, WAV)
    assert lines[0] == repr(micro)
    assert lines[1] == "StreamState(position: int32 [2], caches of 0.0 MB)"
    assert lines[2:] == [
        "Encoded(codes: int32 [2, 4, 4], lengths: int32 [2])",
        "Decoded(wav: float32 [2, 1, 64], lengths: int32 [2])",
    ]
    moss_tok.encode_step(micro, state, WAV)
    assert repr(state).startswith("StreamState(position: int32 [2], ")
    assert repr(moss_tok.Codec(0, None)) == "Codec(NoneType, 0 parameters)"
    assert repr(jax.tree.map(lambda _: None, state)).startswith("StreamState(position: NoneType")
    assert "ShapeDtype" not in repr(jax.eval_shape(lambda: state.caches["stage_1"]))
    assert summary.describe_values(jnp.arange(9)) == "int32 [9]"
    assert repr(model.empty_caches(micro.config, micro.compute, "encoder", 2)).count("\n") == 0


def test_items_of_a_folder_of_codes(tmp_path):
    (tmp_path / "plan.json").write_text('{"format": "jsonl"}')
    line = '{"id": "a", "num_samples": 9, "audio_codes": [[1, 2]], "text": "b"}\n'
    (tmp_path / "codes-00000-of-00001.jsonl").write_text(2 * line)
    source = codes.read_codes(tmp_path)
    assert repr(source) == f"CodeSource({str(tmp_path)!r}, 2 items)"
    assert repr(source[0]) == "Item('a', codes: int16 [2, 1], 9 samples, metadata: ['text'])"


def test_a_broken_line_of_codes_names_its_file_and_line(tmp_path):
    (tmp_path / "plan.json").write_text('{"format": "jsonl"}')
    (tmp_path / "codes-00000-of-00001.jsonl").write_text('{"id": "a"}\n{"id": "b", "audio_')
    with pytest.raises(ValueError, match="codes-00000-of-00001.jsonl:2: must be a JSON object, go"):
        codes.read_codes(tmp_path)[1]
