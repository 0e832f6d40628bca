"""The language model: what it reads, what it generates, Qwen2.5 weights, and what it is for."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from moss_tok.codec import pretrained
from moss_tok.evaluation import transcription
from moss_tok.language import generate, qwen, text
from moss_tok.language import pretrained as language_models
from moss_tok.language.config import LanguageConfig, preset
from moss_tok.language.generate import Language, Sampling
from moss_tok.nn.compute import ComputeConfig

CONFIG = LanguageConfig(8, 257, 256, 32, 2, 4, 2, 48, head_dim=8)


def score(head, x):
    """Embeddings [B, T, D] -> logits [B, T, V] of what follows each."""
    return head.model.logits(head.model(x)[0])


@pytest.fixture(scope="module")
def language():
    return Language(language_models.init(CONFIG, jax.random.key(0)), CONFIG, text.ByteTokenizer())


@pytest.fixture
def batch(rng):
    """Three items of 7, 3 and no frames, with 5, 2 and no tokens."""
    return {
        "latents": jnp.asarray(rng.normal(size=(3, 7, 8)), jnp.float32),
        "frames": jnp.array([7, 3, 0]),
        "task": jnp.array([0, 1, 2]),
        "text": jnp.asarray(rng.integers(0, 256, (3, 5))),
        "length": jnp.array([5, 2, 0]),
    }


def test_padding_changes_nothing(language, batch):
    expected = language.apply(*batch.values())
    padded = batch | {"latents": batch["latents"].at[1, 3:].set(jnp.nan).at[2].set(jnp.nan)}
    padded["text"] = batch["text"].at[1, 2:].set(7)
    np.testing.assert_array_equal(language.apply(*padded.values()), expected)
    for i in range(3):
        item = {name: x[i : i + 1] for name, x in batch.items()}
        item["latents"] = item["latents"][:, : max(1, int(batch["frames"][i]))]
        item["text"] = item["text"][:, : max(1, int(batch["length"][i]))]
        np.testing.assert_allclose(language.apply(*item.values())[0], expected[i], rtol=1e-5)


def test_gradients_reach_the_audio_and_stop_at_its_end(language, batch):
    gradient = jax.grad(lambda x: language.apply(x, *list(batch.values())[1:])[:2].sum())(
        batch["latents"]
    )
    reached = np.abs(gradient).max(-1) > 0
    frames = np.arange(7) < np.asarray(batch["frames"])[:, None]
    np.testing.assert_array_equal(reached, frames)


@pytest.mark.parametrize("attention", ["dense", "blocked", "splash"])
def test_generation_is_the_likeliest_text(language, batch, attention):
    """Each token is the likeliest one after those before it, in any batch, by any attention."""
    config = dataclasses.replace(CONFIG, head_dim=64) if attention == "splash" else CONFIG
    compute = ComputeConfig(attention=attention)
    params = language.params
    if attention == "splash":
        params = language_models.init(config, jax.random.key(0))
    language = Language(params, config, language.tokenizer, compute)
    latents, frames, task = batch["latents"], batch["frames"], batch["task"]
    sampling = Sampling(max_tokens=6)
    tokens, lengths = generate.generate(
        language, latents, frames, task, jax.random.key(0), sampling
    )
    alone, _ = generate.generate(
        language, latents[1:2, :3], frames[1:2], task[1:2], jax.random.key(0), sampling
    )
    np.testing.assert_array_equal(alone[0], tokens[1])
    prefix = language.apply(latents, task, method="prompt")
    written = language.params["model"]["embedding"][jnp.pad(tokens, ((0, 0), (1, 0)),
                                                            constant_values=256)]  # fmt: skip
    for item in range(3):
        start = int(frames[item]) + 1
        x = jnp.concatenate([prefix[item, :start], written[item]])
        logits = language.apply(x[None], method=score)[0, start:-1]
        np.testing.assert_array_equal(jnp.argmax(logits, axis=-1), tokens[item])


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(1.0), {0, 1, 2, 3}),
        (Sampling(1.0, top_k=2), {1, 2}),
        (Sampling(1.0, top_p=0.5), {1}),
        (Sampling(1.0, top_p=0.7), {1, 2}),
        (Sampling(1.0, top_k=2, top_p=0.7), {1}),  # 0.6 of the 0.85 that are left
        (Sampling(1.0, top_k=10**12), {0, 1, 2, 3}),
        (Sampling(0.01), {1}),
        (Sampling(), {1}),
    ],
)
def test_sampling(sampling, allowed):
    logits = jnp.log(jnp.array([[0.1, 0.6, 0.25, 0.05]]))
    keys = jax.random.split(jax.random.key(0), 300)
    drawn = {int(t) for t in jax.vmap(lambda k: generate.choose(logits, k, sampling)[0])(keys)}
    assert drawn == allowed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1}, "temperature must be 0..100"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"max_tokens": 0}, "max_tokens must be 1.."),
    ],
)
def test_bad_sampling(change, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**change)


def test_bytes():
    tokenizer = text.load("bytes")
    assert tokenizer.decode([*tokenizer.encode("zwölf €"), 256]) == "zwölf €"
    assert tokenizer.decode([0xC3]) == "\ufffd"


def word_tokenizer(path):
    """A tokenizer.json of a few words."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<|endoftext|>": 0, "one": 1, "two": 2, "[UNK]": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(path))


def test_tokenizer_files(tmp_path):
    word_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = text.load(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.end_id) == (4, 0)
    assert tokenizer.encode("two one") == [2, 1]
    assert tokenizer.decode([2, 1]) == "two one"
    library = pytest.importorskip("tokenizers").Tokenizer.from_file(
        str(tmp_path / "tokenizer.json")
    )
    library.enable_padding(length=8)
    library.enable_truncation(1)
    library.save(str(tmp_path / "tokenizer.json"))
    assert text.load(tmp_path).encode("two one") == [2, 1] and text.load(tmp_path).encode("") == []
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer.json"):
        text.load(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="no such tokenizer.json"):
        text.load(tmp_path / "none")


def test_a_tokenizer_without_an_end_gets_one(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"one": 0, "two": 9}, unk_token="one")  # ids with gaps
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    tokenizer = text.load(tmp_path)
    assert (tokenizer.end_id, tokenizer.vocab_size) == (10, 11)
    assert tokenizer.encode("two") == [9] and tokenizer.decode([9, 10]) == "two"


# ------------------------------------------------------------------------------------ Qwen2.5

QWEN = {
    "model_type": "qwen2", "vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32,
    "rope_theta": 1e4, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip


def qwen_weights(rng) -> dict[str, np.ndarray]:
    d, f, h = 24, 32, 6
    sizes = {"self_attn.q_proj": (24, d), "self_attn.k_proj": (2 * h, d),
             "self_attn.v_proj": (2 * h, d), "self_attn.o_proj": (d, 24),
             "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}  # fmt: skip
    weights = {
        "model.embed_tokens.weight": rng.normal(size=(40, d)),
        "model.norm.weight": 1 + rng.normal(size=d) / 9,
    }
    for i in range(2):
        for name, shape in sizes.items():
            weights[f"model.layers.{i}.{name}.weight"] = rng.normal(size=shape) / 4
            if name[-6] in "qkv":
                weights[f"model.layers.{i}.{name}.bias"] = rng.normal(size=shape[0])
        for name in ("input", "post_attention"):
            weights[f"model.layers.{i}.{name}_layernorm.weight"] = 1 + rng.normal(size=d) / 9
    return {name: np.float32(x) for name, x in weights.items()}


def write_qwen(folder, weights, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(QWEN | changes))
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    word_tokenizer(folder / "tokenizer.json")


def qwen_logits(w: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """The maths of Qwen2 once more, in float64 for one sequence, query by query."""
    w = {name: np.float64(x) for name, x in w.items()}

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale

    def rotate(x):  # [T, heads, 6], frequency j of the pair (j, j + 3)
        angles = np.arange(len(x))[:, None, None] * 1e4 ** (-np.arange(3) / 3)
        z = (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * angles)
        return np.concatenate([z.real, z.imag], -1)

    x = w["model.embed_tokens.weight"][tokens]
    for i in range(2):
        p = {n.split(".", 3)[3]: v for n, v in w.items() if n.startswith(f"model.layers.{i}.")}
        y = norm(x, p["input_layernorm.weight"])
        q, k, v = (
            (y @ p[f"self_attn.{n}_proj.weight"].T + p[f"self_attn.{n}_proj.bias"]).reshape(
                len(y), -1, 6
            )
            for n in "qkv"
        )
        q, k, out = rotate(q), rotate(k), np.zeros_like(q)
        for t in range(len(y)):
            for head in range(4):
                scores = k[: t + 1, head // 2] @ q[t, head] / np.sqrt(6)
                share = np.exp(scores - scores.max())
                out[t, head] = share / share.sum() @ v[: t + 1, head // 2]
        x = x + out.reshape(len(y), -1) @ p["self_attn.o_proj.weight"].T
        y = norm(x, p["post_attention_layernorm.weight"])
        gate = y @ p["mlp.gate_proj.weight"].T
        gate = gate / (1 + np.exp(-gate)) * (y @ p["mlp.up_proj.weight"].T)
        x = x + gate @ p["mlp.down_proj.weight"].T
    return norm(x, w["model.norm.weight"]) @ w["model.embed_tokens.weight"].T


def test_qwen_weights_give_qwens_logits(tmp_path, rng):
    weights = qwen_weights(rng)
    write_qwen(tmp_path / "qwen", weights)
    config, tokenizer = language_models.find(str(tmp_path / "qwen"), "", 8, "codes")
    assert (config.vocab_size, config.head_dim, tokenizer.vocab_size) == (40, 6, 4)
    params = language_models.start(str(tmp_path / "qwen"), config)
    tokens = rng.integers(0, 40, 9)
    embedded = jnp.asarray(weights["model.embed_tokens.weight"][tokens])[None]
    language = Language(params, config, tokenizer)
    found = language.apply(embedded, method=score)[0]
    np.testing.assert_allclose(found, qwen_logits(weights, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "drop", "message"),
    [
        ({"model_type": "llama"}, "", "model_type must be 'qwen2', got 'llama'"),
        ({"tie_word_embeddings": False}, "", "tie_word_embeddings must be True"),
        ({"use_sliding_window": True}, "", "use_sliding_window must be False"),
        ({"rope_scaling": {"type": "yarn"}}, "", "rope_scaling must be None"),
        ({"num_key_value_heads": 3}, "", "must be a multiple of num_kv_heads"),
        ({"hidden_size": 32}, "", "has shape"),
        ({}, "model.norm.weight", "missing model.norm.weight"),
    ],
)
def test_other_models_are_refused(tmp_path, rng, changes, drop, message):
    weights = qwen_weights(rng)
    weights.pop(drop, None)
    write_qwen(tmp_path / "qwen", weights, **changes)
    with pytest.raises(ValueError, match=message):
        config = qwen.read_config(tmp_path / "qwen", 8, 0, "codes")
        qwen.read_params(tmp_path / "qwen", config)


def test_a_repeated_embedding_must_be_the_same(tmp_path, rng):
    weights = qwen_weights(rng)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    write_qwen(tmp_path / "qwen", weights)
    config = qwen.read_config(tmp_path / "qwen", 8, 0, "codes")
    assert "lm_head.weight" not in qwen.read_params(tmp_path / "qwen", config)
    write_qwen(tmp_path / "other", weights | {"lm_head.weight": weights["lm_head.weight"] + 1})
    with pytest.raises(ValueError, match="is not the embedding"):
        qwen.read_params(tmp_path / "other", config)


def test_presets():
    shapes = language_models.boxed_shapes(preset("0.5b", 768, 151936, 151643))
    count = sum(x.size for x in jax.tree.leaves(shapes["model"]))
    assert count == 494_032_768  # as published
    with pytest.raises(ValueError, match="language_model must be one of tiny, small, 0.5b"):
        preset("big", 8, 257, 256)


# ------------------------------------------------------------------------------------ errors


def test_error_rates():
    rates = transcription.error_rates(
        ["Don't stop, please!", "one  two", ""], ["don\u2019t stop", "one three two", "noise"]
    )
    assert rates["wer"] == pytest.approx(2 / 5)
    assert transcription.normalize("“Rock 'n' roll” — 24-bit") == "rock n roll 24 bit"
    with pytest.raises(ValueError, match="at least one reference"):
        transcription.error_rates([" "], ["x"])


def test_short_recordings_are_transcribed_by_one_program(micro, language, rng, monkeypatch):
    shapes = set()

    def note_shape(language, latents, *_):
        shapes.add(latents.shape[:2])
        return np.zeros((len(latents), 1), np.int32), np.zeros(len(latents), np.int32)

    monkeypatch.setattr(generate, "generate", note_shape)
    codes = [rng.integers(0, 16, (2, size)) for size in range(1, 16)]
    assert generate.transcribe_codes(micro, language, codes) == [""] * 15
    assert generate.transcribe(micro, language, codes[4][None]) == [""]
    assert shapes == {(16, 32), (1, 32)}


def test_a_codec_without_language_model(micro, tmp_path):
    pretrained.save(tmp_path / "c", micro.config, micro.params)
    with pytest.raises(ValueError, match="has no language model; train one with"):
        language_models.load(tmp_path / "c")


def test_configs_of_other_versions():
    """What a file lacks takes its default; what is not known would change the result."""
    config = LanguageConfig(8, 257, 256, 16, 1, 2, 1, 24)
    fields = json.loads(config.to_json())
    for name in ("rope_theta", "audio", "head_dim"):
        del fields[name]
    assert LanguageConfig.from_json(json.dumps(fields)) == config
    with pytest.raises(ValueError, match="unknown key 'frob' in language model"):
        LanguageConfig.from_json(json.dumps(fields | {"frob": 1}))
    del fields["model_dim"]
    with pytest.raises(ValueError, match="missing key 'model_dim' in language model"):
        LanguageConfig.from_json(json.dumps(fields))
