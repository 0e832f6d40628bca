"""Training of a speech model: batches, layouts, exact resume, meshes, refusals, overfitting."""

import dataclasses
import itertools
import json
import re

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from helpers import CODEC, ROOT, init_params, leaves_equal, rows_without_timing, train

from moss_tok import sharding
from moss_tok.codec import pretrained as codecs
from moss_tok.codec.inference import Codec
from moss_tok.codec.presets import preset
from moss_tok.data import codes, speech_batches
from moss_tok.language.text import ByteTokenizer
from moss_tok.objectives import code_use
from moss_tok.objectives.config import all_fields, build_objective, configure
from moss_tok.objectives.speech import choose_samples
from moss_tok.speech import config as configs
from moss_tok.speech import generate, layout, pretrained
from moss_tok.speech.layout import Request
from moss_tok.speech.model import SpeechModel
from moss_tok.speech.sampling import GREEDY
from moss_tok.speech.steps import Speech
from moss_tok.training import state as states
from moss_tok.training import step as steps
from moss_tok.training import writer
from moss_tok.training.state import Recipe

BYTES = ByteTokenizer()
TEXTS = ("one", "seven", "six two")
NUM_QUANTIZERS, CODEBOOK_SIZE = 4, 16  # of CODEC


@pytest.fixture(scope="module", autouse=True)
def small_model():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(configs._SHAPES, "tiny", ((32, 1, 2, 1, 16, 48), (24, 1, 2, 1, 16, 32), 24))
        yield


def make_items(number=20):
    """Recordings of two speakers and of one who is not known; every fifth is held out."""
    generator = np.random.default_rng(0)
    items = []
    for i in range(number):
        found = generator.integers(0, CODEBOOK_SIZE, (NUM_QUANTIZERS, 5 + 3 * (i % 5)))
        metadata = {"transcript": TEXTS[i % 3], "split": "test" if i % 5 == 4 else "train"}
        if i % 3:
            metadata["speaker"] = f"s{i % 3}"
        items.append(codes.Item(str(i), found.astype(np.int16), 0, metadata))
    return items


def three_items():
    """One recording of each text; of equal size with it, so that batches mix them."""
    generator = np.random.default_rng(0)
    items = []
    for text in TEXTS:
        found = generator.integers(0, CODEBOOK_SIZE, (NUM_QUANTIZERS, 11 - len(text)))
        items.append(
            codes.Item(text, found.astype(np.int16), 0, {"transcript": text, "speaker": "a"})
        )
    return items


def write_codes(folder, items, fingerprint):
    """As `moss-tok tokenize` does."""
    folder.mkdir()
    plan = {"codec": fingerprint, "format": "arrayrecord", "num_quantizers": NUM_QUANTIZERS}
    (folder / "plan.json").write_text(json.dumps(plan))
    with codes.Writer(folder / "codes-00000-of-00001.array_record") as writer:
        for item in items:
            writer.write(item)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A codec, shards of codes, those of another codec, and JSON lines."""
    folder = tmp_path_factory.mktemp("speech")
    params = init_params(CODEC)
    codecs.save(folder / "codec", CODEC, params)
    part = {name: params[name] for name in ("encoder", "quantizer")}
    fingerprint = codecs.fingerprint(Codec(part, CODEC))
    write_codes(folder / "codes", make_items(), fingerprint)
    write_codes(folder / "three", three_items(), fingerprint)
    write_codes(folder / "others", make_items(), "0123")
    lines = []
    for item in make_items(8):
        row = {"audio_codes": item.codes.T.tolist(), "text": item.metadata["transcript"]}
        if item.id == "2":
            row |= {"ref_audio_codes": item.codes[:, :4].T.tolist(), "language": "en"}
        lines.append(json.dumps(row) + "\n")
    (folder / "lines.jsonl").write_text("".join(lines))
    (folder / "bad.jsonl").write_text(lines[0] + '{"audio_codes": [[1, 2], [3]], "text": "a"}\n')
    return folder


def flags_of(folder, workdir, **changes):
    return {
        "objective": "speech", "codec": str(folder / "codec"), "train_data": str(folder / "codes"),
        "workdir": str(workdir), "batch_size": 4, "segment_seconds": 0.1, "max_text_tokens": 8,
        "learning_rate": 1e-2, "warmup_steps": 2, "num_steps": 4, "log_every": 1,
        "checkpoint_every": 2, "num_eval_clips": 0, "mesh": "data:1",
    } | changes  # fmt: skip


def objective_of(folder, **changes):
    config = configure(**flags_of(folder, folder / "none", **changes))
    return build_objective(config, codec=CODEC)


def some_batches(folder, number, names=("codes",), start=0, rows=None, share=0.5):
    shape = dataclasses.replace(objective_of(folder).shape(), reference_share=share)
    sets = [speech_batches.read_set(codes.open_source(folder / n), "train", shape) for n in names]
    found = speech_batches.batches(sets, (1.0,) * len(sets), 4, shape, 0, start, rows)
    return list(itertools.islice(found, number))


def test_a_batch_is_a_function_of_its_number(folder):
    whole = some_batches(folder, 36, ("codes", "lines.jsonl"))
    later = some_batches(folder, 4, ("codes", "lines.jsonl"), start=32)  # in another window
    for a, b in zip(whole[32:], later, strict=True):
        assert leaves_equal(a, b)
    part = some_batches(folder, 4, ("codes", "lines.jsonl"), rows=[1, 3])
    for a, b in zip(whole, part, strict=False):
        assert all(np.array_equal(a[name][[1, 3]], b[name]) for name in a)


def test_short_recordings_share_one_length(folder):
    # Each length is a program, and compiling one takes longer than many steps of a small model.
    assert {batch["text"].shape for batch in some_batches(folder, 20)} == {(4, 64)}


def rows_of(batches):
    """The sequences of batches: tokens, codes, first."""
    for batch in batches:
        for text, frames, first, size in zip(
            batch["text"], batch["codes"], batch["first"], batch["length"], strict=True
        ):
            assert size - first <= len(batch["targets"][0])
            assert not text[size:].any() and (frames[:, size:] == CODEBOOK_SIZE).all()
            yield text[:size], frames[:, :size], first


def test_sequences_in_the_plain_layout(folder):
    config = objective_of(folder).config
    known = {item.codes.tobytes(): item for item in make_items()}
    num_references = 0
    for text, frames, first in rows_of(some_batches(folder, 20)):
        assert text[-1] == config.end_id and (text[first:-1] == config.slot_id).all()
        item = known[frames[:, first:-1].astype(np.int16).tobytes()]
        own = [*item.metadata["transcript"].encode(), config.start_id]
        assert text[first - len(own) : first].tolist() == own
        assert (frames[:, first - len(own) : first] == CODEBOOK_SIZE).all()
        before = first - len(own)
        if not before:
            continue
        num_references += 1
        slots = text[:before] == config.user_slot_id
        other = known[frames[:, :before][:, slots].astype(np.int16).tobytes()]
        assert other.id != item.id and other.metadata["speaker"] == item.metadata["speaker"]
        head = [*other.metadata["transcript"].encode(), config.start_id]
        assert text[: len(head)].tolist() == head and text[before - 1] == config.end_id
    assert 15 < num_references < 40  # of 80, of which two thirds have a speaker
    for _, frames, first in rows_of(some_batches(folder, 10, share=0.0)):
        assert (frames[:, :first] == CODEBOOK_SIZE).all()


def test_metadata_of_users(folder, tmp_path):
    """A key of the name that references have here, and a split that is not known."""
    shape = objective_of(folder).shape()
    items = three_items()
    items[0].metadata["reference"] = "a.wav"
    items[1].metadata["split"] = None
    write_codes(tmp_path / "codes", items, "0123")
    recordings = speech_batches.read_set(codes.open_source(tmp_path / "codes"), "train", shape)
    assert len(recordings) == 3 and recordings.reference_sizes.all()
    request = speech_batches.request_of(recordings.source[0])
    assert request.reference is None


def test_references_of_lines_have_the_limits_of_recordings(folder, tmp_path):
    shape = objective_of(folder).shape()
    lines = []
    for num_frames, words in ((4, ""), (shape.max_frames + 1, ""), (4, "more than eight tokens")):
        frames = [[1] * NUM_QUANTIZERS]
        row = {"audio_codes": frames * 3, "text": "one", "ref_audio_codes": frames * num_frames}
        lines.append(json.dumps(row | {"ref_text": words}) + "\n")
    (tmp_path / "lines.jsonl").write_text("".join(lines))
    source = codes.open_source(tmp_path / "lines.jsonl")
    assert speech_batches.read_set(source, "train", shape).indices.tolist() == [0]


def test_the_context_has_room_for_prompts_and_longer_recordings(folder, tmp_path):
    first = objective_of(folder)
    room = first.config.max_positions - first.num_positions
    assert room == first.max_frames + 8 + 2  # a reference, its text, its start and its end
    pretrained.save(tmp_path / "start", first.config, nn.meta.unbox(first.init(jax.random.key(0))))
    longer = objective_of(folder, init_from=str(tmp_path / "start"), segment_seconds=0.3)
    growth = longer.config.max_positions - first.config.max_positions
    assert growth == 2 * (longer.max_frames - first.max_frames) > 0
    shorter = objective_of(folder, init_from=str(tmp_path / "start"), segment_seconds=0.05)
    assert shorter.config.max_positions == first.config.max_positions


def test_json_lines(folder):
    shape = objective_of(folder).shape()
    source = codes.open_source(folder / "lines.jsonl")
    assert len(source) == 8 and source[2].metadata["transcript"] == "six two"
    sample = speech_batches.sample(shape, source[2])
    expected = layout.prompt(shape.config, BYTES, Request("six two", source[2].codes[:, :4]))
    assert sample.positions.text[: sample.first].tolist() == expected.text.tolist()
    with pytest.raises(ValueError, match=r"bad.jsonl:2: audio_codes must be lists"):
        speech_batches.read_set(codes.open_source(folder / "bad.jsonl"), "train", shape)


def test_dropout_draws_prefixes(folder):
    positions = np.arange(4000)

    def draw(share, num_quantizers=4, largest=3):
        key = jax.random.key(0)
        return np.asarray(code_use.draw_dropout(num_quantizers, share, key, positions, largest))

    drawn = draw(0.5)
    numbers = drawn.sum(-1)
    assert (np.diff(drawn.astype(int), axis=-1) <= 0).all()
    shares = np.bincount(numbers, minlength=5) / len(numbers)
    np.testing.assert_allclose(shares, [0, 1 / 6, 1 / 6, 1 / 6, 1 / 2], atol=0.03)
    assert draw(0.0).all()
    assert not draw(1.0).all(-1).any()
    assert draw(1.0, 1, 1).all()
    (batch,) = some_batches(folder, 1)
    dropped = objective_of(folder, sequence_dropout=1.0).prepare(jax.random.key(0), 0, batch)
    assert not dropped["in_use"].all(-1).any()


def test_what_the_loss_counts(folder):
    """Frames of references, text, padding and dropped quantizers weigh nothing; the end does."""
    objective = objective_of(folder)
    config = objective.config
    params = jax.jit(lambda key: nn.meta.unbox(objective.init(key)))(jax.random.key(0))
    batch = next(b for b in some_batches(folder, 9) if (b["first"] > 12).any())
    in_use = np.arange(4) < np.array([4, 3, 2, 1])[:, None]
    part = {name: batch[name] for name in ("text", "codes", "first", "length", "targets")}
    sums = jax.jit(objective.cross_entropies)(params, part | {"in_use": in_use})
    counts = np.asarray(objective.count_tokens(part | {"in_use": in_use}))
    model = SpeechModel(config)
    logits = jax.jit(model.apply)({"params": params}, batch["text"], batch["codes"], in_use)
    of_text, of_codes = (jax.nn.log_softmax(x) for x in logits)
    for row in range(4):
        first, end = batch["first"][row], batch["length"][row] - 1
        expected = np.zeros(3)
        for place in range(first, end + 1):
            expected[0] -= of_text[row, place - 1, batch["text"][row, place]]
        for level, place in itertools.product(range(4 - row), range(first, end)):
            code = batch["codes"][row, level, place]
            expected[min(level, 1) + 1] -= of_codes[row, level, place - 1, code]
        np.testing.assert_allclose(sums[row], expected, rtol=1e-4)
        frames = end - first
        assert counts[row].tolist() == [frames + 1, frames, frames * (3 - row)]


def test_an_evaluation_leaves_out_texts_that_cannot_be_said(folder):
    objective = objective_of(folder)
    items = make_items(8)
    items[0].metadata["transcript"] = " "
    speech = Speech({}, objective.config, objective.tokenizer)
    chosen = choose_samples(speech, items)
    assert [item.id for item, _ in chosen] == ["1", "3", "5"]
    assert [request.text for _, request in chosen] == ["seven", "one", "six two"]


def test_a_run_resumes_exactly(folder, tmp_path):
    """With references, dropout and a moving average."""
    changes = {"reference_share": 0.5, "train_data": str(folder / "three")}
    whole = flags_of(folder, tmp_path / "whole", **changes)
    assert train(whole)
    parts = flags_of(folder, tmp_path / "parts", **changes)
    assert train(parts | {"num_steps": 2})
    assert train(parts)
    assert rows_without_timing(whole["workdir"]) == rows_without_timing(parts["workdir"])
    assert leaves_equal(*(pretrained.load(x["workdir"]).params for x in (whole, parts)))
    row = rows_without_timing(whole["workdir"])[-1]
    assert row["text_loss"] > 0 and row["first_code_loss"] > 0 and row["other_codes_loss"] > 0
    expected = (row["text_loss"] + row["first_code_loss"] + 3 * row["other_codes_loss"]) / 5
    np.testing.assert_allclose(row["loss"], expected, rtol=1e-5)


@pytest.mark.usefixtures("sgd")
def test_a_mesh_trains_like_one_device(folder):
    """The mesh computes two microbatches, one device all at once."""
    objective = objective_of(folder)
    config = configure(**flags_of(folder, folder / "none", batch_size=8))
    batch = some_batches(folder, 2, rows=None)[0]
    batch = {name: np.concatenate([x, x]) for name, x in batch.items() if name != "failed"}
    batch |= {"position": np.arange(8, dtype=np.int32), "failed_reads": np.zeros(8, np.int32),
              "stop": np.zeros(8, bool)}  # fmt: skip
    results = []
    for text, num_microbatches in (("data:1", 1), ("data:2,fsdp:2,tensor:2", 2)):
        mesh = sharding.make_mesh(text)
        recipe = Recipe(objective, config.optimizer, 0, num_microbatches)
        shapes = states.state_shapes(recipe, mesh)
        shardings = jax.tree.map(lambda x: x.sharding, shapes)
        state = jax.jit(states.init_state, static_argnums=0, out_shardings=shardings)(recipe)
        step = steps.sharded_train_step(recipe, shapes, 8)
        state, metrics = step(state, sharding.global_batch(mesh, 8, batch))
        gradients = [x for _, x in optax.tree.get_all_with_path(state.opt_state, "trace")]
        results.append((float(metrics["loss"]), jax.device_get(gradients)))
    (loss, gradients), (other_loss, others) = results
    np.testing.assert_allclose(loss, other_loss, rtol=1e-5)
    norm = optax.tree.norm(gradients)
    assert 0 < norm and optax.tree.norm(optax.tree.sub(gradients, others)) <= 1e-5 * norm


def test_the_full_size_step_traces(folder):
    """The flagfile of the published shapes, as far as shapes tell."""
    text = (ROOT / "experiments" / "tts_1.7b.flags").read_text()
    lines = [line[2:].split("=") for line in text.splitlines() if line.startswith("--")]
    kinds = {name: type(field.default) for name, field in all_fields().items()}
    numbers = (int, float)
    flags = {k: kinds[k](v) if kinds[k] in numbers else v for k, v in lines}
    config = configure(**flags, train_data=str(folder / "codes"), workdir=str(folder / "none"))
    objective = build_objective(config, codec=preset("v1"))
    recipe = Recipe(objective, config.optimizer, 0, config.devices.num_microbatches)
    batch = steps.batch_shapes(recipe, config.data.batch_size, sharding.make_mesh("data:1"))
    state = jax.eval_shape(lambda: states.init_state(recipe))
    after, metrics = jax.eval_shape(lambda s, b: steps.train_step(recipe, s, b), state, batch)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert metrics["loss"].shape == () and objective.config.num_quantizers == 32
    prepared = jax.eval_shape(objective.prepare, jax.random.key(0), 0, batch)
    compute = dataclasses.replace(objective.compute, attention="dense")  # without loops of its own
    objective = dataclasses.replace(objective, compute=compute)
    traced = str(jax.make_jaxpr(objective.cross_entropies)(state.params, prepared))
    loops = re.findall(r"\bscan\[.*?length=(\d+)", traced, re.DOTALL)
    assert loops == ["28", "4"]  # over the layers; none over frames or channels


def test_three_utterances_are_learned_by_heart(folder, tmp_path):
    """Greedy decoding gives back their exact codes, and ends where they end."""
    flags = flags_of(
        folder, tmp_path / "run", train_data=str(folder / "three"), batch_size=4, num_steps=200,
        log_every=100, checkpoint_every=200, ema_decay=0.0, sequence_dropout=0.3, beta1=0.9,
        learning_rate=5e-3, warmup_steps=20, decay_steps=200,
        eval_data=str(folder / "codes"), num_eval_clips=2,
    )  # fmt: skip
    assert train(flags, draws_curves=True)
    (row,) = writer.read_rows(tmp_path / "run" / writer.EVALUATION)
    scores = row["table"]["speech"]["all quantizers"]
    assert scores["text_loss"] > 0 and scores["other_codes_loss"] > 2  # of random codes
    samples = sorted(path.name for path in (tmp_path / "run" / "samples").glob("*.wav"))
    assert samples[:2] == ["speech_1_recorded.wav", "speech_1_spoken.wav"]
    speech = pretrained.load(tmp_path / "run")
    spoken = generate.generate(speech, [Request(text) for text in TEXTS], GREEDY)
    for item, result in zip(three_items(), spoken, strict=True):
        np.testing.assert_array_equal(result.codes, item.codes)
        assert result.ended
    low = generate.generate(speech, [Request(TEXTS[1])], GREEDY, num_quantizers=2)[0]
    np.testing.assert_array_equal(low.codes, three_items()[1].codes[:2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_data": "others"}, "holds codes of codec 0123, the flag codec is codec"),
        ({"max_text_tokens": 2}, "no recording of the split 'train' has at most segment_seconds"),
        ({"segment_seconds": 0.001}, "segment_seconds must be at least 0.002"),
        ({"train_data": "lines.jsonl", "reference_share": 0.5}, "need.* a speaker"),
        ({"speech_quantizers": 5}, "speech_quantizers must be 0..4"),
        (
            {"speech_quantizers": 1, "text_weight": 0.0, "first_code_weight": 0.0},
            "are both 0, and there are no others",
        ),
        ({"speech_model": "big"}, "speech_model must be one of tiny"),
        ({"codec": ""}, "objective=speech needs codec"),
        ({"init_from": "codec"}, "holds no speech model"),
        ({"trainable": "decoder"}, "objective=speech needs trainable=all"),
        ({"train_data": ""}, "train_data must name codes"),
        ({"train_data": "in"}, "trains on codes .*, but train_data holds none"),
        ({"eval_data": "three", "num_eval_clips": 1}, "no recordings of the split 'test'"),
        ({"quantizer_dropout": 0.5}, "the objective speech on codes has no setting"),
    ],
)
def test_what_is_refused(folder, tmp_path, changes, message):
    for name in ("train_data", "eval_data", "init_from"):
        if changes.get(name):
            changes = changes | {name: str(folder / changes[name])}
    with pytest.raises(ValueError, match=message):
        train(flags_of(folder, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
