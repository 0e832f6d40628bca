"""The official layout of speech models: parity with the official class, conversion, refusals."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from helpers import leaves_equal

import moss_tok
from moss_tok import speech
from moss_tok.cli.main import main
from moss_tok.nn import blocks
from moss_tok.nn.cache import Span
from moss_tok.nn.compute import ComputeConfig
from moss_tok.speech import config as configs
from moss_tok.speech import huggingface, huggingface_config, pretrained
from moss_tok.speech.layout import CHAT_TOKENS
from moss_tok.speech.model import SpeechModel

UNUSED = "model.language_model.embed_tokens.weight"  # stored by the official class, never read


@pytest.fixture(scope="module")
def tiny(golden_dir):
    config, params = huggingface.read_official(golden_dir / "tts_tiny")
    return config, jax.tree.map(jnp.asarray, params)


@pytest.fixture(scope="module")
def expected(golden_dir):
    return dict(np.load(golden_dir / "tts_tiny" / "expected.npz"))


@pytest.fixture
def official(golden_dir, tmp_path):
    return shutil.copytree(golden_dir / "tts_tiny", tmp_path / "official")


@pytest.mark.parametrize(("num_quantizers", "suffix"), [(3, ""), (2, "_2_quantizers")])
def test_teacher_forced_logits(tiny, expected, num_quantizers, suffix):
    config, params = tiny
    in_use = jnp.broadcast_to(jnp.arange(3) < num_quantizers, (2, 3))
    found = jax.jit(SpeechModel(config).apply)(
        {"params": params}, expected["text"], expected["codes"], in_use
    )
    np.testing.assert_allclose(found[0], expected[f"text_logits{suffix}"], atol=1e-4)
    codes = found[1][:, :num_quantizers]
    np.testing.assert_allclose(codes, expected[f"code_logits{suffix}"], atol=1e-4)


class Greedy:
    """Takes the most likely token and codes, step by step on caches."""

    def __init__(self, config, params):
        self.config = config

        def apply(*args, method):
            return SpeechModel(config).apply({"params": params}, *args, method=method)

        @jax.jit
        def temporal(text, codes, start, cache, num_quantizers):
            in_use = (jnp.arange(config.num_quantizers) < num_quantizers)[None]
            x = apply(text, codes, in_use, method="embed")
            span = Span(start[None], jnp.full(1, text.shape[1]))
            return apply(x, cache, span, method="temporal_states")

        @jax.jit
        def depth(x, channel, cache):
            span = Span(channel[None], jnp.ones(1, jnp.int32))
            return apply(x, cache, span, method="depth_states")

        def head(m, state, channel):
            state = m.out.states(state, slice(channel, channel + 1))
            if channel == 0:
                return m.out.text_logits(state[0, 0])
            logits = m.out.code_logits(state, slice(channel - 1, channel))[0, 0]
            return logits[: config.codebook_size]  # no code is never sampled

        self.temporal = temporal
        self.depth = depth
        self.head = jax.jit(lambda x, channel: apply(x, channel, method=head), static_argnums=1)
        tables = [params["text_embedding"], *params["code_embeddings"]]
        self.embed = lambda channel, token: jnp.asarray(tables[channel][token])[None, None]

    def frame(self, x, num_quantizers):
        """The next position from the temporal state [1, 1, D]: [1 + Q]; 0 where none is in use."""
        c = self.config
        compute = ComputeConfig()
        cache = blocks.empty_cache(c.depth.block, c.depth.num_layers, compute, 1, c.num_channels)
        chosen = np.zeros(c.num_channels, int)
        for channel in range(1 + num_quantizers):
            state, cache = self.depth(x, jnp.int32(channel), cache)
            chosen[channel] = np.argmax(self.head(state, channel))
            x = self.embed(channel, chosen[channel])
        return chosen

    def run(self, prompt, num_steps, num_quantizers):
        c = self.config
        levels = jnp.int32(num_quantizers)
        compute = ComputeConfig()
        size = len(prompt) + num_steps
        cache = blocks.empty_cache(c.temporal.block, c.temporal.num_layers, compute, 1, size)
        codes = jnp.full((1, c.num_quantizers, len(prompt)), c.codebook_size)
        text = jnp.asarray(prompt)[None]
        states, cache = self.temporal(text, codes, jnp.int32(0), cache, levels)
        positions = [self.frame(states[:, -1:], num_quantizers)]
        while positions[-1][0] != c.end_id and len(positions) < num_steps:
            start = jnp.int32(len(prompt) + len(positions) - 1)
            last = jnp.asarray(positions[-1])[None]
            states, cache = self.temporal(last[:, :1], last[:, 1:, None], start, cache, levels)
            positions.append(self.frame(states, num_quantizers))
        return np.array(positions)


def test_greedy_generation(tiny, expected):
    """Of all quantizers, until the end token is predicted or not, and of the first two."""
    greedy = Greedy(*tiny)
    for number in range(3):
        num_quantizers = int(expected[f"greedy_{number}_num_quantizers"])
        found = greedy.run(expected[f"prompt_{number}"], 10, num_quantizers)
        np.testing.assert_array_equal(found, expected[f"greedy_{number}"])


def weights(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


def change_weights(folder, change):
    tensors = weights(folder)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def to_bfloat16(tensors):
    for name in tensors:
        tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)


def tie(tensors):
    tensors[UNUSED] = tensors["model.embedding_list.0.weight"]


@pytest.mark.parametrize("change", [lambda tensors: None, tie, to_bfloat16])
def test_conversion_is_exact_in_both_directions(official, tmp_path, capsys, change):
    change_weights(official, change)
    (official / "tokenizer.json").write_text("{}")
    (official / "training.json").write_text('{"steps": 7}')
    assert main(["convert", str(official), str(tmp_path / "ours")]) == 0
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "again")]) == 0
    assert (tmp_path / "ours" / "unused").exists() == (change is not tie)
    before = weights(official)
    after = weights(tmp_path / "again")
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert after[name].dtype == np.float32
        np.testing.assert_array_equal(after[name], array.astype(np.float32), name)
    fields = [json.loads((p / "config.json").read_text()) for p in (official, tmp_path / "again")]
    classes = fields[1].pop("auto_map").values()
    assert all(name.startswith("OpenMOSS-Team/MOSS-TTS-Local-Transformer--") for name in classes)
    assert fields[0] == fields[1]
    assert (tmp_path / "again" / "tokenizer.json").read_text() == "{}"
    capsys.readouterr()
    descriptions = []
    for name in ("official", "ours", "again"):
        assert main(["info", str(tmp_path / name)]) == 0
        descriptions.append(capsys.readouterr().out)
    assert descriptions[0] == descriptions[1] == descriptions[2]
    assert "12.5 Hz, 3 codebooks of 7" in descriptions[0]
    assert json.loads((tmp_path / "again" / "training.json").read_text()) == {"steps": 7}
    assert "7 steps" in descriptions[0]


def test_weights_that_a_type_cannot_hold(official, tmp_path, capsys):
    def change(tensors):
        tensors["local_transformer.norm.weight"] *= 1e6

    change_weights(official, change)
    argv = ["convert", str(official), str(tmp_path / "ours"), "--dtype=float16"]
    assert main(argv) == 2
    assert "float16 holds numbers up to 65504" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def test_bad_tensors_are_all_named(official, tmp_path, capsys):
    def change(tensors):
        del tensors["local_transformer.norm.weight"]
        tensors["lm_heads.4.weight"] = tensors["lm_heads.3.weight"]
        tensors["lm_heads.3.weight"] = tensors["lm_heads.3.weight"][:-1]

    change_weights(official, change)
    assert main(["convert", str(official), str(tmp_path / "ours")]) == 2
    message = capsys.readouterr().err
    for part in (
        "3 bad tensors",
        "missing local_transformer.norm.weight",
        "unknown lm_heads.4.weight",
        "lm_heads.3.weight has shape (7, 16), not (8, 16)",
    ):
        assert part in message  # fmt: skip
    assert not (tmp_path / "ours").exists()


def update(**changes):
    return lambda fields: fields.update(changes)


def update_language(**changes):
    return lambda fields: fields["language_config"].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("local_num_layers"), "this is MossTTSDelay, the delay pattern, another"),
        (update(model_type="moss_tts_local"), "this is MossTTSLocal 1.5, another architecture"),
        (update(model_type="moss_tts_nano"), "this is MOSS-TTS-Nano, another architecture; only "),
        (update(model_type="moss_tts_realtime"), "this is MOSS-TTS-Realtime, another architec"),
        (update(model_type="moss_tts_2"), "model_type must be 'moss_tts_delay', got 'moss_tts_2'"),
        (lambda c: c.pop("n_vq"), "missing key 'n_vq'"),
        (lambda c: c["language_config"].pop("head_dim"), "missing key 'head_dim'"),
        (update(audio_pad_code=0), "audio_pad_code must be 7, got 0"),
        (update(hidden_size=8), "hidden_size must be 16, got 8"),
        (update(n_vq="3"), "num_quantizers must be an integer, got '3'"),
        (update(audio_end_token_id=40), "end_id must be 0..39, got 40"),
        (update(language_config=None), "language_config must be an object"),
        (update(moss_tok={"a": 1}), "moss_tok must be an object of layout, frame_rate, codec"),
        (update_language(attention_bias=True), "attention_bias must be false, got true"),
        (update_language(use_sliding_window=True), "use_sliding_window must be false, got true"),
        (update_language(rope_parameters={"rope_type": "yarn", "rope_theta": 1.0}),
         'rope_type must be "default", got "yarn"'),
        (update_language(rope_parameters=[1]), "rope_parameters must be an object"),
        (update_language(num_key_value_heads=3), "must be a multiple of num_kv_heads 3"),
    ],
)  # fmt: skip
def test_other_architectures_and_variants_are_refused(official, tmp_path, capsys, change, message):
    fields = json.loads((official / "config.json").read_text())
    change(fields)
    (official / "config.json").write_text(json.dumps(fields))
    for command in (["info"], ["convert", str(tmp_path / "ours")]):
        assert main([command[0], str(official), *command[1:]]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and message in lines[0], lines
    assert not (tmp_path / "ours").exists()


def test_the_published_model(capsys):
    """Numbers: the official class with the published sizes; the published files have 556 tensors.

    Of its 3,037,799,936 parameters, 311,164,928 are the embedding that it never reads.
    """
    config = configs.published("tts-1.7b")
    table = huggingface.tensor_table(config)
    sizes = {tensor.name: int(np.prod(tensor.shape)) for tensor in table}
    assert len(table) == len(sizes) == 556
    assert sum(sizes.values()) == 3_037_799_936
    shapes = jax.tree.leaves(pretrained.boxed_shapes(config))
    assert sum(x.size for x in shapes) == sum(sizes.values()) - sizes[UNUSED] == 2_726_635_008
    assert main(["info", "tts-1.7b"]) == 0
    assert "parameters    2,726,635,008" in capsys.readouterr().out


def test_every_tensor_has_its_own_place():
    config = configs.preset("tiny", 300, 16, 4, 298, 299)
    table = huggingface.tensor_table(config)
    assert len({(t.path, t.row) for t in table}) == len(table)
    sizes = {}
    for tensor in table:
        size = int(np.prod(tensor.shape))
        sizes[tensor.path] = sizes.get(tensor.path, 0) + size
    del sizes[(huggingface.UNUSED,)]
    for path, leaf in jax.tree_util.tree_leaves_with_path(pretrained.boxed_shapes(config)):
        names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        assert sizes.pop(names) == leaf.size, names
    assert not sizes


@pytest.mark.parametrize("layout", configs.LAYOUTS)
def test_a_model_of_our_own_keeps_its_settings(tmp_path, layout):
    config = configs.preset(
        "tiny", 300, 16, 4, 298, 299, layout=layout, frame_rate=50.0, codec="f" * 16, start_id=256,
        max_positions=99,
    )  # fmt: skip
    text = huggingface_config.write_config(config, "float32")
    again = huggingface_config.read_config(text)
    assert dataclasses.replace(again, official_json="") == config
    assert json.loads(huggingface_config.write_config(again, "float32")) == json.loads(text)


def test_models_that_the_official_class_cannot_express(tmp_path, capsys, tiny):
    config = dataclasses.replace(tiny[0], official_json="")
    config = dataclasses.replace(config, depth=dataclasses.replace(config.depth, norm_epsilon=0.1))
    pretrained.save(tmp_path / "ours", config, tiny[1])
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "official")]) == 2
    assert "has one norm_epsilon for the temporal and the depth" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours"]


def test_load(official, tmp_path, golden_dir):
    """From an official directory and from its conversion, which need the tokenizer; not a codec."""
    with pytest.raises(ValueError, match="tokenizer.json: missing, or not the tokenizer"):
        speech.load(official)
    names = [*(f"word{i}" for i in range(40 - len(CHAT_TOKENS))), *CHAT_TOKENS]
    model = tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, "word0")
    tokenizers.Tokenizer(model).save(str(official / "tokenizer.json"))
    before = speech.load(official)
    assert main(["convert", str(official), str(tmp_path / "ours")]) == 0
    after = speech.load(tmp_path / "ours")
    assert leaves_equal(before.params, after.params)
    assert before.config == after.config and after.tokenizer.vocab_size == 40
    for folder in (official, tmp_path / "ours"):
        with pytest.raises(ValueError, match="this is a speech model, not a codec"):
            moss_tok.load(folder)
    with pytest.raises(ValueError, match="holds no speech model"):
        speech.load(golden_dir / "v1_tiny")
