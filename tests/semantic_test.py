"""The semantic head in training: what it sees, what it teaches, and whole runs with it."""

import dataclasses
import html
import json
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import spoken_digits
from helpers import (
    CODEC,
    GOLDEN,
    LANGUAGE,
    PRETRAIN,
    SEMANTIC,
    SHALLOW,
    init_state,
    leaves_equal,
    make_clips,
    make_recipe,
    small_run,
    text_batch,
    train,
)
from tokenizers import pre_tokenizers

import moss_tok
from moss_tok import sharding
from moss_tok.audio import files
from moss_tok.cli.main import main
from moss_tok.data import pipeline, sources
from moss_tok.data.pipeline import SegmentShape
from moss_tok.language import generate, text
from moss_tok.language import pretrained as language_models
from moss_tok.objectives import text as text_term
from moss_tok.objectives.config import TextSettings, configure
from moss_tok.training import optimizer, writer
from moss_tok.training import state as states
from moss_tok.training import step as steps
from moss_tok.training.config import RunConfig

RECOGNITION = {
    name: SEMANTIC[name]
    for name in ("learning_rate", "warmup_steps", "batch_size", "segment_seconds", "mesh",
                 "language_model", "max_text_tokens")
} | {"trainable": "language", "init_from": "x"}  # fmt: skip
pytestmark = pytest.mark.usefixtures("small_language_model")
SHAPE = SegmentShape(2048, 8000, 1, text.ByteTokenizer(), 4)
# The semantic loss alone.
ALONE = SEMANTIC | dict(
    reconstruction_weight=0.0, commitment_weight=0.0, codebook_weight=0.0, reseed_every=0,
    weight_decay=0.0,
)  # fmt: skip


def one_step(flags, batch, codec=SHALLOW):
    recipe = make_recipe(flags, codec, LANGUAGE)
    state = init_state(recipe)
    before = jax.tree.map(np.asarray, state.params)
    state, metrics = steps.train_step(recipe, state, batch)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), state.params, before)
    return state, metrics, moved


def largest(tree):
    return max(jax.tree.leaves(tree))


def test_the_text_teaches_the_encoder_through_the_quantizer():
    state, metrics, moved = one_step(ALONE, text_batch())
    assert min(jax.tree.leaves(moved["encoder"])) > 0
    assert largest(moved["language"]) > 0
    assert largest(moved["decoder"]) == 0  # what the text says nothing of
    assert float(metrics["loss"]) == pytest.approx(20 * float(metrics["semantic_loss"]))
    values = writer.summarize(make_recipe(ALONE, SHALLOW, LANGUAGE), state)
    assert values["semantic_loss"] == pytest.approx(float(metrics["semantic_loss"]))


def test_audio_without_text_teaches_nothing_and_changes_nothing():
    state, metrics, moved = one_step(ALONE, text_batch(lengths=(0,)))
    assert largest(moved) == 0 and float(metrics["semantic_loss"]) == 0
    assert "semantic_loss" not in writer.summarize(make_recipe(ALONE, SHALLOW, LANGUAGE), state)
    # In a mixed batch it counts for as much as alone: the mean is over what has text.
    batch = text_batch(lengths=(3, 0, 0, 0))
    _, mixed, _ = one_step(ALONE, batch)
    # Four times the same item; a batch of one would be compiled anew.
    _, alone, _ = one_step(ALONE, jax.tree.map(lambda x: jnp.repeat(x[:1], 4, axis=0), batch))
    assert float(mixed["semantic_loss"]) == pytest.approx(float(alone["semantic_loss"]), rel=1e-5)


@pytest.mark.parametrize("audio", ["codes", "latents"])
def test_dropout_reaches_what_the_head_hears(audio):
    """With codes the head hears the quantizers that are kept, and no others."""
    recipe = make_recipe(SEMANTIC, SHALLOW, dataclasses.replace(LANGUAGE, audio=audio))
    params = init_state(recipe).params

    @jax.jit
    def loss(keep):
        part = text_batch() | {"in_use": keep}
        return recipe.objective.outputs(params, part)[0]["semantic_loss"]

    every = jnp.ones((4, 4), bool)
    differs = np.asarray(loss(every) != loss(every.at[0, 2:].set(False)))
    np.testing.assert_array_equal(differs, [audio == "codes", False, False, False])


def test_hidden_frames():
    batch = text_batch() | {"length": jnp.array([2048, 1024, 16, 2048])}
    hidden = np.stack([
        text_term.draw_hidden_frames(
            0.5, 128, jax.random.key(seed), batch["position"], CODEC.num_frames(batch["length"])
        )
        for seed in range(40)
    ])  # fmt: skip
    assert hidden.shape == (40, 4, 128)
    assert 0.1 < hidden[:, 0].mean() < 0.4 and hidden[:, 0].mean(-1).max() <= 0.52
    assert not hidden[:, 1, 64:].any() and hidden[:, 1, :64].any()
    assert (hidden[:, 0] != hidden[:, 3]).any()


def test_the_other_losses_are_what_they_are_without_it():
    _, metrics, moved = one_step(SEMANTIC | dict(language_mask=0.5), text_batch(), CODEC)
    assert np.isfinite(metrics["semantic_loss"]) and largest(moved["encoder"]) > 0
    plain = json.loads((GOLDEN / "train_step.json").read_text())["pretrain"]
    for name in ("reconstruction_loss", "commitment_loss", "codebook_loss"):
        assert float(metrics[name]) == pytest.approx(plain[name], rel=1e-3), name


def test_a_frozen_codec_stays_and_is_not_decoded():
    config = RECOGNITION
    assert make_recipe(config).objective.term_names == ("semantic_loss",)
    _, metrics, moved = one_step(config, text_batch())
    assert largest([moved[side] for side in ("encoder", "quantizer", "decoder")]) == 0
    assert largest(moved["language"]) > 0 and "reconstruction_loss" not in metrics


def test_the_language_model_has_a_learning_rate_of_its_own():
    config = SEMANTIC | dict(language_learning_rate=0.0)
    recipe = make_recipe(config, SHALLOW, LANGUAGE)
    params = jax.tree.map(jnp.ones_like, jax.eval_shape(lambda: init_state(recipe).params))
    transformation = optimizer.of_objective(recipe.optimizer, recipe.objective)
    updates, _ = jax.jit(transformation.update)(params, transformation.init(params), params)
    moved = jax.tree.map(lambda x: float(np.abs(x).max()), updates)
    assert largest(moved["language"]) == 0 < largest(moved["encoder"])


def test_optimizers_without_it_are_what_they_were():
    """Or a run that began before there were language models could not go on."""
    for config, groups in ((PRETRAIN, 2), (SEMANTIC, 3)):
        recipe = make_recipe(config, language=LANGUAGE if config is SEMANTIC else None)
        state = jax.eval_shape(lambda recipe=recipe: init_state(recipe).opt_state)
        assert len(state[1].inner_states) == groups


# ------------------------------------------------------------------------------------ data


def test_texts_come_with_whole_recordings_only(tmp_path, clips):
    rows = [json.loads(line) for line in (clips / "manifest.jsonl").read_text().splitlines()]
    lines = {  # 0.1 s, 1 s, 0.1 s, 0.1 s: segments are of 0.256 s
        "short": rows[2] | {"transcript": " hé "},
        "long": rows[0] | {"transcript": "hi"},
        "caption": rows[2] | {"transcript": None, "caption": "hum"},
        "speakers": rows[2] | {"task": "transcribe_speakers", "transcript": "a"},
        "too long": rows[2] | {"transcript": "four+"},
    }
    expected = {"short": ("hé", 0), "long": ("", 0), "caption": ("hum", 2), "speakers": ("a", 1),
                "too long": ("", 0)}  # fmt: skip
    for name, row in lines.items():
        source = clips / f"{name}.jsonl"
        source.write_text(json.dumps(row | {"split": "train"}) + "\n")
        mixture = sources.training_mixture(str(source), 0.256)
        stream = pipeline.batches(configure(**SEMANTIC).data, mixture, SHAPE)
        batch = next(stream)
        found = text.ByteTokenizer().decode(batch["text"][0][: batch["text_length"][0]].tolist())
        assert (found, batch["task"][0]) == expected[name], name


def test_speed_and_shift(clips):
    """Faster and slower recordings keep their text as long as they fit; silence comes before."""
    row = {"path": "2.flac", "split": "train", "transcript": "x"}  # 0.1 s, of 0.256 s
    source = clips / "one.jsonl"
    source.write_text(json.dumps(row) + "\n")
    config = SEMANTIC | dict(augment_speed=0.3, augment_shift_seconds=0.05)
    mixture = sources.training_mixture(str(source), 0.256)
    stream = pipeline.batches(configure(**config).data, mixture, SHAPE)
    silent, sizes = [], []
    for _ in range(8):
        batch = next(stream)
        assert (batch["text_length"] == 1).all()
        silent += [int(np.argmax(wav[0] != 0)) for wav in batch["wav"]]
        sizes += [int(n) - s for n, s in zip(batch["length"], silent[-4:], strict=True)]
    assert max(silent) <= 400 and len(set(silent)) > 10
    assert 610 <= min(sizes) < 700 and 1000 < max(sizes) <= 1150


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"transcript": 7}, "transcript must be a text, got 7"),
        ({"caption": ["x"]}, "caption must be a text"),
        ({"transcript": "\ud800"}, "transcript has half a surrogate pair"),
        ({"task": "sing"}, "task must be one of transcribe, transcribe_speakers, caption"),
    ],
)
def test_bad_manifests(clips, fields, message):
    source = clips / "bad.jsonl"
    source.write_text(json.dumps({"path": "0.flac"} | fields) + "\n")
    with pytest.raises(ValueError, match=message):
        sources.training_mixture(str(source), 1.0)


# ------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return make_clips(tmp_path_factory.mktemp("clips"), [1.0, 0.2, 0.1, 0.2, 0.2, 0.1])


@pytest.fixture(scope="module")
def finished(clips, tmp_path_factory):
    """A run of 4 steps of both losses, and its config."""
    folder = tmp_path_factory.mktemp("finished")
    config = small_run(
        SEMANTIC, clips, folder, num_steps=4, checkpoint_every=2, num_eval_clips=2
    )  # fmt: skip
    assert train(config, draws_curves=True)
    return config


def test_a_run_goes_on_where_it_stopped(finished, tmp_path):
    config = finished | dict(workdir=str(tmp_path / "run"), num_eval_clips=0)
    for num_steps in (2, 4):
        assert train(config | dict(num_steps=num_steps))
    a, b = (language_models.load(c["workdir"]).params for c in (finished, config))
    assert leaves_equal(a, b)
    assert leaves_equal(*(moss_tok.load(c["workdir"]).params for c in (finished, config)))


def test_the_head_of_a_codec_goes_before_published_weights(finished, monkeypatch):
    """A second stage, or recognition, goes on with what the first one taught."""
    monkeypatch.setattr(language_models, "start", lambda *_: pytest.fail("started anew"))
    config = finished | dict(init_from=finished["workdir"])
    recipe = make_recipe(config, codec=None)
    shapes = states.state_shapes(recipe, sharding.make_mesh("data:1"))
    objective = recipe.objective
    params, _ = objective.start(config["init_from"], shapes.params, shapes.extra, print)
    assert leaves_equal(params["language"], language_models.load(finished["workdir"]).params)
    other = dataclasses.replace(objective, tokenizer=types.SimpleNamespace(json="{}"))
    with pytest.raises(pytest.fail.Exception, match="started anew"):
        other.start(config["init_from"], shapes.params, shapes.extra, print)


def test_the_codec_of_a_run_needs_no_language_model(finished):
    codec = moss_tok.load(finished["workdir"])
    assert set(codec.params) == {"encoder", "quantizer", "decoder"}
    rows = writer.read_rows(Path(finished["workdir"]) / writer.EVALUATION)
    assert set(rows[-1]["table"]["text"]["4 quantizers"]) == {"wer", "cer", "exact"}


def test_transcribe(finished, clips, tmp_path, capsys):
    checkpoint = f"--checkpoint={finished['workdir']}"
    assert main(["encode", str(clips / "1.flac"), str(tmp_path / "1.npz"), checkpoint]) == 0
    capsys.readouterr()
    outputs = []
    for source in (clips / "1.flac", tmp_path / "1.npz"):
        assert main(["transcribe", str(source), checkpoint, "--max-tokens=5"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    (tmp_path / "bad.npz").write_bytes(b"x")
    assert main(["transcribe", str(tmp_path), checkpoint, "--max-tokens=5"]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("1.npz\t") and "failed:" in err and "bad.npz" in err


def test_evaluate_scores_what_is_understood(finished, clips, tmp_path, capsys, monkeypatch):
    data = tmp_path / "data.jsonl"
    rows = [{"path": str(clips / f"{i}.flac"), "transcript": t} for i, t in ((0, "a b"), (1, None))]
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    options = [f"--checkpoint={finished['workdir']}", f"--dataset={data}", "--num-quantizers=1,4"]
    out = f"--output={tmp_path / 'out'}"
    assert main(["evaluate", *options, out, "--metrics=stft,wer", "--name=m"]) == 0
    for number in (1, 4):
        folder = tmp_path / "out" / "m" / f"rvq{number}"
        found = json.loads((folder / "results.json").read_text())["data"]
        assert {"stft", "wer", "cer"} <= found.keys()
        texts = (folder / "data" / "texts.jsonl").read_text().splitlines()
        assert [json.loads(t)["text"] for t in texts] == ["a b"]
    assert "wer" in (tmp_path / "out" / "summary.md").read_text()
    page = (tmp_path / "out" / "report.html").read_text()
    said = [line["understood"] for line in map(json.loads, texts) if line["understood"]]
    assert page.count("<p>a b</p>") == 1 + said.count("a b")  # of the reference
    assert all(html.escape(words) in page for words in said)
    assert main(["evaluate", *options, f"--output={tmp_path / 'w'}", "--metrics=wer"]) == 0
    language = language_models.load(finished["workdir"])  # one that hears what codes come from
    config = dataclasses.replace(language.config, audio="latents")
    monkeypatch.setattr(language_models, "load", lambda _: language.replace(config=config))
    out = ["--name=l", f"--output={tmp_path / 'l'}"]
    assert main(["evaluate", *options, *out, "--metrics=wer"]) == 0
    text = (tmp_path / "l" / "l" / "rvq1" / "data" / "texts.jsonl").read_text()
    wav = files.read_native(tmp_path / "l" / "l" / "rvq1" / "data" / "gt_audios" / "000000_0.flac")
    heard = generate.transcribe_wavs(
        moss_tok.load(finished["workdir"]), language_models.load(""), [wav[0]],
        sampling=generate.Sampling(max_tokens=256),
    )  # fmt: skip
    assert [json.loads(text)["understood"]] == heard
    data.write_text(json.dumps(rows[1]) + "\n")
    assert main(["evaluate", *options, f"--output={tmp_path / 'o'}", "--metrics=wer"]) == 2
    assert "whose lines have a transcript" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task=sing"], "task must be one of"),
        (["--max-tokens=0"], "max_tokens must be 1"),
        (["--num-quantizers=5"], "num_quantizers must be 1..4"),
        (["--temperature=-1"], "temperature must be"),
        (["--seed=99999999999999999999"], "seed must be 0.."),
    ],
)
def test_bad_arguments_of_transcribe(finished, clips, capsys, arguments, message):
    source = str(clips / "1.flac")
    assert main(["transcribe", source, f"--checkpoint={finished['workdir']}", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_an_asr_run_starts_from_a_codec(finished, tmp_path):
    """On a frozen codec, with the language model that came with it or a new one."""
    config = {k: v for k, v in finished.items() if k not in ("mel_windows", "model")} | dict(
        init_from=finished["workdir"], trainable="language", num_steps=1,
        workdir=str(tmp_path / "run"), num_eval_clips=2,
    )  # fmt: skip
    assert train(config)
    assert leaves_equal(
        *(moss_tok.load(p).params for p in (finished["workdir"], config["workdir"]))
    )
    codec, language = moss_tok.load(config["workdir"]), language_models.load(config["workdir"])
    assert optax.tree.norm(language.params) > 0 and codec.config == SHALLOW


def test_a_run_without_a_tokenizer_takes_that_of_init_from(tmp_path):
    spoken_digits.write_tokenizer(
        tmp_path / "words.json", ["one two", "one two"], 20, pre_tokenizers.WhitespaceSplit()
    )
    settings = TextSettings(language_model="tiny", tokenizer=str(tmp_path / "words.json"))
    language, words = text_term.find_model(None, settings, SHALLOW)
    start = tmp_path / "start"
    (start / "params").mkdir(parents=True)
    for name, content in language_models.files(language, words).items():
        (start / name).write_text(content)
    (start / "config.json").write_text(SHALLOW.to_json())
    run = RunConfig(workdir=str(tmp_path / "new"), init_from=str(start))
    found = text_term.find_model(run, TextSettings(language_model="tiny"), SHALLOW)
    assert found[0] == language
    assert found[1].json == words.json
    # Bytes on demand; then the language model of init_from is not used, and a line says so.
    bytes_settings = TextSettings(language_model="tiny", tokenizer="bytes")
    other, tokenizer = text_term.find_model(run, bytes_settings, SHALLOW)
    assert tokenizer.json == text.ByteTokenizer().json
    lines = []
    head = text_term.start_params(
        bytes_settings, other, tokenizer, str(start), None, say=lines.append
    )
    assert head == (None, False)
    assert len(lines) == 1
    assert lines[0].startswith(f"the language model of {start} is not used: it has another ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainable": "language", "init_from": ""}, "trainable=language needs init_from"),
        ({"trainable": "language", "init_from": "x", "language_model": ""}, "needs language_model"),
        ({"trainable": "decoder", "init_from": "x"}, "language_model has no effect"),
        ({"language_input": "wav"}, "language_input must be one of codes, latents"),
        ({"objective": "recognition", "init_from": ""}, "objective=recognition needs init_from"),
        (
            {"objective": "codec", "trainable": "language", "init_from": "x"},
            "objective=codec cannot have trainable=language",
        ),
        ({"objective": "codec", "stage": "adversarial"}, "objective=codec needs stage=pretrain"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        configure(**RECOGNITION | {"trainable": "all"} | changes)


def test_no_such_language_model(clips, tmp_path):
    config = small_run(SEMANTIC, clips, tmp_path, num_steps=1)
    with pytest.raises(ValueError, match="language_model must be one of tiny, small, 0.5b or a"):
        train(config | dict(language_model="big"))
    with pytest.raises(ValueError, match="no such tokenizer.json"):
        train(config | dict(tokenizer="none"))
    for changes in ({"max_text_tokens": 1}, {"segment_seconds": 0.06}, {"train_data": ""}):
        changed = config | dict(mel_windows="64", **changes)
        with pytest.raises(ValueError, match="train_data has no recording of at most"):
            train(changed)
    assert not (tmp_path / "run").exists()
