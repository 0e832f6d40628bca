"""The official layout: parity with other implementations' answers, configs, broken directories."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from helpers import init_params, leaves_equal, micro_config

import moss_tok
from moss_tok import tensors as tensor_files
from moss_tok.codec import huggingface, pretrained
from moss_tok.codec.config import QuantizerConfig, TransformerConfig
from moss_tok.codec.presets import mirror
from moss_tok.convert import convert


def expected(golden_dir, name):
    return dict(np.load(golden_dir / name / "expected.npz"))


def single_wav(answers):
    wav = answers["wav_int16"][:1].astype(np.float32) / 32768
    return wav[..., : int(answers.get("single_num_samples", wav.shape[-1]))]


@pytest.mark.parametrize("name", ["v1_tiny", "nano_tiny"])
def test_parity(golden_dir, name):
    codec, answers = moss_tok.load(golden_dir / name), expected(golden_dir, name)
    wav, codes = single_wav(answers), answers["single_codes"].swapaxes(0, 1)
    np.testing.assert_array_equal(moss_tok.encode(codec, wav).codes, codes)
    padded = np.pad(wav, ((0, 0), (0, 0), (0, -wav.shape[-1] % codec.config.hop_length)))
    latents = codec.model.apply({"params": codec.params}, padded, method="latents")
    np.testing.assert_allclose(latents, answers["single_hidden"].swapaxes(1, 2), atol=1e-4)
    audio = moss_tok.decode(codec, codes).wav
    np.testing.assert_allclose(audio, answers["single_decoded"], atol=5e-4)
    fewer = answers["single_decoded_3_quantizers"]
    frames = fewer.shape[-1] // codec.config.hop_length
    audio = moss_tok.decode(codec, codes[:, :3, :frames]).wav
    np.testing.assert_allclose(audio, fewer, atol=5e-4)


def test_parity_of_batches_and_prefixes(golden_dir, v1_tiny):
    answers = expected(golden_dir, "v1_tiny")
    wav = answers["wav_int16"].astype(np.float32) / 32768
    batch = moss_tok.encode(v1_tiny, wav, answers["lengths"])
    for i, frames in enumerate(answers["batch_code_lengths"]):  # whole frames, floored there
        official = answers["batch_codes"][:, i, :frames]
        np.testing.assert_array_equal(batch.codes[i, :, :frames], official)
    codes = moss_tok.encode(v1_tiny, single_wav(answers), num_quantizers=3).codes
    np.testing.assert_array_equal(codes, answers["single_codes_3_quantizers"].swapaxes(0, 1))


def edit_config(folder, change):
    fields = json.loads((folder / "config.json").read_text())
    change(fields)
    (folder / "config.json").write_text(json.dumps(fields))


@pytest.fixture
def official(golden_dir, tmp_path):
    return shutil.copytree(golden_dir / "v1_tiny", tmp_path / "official")


def module(fields, **changes):
    fields["encoder_kwargs"][1] |= changes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: module(c, norm="rms_norm"),
         r'encoder_kwargs\[1\].norm = "rms_norm" is not supported; accepted: "layer_norm"'),
        (lambda c: module(c, gating="silu"), r'gating = "silu" is not supported; accepted: "none"'),
        (lambda c: module(c, positional_embedding="sin"), r'= "sin" is not .* accepted: "rope"'),
        (lambda c: module(c, causal=False), r"causal = false is not supported; accepted: true"),
        (lambda c: module(c, frob=3), r"\[1\].frob = 3 is not .* accepted keys: causal, "),
        (lambda c: module(c, module_type="Conv"), r'module_type = "Conv" .* "Patched.*"Tr'),
        (lambda c: module(c, layer_scale=None), "layer_scale must be a finite number, got None"),
        (lambda c: module(c, d_model="x"), r"encoder_kwargs\[1\]: model_dim must be a positive"),
        (lambda c: c["encoder_kwargs"][1].pop("num_heads"), r"\[1\].num_heads is missing"),
        (lambda c: c["encoder_kwargs"][0].update(stride=2), r"\[0\].stride = 2 is not supported"),
        (lambda c: c["quantizer_kwargs"].update(quantizer_type="rvq"),
         r'quantizer_type = "rvq" is not supported; accepted: "rlfq", "random_prefix_rlfq"'),
        (lambda c: c["quantizer_kwargs"].update(frob=1), "quantizer_kwargs.frob = 1 is not supp"),
        (lambda c: c.update(downsample_rate=960), "downsample_rate = 960 .* accepted: 1920"),
        (lambda c: c.pop("sampling_rate"), "missing key 'sampling_rate'"),
        (lambda c: c.update(number_channels=2), "enable_channel_interleave = null is not supp"),
        (lambda c: c.update(encoder_kwargs={}), "encoder_kwargs must be a list of modules"),
        (lambda c: c.update(sampling_rate="24k"), "sampling_rate"),
        (lambda c: c.update(downsample_rate=0), "downsample_rate"),
        (lambda c: c.update(causal_transformer_context_duration=float("inf")), "= Infinity is not"),
        (lambda c: module(c, num_layers=10**30), "num_layers must be at most 4096"),
    ],
)  # fmt: skip
def test_unsupported_configs_name_key_value_and_accepted(official, change, message):
    edit_config(official, change)
    with pytest.raises(ValueError, match=message):
        moss_tok.load(official)


def test_unknown_top_level_keys_are_a_warning(official, caplog):
    edit_config(official, lambda c: c.update(frob=1))
    moss_tok.load(official)
    assert "unknown key 'frob' is ignored" in caplog.text


def test_all_bad_tensors_are_named_at_once(official):
    tensors = safetensors.numpy.load_file(official / "model.safetensors")
    tensors["extra.weight"] = np.zeros(3, np.float32)
    name = "quantizer.quantizers.2.codebook.weight"
    tensors[name] = tensors[name][:-1]
    del tensors["encoder.1.input_proj.weight"], tensors["decoder.0.output_proj.weight"]
    safetensors.numpy.save_file(tensors, official / "model.safetensors")
    with pytest.raises(ValueError, match="4 bad tensors") as error:
        moss_tok.load(official)
    for text in (
        "unknown extra.weight",
        f"{name} has shape (63, 8), not (64, 8)",
        "missing encoder.1.input_proj.weight",
        "missing decoder.0.output_proj.weight",
    ):
        assert text in str(error.value)  # fmt: skip


def split_into_shards(folder):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    names, weight_map = sorted(tensors), {}
    for i in range(3):
        file = f"model-0000{i + 1}-of-00003.safetensors"
        safetensors.numpy.save_file({n: tensors[n] for n in names[i::3]}, folder / file)
        weight_map |= dict.fromkeys(names[i::3], file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_sharded_index(official, v1_tiny):
    split_into_shards(official)
    assert leaves_equal(moss_tok.load(official).params, v1_tiny.params)
    (official / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00003.safetensors: no such file"):
        moss_tok.load(official)


@pytest.mark.parametrize("value", [3, None, "", ".."])
def test_odd_index(official, value):
    split_into_shards(official)
    index = {"weight_map": {"a": value}}
    (official / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="weight_map must give|no such file|cannot be read"):
        moss_tok.load(official)


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64", "float8_e4m3fn"])
def test_tensors_of_other_types(official, dtype):
    tensors = safetensors.numpy.load_file(official / "model.safetensors")
    name = "encoder.1.input_proj.weight"
    tensors[name] = tensors[name].astype(dtype)
    safetensors.numpy.save_file(tensors, official / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name} has type .*, not one of F64, F32, F16, BF16"):
        moss_tok.load(official)


@pytest.mark.parametrize("content", [b"", b"no tensors", b"\xff" * 100])
def test_corrupt_safetensors(official, content):
    (official / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors: corrupt"):
        moss_tok.load(official)


def test_truncated_safetensors(official):
    file = official / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="model.safetensors: corrupt"):
        moss_tok.load(official)


@pytest.mark.parametrize("component", ["encoder", "decoder"])
def test_one_side_reads_only_its_tensors(official, component, monkeypatch):
    read = []
    monkeypatch.setattr(
        tensor_files, "_put", lambda params, tensor, array, stacked: read.append(tensor.name)
    )
    huggingface.read_official(official, component)
    other = {"encoder": "decoder", "decoder": "encoder"}[component]
    assert read and not [name for name in read if name.startswith(other)]


@pytest.mark.parametrize("name", ["v1_tiny", "nano_tiny"])
def test_there_and_back_is_bit_exact(golden_dir, tmp_path, name):
    source = golden_dir / name
    assert convert(source, tmp_path / "ours") == "checkpoint"
    assert convert(tmp_path / "ours", tmp_path / "official") == "official"
    tensors = [safetensors.numpy.load_file(p / "model.safetensors")
               for p in (source, tmp_path / "official")]  # fmt: skip
    assert tensors[0].keys() == tensors[1].keys()
    assert all(np.array_equal(tensors[0][k], tensors[1][k]) for k in tensors[0])
    before, after = (json.loads((p / "config.json").read_text())
                     for p in (source, tmp_path / "official"))  # fmt: skip
    for key in before.keys() - {"auto_map", "dtype"}:
        assert after[key] == before[key]
    assert after["auto_map"]["AutoModel"].startswith("OpenMOSS-Team/MOSS-Audio-Tokenizer")
    assert after["auto_map"]["AutoModel"].endswith(
        "--modeling_moss_audio_tokenizer.MossAudioTokenizerModel"
    )


def test_a_codec_of_our_own_exports(micro, tmp_path):
    pretrained.save(tmp_path / "ours", micro.config, micro.params)
    convert(tmp_path / "ours", tmp_path / "official")
    again = moss_tok.load(tmp_path / "official")
    assert leaves_equal(again.params, micro.params)
    wav = np.sin(np.arange(999, dtype=np.float32))[None, None]
    np.testing.assert_array_equal(
        moss_tok.encode(again, wav).codes, moss_tok.encode(micro, wav).codes
    )


def test_contexts_that_differ_are_exported_in_the_v2_layout(micro, tmp_path):
    first = micro.config.encoder[1]
    encoder = list(micro.config.encoder)
    encoder[1] = dataclasses.replace(first, context_seconds=0.02)
    v1 = dataclasses.replace(micro.config, encoder=tuple(encoder))
    pretrained.save(tmp_path / "ours", v1, micro.params)
    convert(tmp_path / "ours", tmp_path / "official")
    again = moss_tok.load(tmp_path / "official")
    assert again.config.layout == "v2"
    assert again.config.windows("encoder") == v1.windows("encoder")
    assert leaves_equal(again.params, micro.params)


@pytest.mark.parametrize("kind", ["stereo", "projection"])
def test_what_v1_lacks_is_exported_in_the_v2_layout(tmp_path, kind):
    if kind == "stereo":
        config = micro_config(num_channels=2, layout="v1")
    else:
        stage = TransformerConfig(12, 16, 16, 2, 1, 32, 0.006, output_projection=True)
        encoder = (*micro_config().encoder[:3], stage)
        quantizer = QuantizerConfig(16, 6, 16, 4, 16, 3)
        config = micro_config(encoder=encoder, decoder=mirror(encoder), quantizer=quantizer)
    params = init_params(config)
    pretrained.save(tmp_path / "ours", config, params)
    convert(tmp_path / "ours", tmp_path / "official")
    again = moss_tok.load(tmp_path / "official")
    assert again.config.layout == "v2" and again.config.num_channels == config.num_channels
    assert leaves_equal(again.params, params)


def test_square_stages_get_identities_in_the_v2_layout(tmp_path):
    """The official classes of v2 have both projections in every stage."""
    stage = TransformerConfig(12, 16, 16, 2, 1, 32, 0.006, output_projection=False)
    encoder = (*micro_config().encoder[:3], stage)
    quantizer = QuantizerConfig(16, 6, 16, 4, 16, 3)
    config = micro_config(
        encoder=encoder, decoder=mirror(encoder), quantizer=quantizer, layout="v2"
    )
    params = init_params(config)
    pretrained.save(tmp_path / "ours", config, params)
    convert(tmp_path / "ours", tmp_path / "official")
    stored = safetensors.numpy.load_file(tmp_path / "official" / "model.safetensors")
    for name in ("encoder.3.output_proj.weight", "decoder.0.input_proj.weight"):
        np.testing.assert_array_equal(stored[name], np.eye(16))
    again = moss_tok.load(tmp_path / "official")
    assert dataclasses.replace(again.config, official_json="") == config
    assert pretrained.load_config(tmp_path / "official") == again.config
    assert leaves_equal(again.params, params)
    convert(tmp_path / "official", tmp_path / "again")
    convert(tmp_path / "again", tmp_path / "official_again")
    files = [tmp_path / name / "model.safetensors" for name in ("official", "official_again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_bfloat16(golden_dir, v1_tiny, tmp_path):
    convert(golden_dir / "v1_tiny", tmp_path / "ours", "bfloat16")
    codec = moss_tok.load(tmp_path / "ours")
    assert {x.dtype.name for x in jax.tree.leaves(codec.params)} == {"float32"}
    convert(tmp_path / "ours", tmp_path / "official", "bfloat16")
    assert leaves_equal(moss_tok.load(tmp_path / "official").params, codec.params)
    assert not leaves_equal(codec.params, v1_tiny.params)
    with pytest.raises(ValueError, match="dtype must be one of float32, float16, bfloat16"):
        convert(golden_dir / "v1_tiny", tmp_path / "new", "int8")


def test_large_exports_are_sharded(v1_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "MAX_SHARD_BYTES", 1_000_000)
    huggingface.write_official(tmp_path, v1_tiny.config, v1_tiny.params, "float32")
    assert len(list(tmp_path.glob("model-*.safetensors"))) == 3
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1  # as the umask says
    assert leaves_equal(moss_tok.load(tmp_path).params, v1_tiny.params)


def test_nothing_is_left_where_a_conversion_fails(official, tmp_path):
    (official / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="corrupt"):
        convert(official, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    with pytest.raises(ValueError, match="exists already"):
        convert(official, tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="exists already"):
        convert(official, tmp_path / "link")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "official"]
