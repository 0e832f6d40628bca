"""Generation of speech: caches, batches, quantizers, streams, the command, what is refused."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from flax import linen as nn
from helpers import CODEC, init_params

from moss_tok import checkpoint
from moss_tok.cli import speak
from moss_tok.cli.commands import build_parser
from moss_tok.cli.main import main
from moss_tok.codec import pretrained as codecs
from moss_tok.codec.inference import Codec
from moss_tok.language import text
from moss_tok.speech import generate, layout, pretrained, sampling, speaking, steps
from moss_tok.speech.config import SpeechConfig, StackConfig
from moss_tok.speech.generate import Request, Spoken
from moss_tok.speech.sampling import GREEDY, Channel, Sampling

BYTES = text.ByteTokenizer()
CONFIG = SpeechConfig(
    codebook_size=16, num_quantizers=3,
    temporal=StackConfig(16, 2, 4, 2, 8, 24), depth=StackConfig(12, 2, 2, 1, 6, 16),
    adapter_dim=10, frame_rate=10.0, max_positions=64, **layout.token_fields(BYTES),
)  # fmt: skip
TEXTS = ["ab", "a longer one", "c", "seven 7", "xy z", "b"]
REQUESTS = [Request(text) for text in TEXTS]


NOISE = 0.1 * np.random.default_rng(0).standard_normal(640)


@pytest.fixture(scope="module")
def speech():
    params = nn.meta.unbox(
        jax.jit(pretrained.init_boxed, static_argnums=0)(CONFIG, jax.random.key(3))
    )
    params["code_embeddings"] *= 50  # frames differ, and some texts end
    params["text_embedding"] *= 50
    return steps.Speech(params, CONFIG, BYTES)


@jax.jit
def whole_logits(speech, positions, in_use):
    return speech.apply(*positions, in_use, method="__call__")


def without_cache(speech, request, num_frames, number=3):
    """Greedy codes, by teacher-forced logits of everything before, again for each code."""
    prompt = layout.prompt(CONFIG, BYTES, request)
    first = len(prompt.text)
    text = np.full((1, 24), CONFIG.slot_id)
    codes = np.full((1, 3, 24), CONFIG.codebook_size)
    text[0, :first] = prompt.text
    codes[0, :, :first] = prompt.codes
    in_use = jnp.arange(3)[None] < number
    for place in range(first, first + num_frames):
        found, _ = whole_logits(speech, (text, codes), in_use)
        slot, end = (found[0, place - 1, i] for i in (CONFIG.slot_id, CONFIG.end_id))
        if place > first and end > slot:
            return Spoken(codes[0, :number, first:place], True)
        for level in range(number):
            _, found = whole_logits(speech, (text, codes), in_use)
            codes[0, level, place] = np.argmax(found[0, level, place - 1, :16])
    return Spoken(codes[0, :number, first : first + num_frames], False)


def same(a, b):
    return a.ended == b.ended and np.array_equal(a.codes, b.codes)


@pytest.mark.parametrize("number", [3, 1])
def test_caches_change_nothing(speech, number):
    found = generate.generate(speech, REQUESTS, GREEDY, num_quantizers=number)
    for request, spoken in zip(REQUESTS, found, strict=True):
        limit = 6
        expected = without_cache(speech, request, limit, number)
        if expected.ended:
            assert same(spoken, expected)
        np.testing.assert_array_equal(spoken.codes[:, :limit], expected.codes)


def test_batches_and_blocks_change_nothing(speech):
    together = generate.generate(speech, REQUESTS, seed=5)
    assert len({spoken.codes.shape[1] for spoken in together}) > 2
    for item, request in enumerate(REQUESTS):
        alone = generate.generate(speech, [request], seed=5, first_item=item)[0]
        assert same(alone, together[item])
        blocks = list(generate.blocks(speech, request, seed=5, item=item, block_frames=3))
        codes = np.concatenate([block.codes for block in blocks], axis=1)
        assert same(Spoken(codes, blocks[-1].ended), alone)
    again = generate.generate(speech, REQUESTS, seed=6)
    assert not all(same(a, b) for a, b in zip(together, again, strict=True))


def test_a_stream_equals_the_whole(speech, micro):
    beginning = np.random.default_rng(0).integers(0, 16, (4, 5))
    for request, number in ((REQUESTS[1], None), (Request("ab", beginning=beginning), 2)):
        spoken = [generate.generate(speech, [request], seed=n, num_quantizers=number)[0].codes
                  for n in range(16)]  # fmt: skip
        seed = max(range(16), key=lambda n: spoken[n].shape[1])
        whole = speaking.speak(speech, micro, [request], seed=seed, num_quantizers=number)[0].wav
        blocks = list(speaking.stream(speech, micro, request, seed=seed, num_quantizers=number))
        assert len(blocks) > 3 and all(block.shape == (1, 16) for block in blocks)
        np.testing.assert_allclose(np.concatenate(blocks, axis=1), whole, atol=1e-5)
        assert whole.shape[1] == 16 * spoken[seed].shape[1]  # without the beginning


def test_a_stream_says_whether_the_model_ended(speech, micro):
    ends = set()
    for request in REQUESTS:
        spoken = speaking.speak(speech, micro, [request], GREEDY)[0]
        blocks = list(speaking.stream_blocks(speech, micro, request, GREEDY))
        assert {block.ended for block in blocks[:-1]} <= {None}
        assert blocks[-1].ended == spoken.ended
        ends.add(spoken.ended)
    assert ends == {True, False}


def test_continued_speech_has_time_for_the_new_text(speech):
    beginning = np.zeros((3, 30), int)  # 3 s, more than its text would take
    request = Request("a hello", beginning=beginning, beginning_text="a")
    limit = generate._make_prompt(speech, request).max_frames
    assert limit == sampling.longest_speech(CONFIG, "hello") == 26
    chat = dataclasses.replace(CONFIG, layout="chat")
    request = speaking.with_prompt(chat, "hello", beginning, "a")
    assert (request.text, request.beginning_text) == ("a hello", "a")


def test_requests_that_do_not_fit(speech, micro):
    with pytest.raises(ValueError, match="details have the names instruction, .*, got 'languag'"):
        layout.check_request(CONFIG, BYTES, Request("a", details={"languag": "en"}))
    with pytest.raises(ValueError, match="must be the start of the text"):
        layout.check_request(CONFIG, BYTES, Request("a b", beginning_text="b"))
    request = Request("a", beginning=np.zeros((2, 4), int))
    for say in (
        lambda: speaking.speak(speech, micro, [request]),
        lambda: list(speaking.stream(speech, micro, request)),
    ):
        with pytest.raises(ValueError, match="beginning must have 3 or more quantizers, got 2"):
            say()
    assert speaking.speak(speech, micro, [request], num_quantizers=2)


def test_the_limit_follows_the_text():
    config = dataclasses.replace(CONFIG, frame_rate=12.5)
    seconds = [
        sampling.longest_speech(config, text) / 12.5 for text in ("a", "hello, you", "4 7", "好")
    ]
    np.testing.assert_allclose(seconds, [1.7, 3.1, 2.7, 2.1], atol=0.08)


def test_penalty_and_channels():
    logits = jnp.array([[2.0, -2.0, 1.0]])
    seen = jnp.array([[True, True, False]])
    found = sampling.penalize(logits, seen, Channel(repetition_penalty=2.0))
    np.testing.assert_allclose(found, [[1.0, -4.0, 1.0]])
    np.testing.assert_array_equal(sampling.penalize(logits, seen, Channel(0.0)), logits)
    assert Sampling().others == Channel(1.0, 50, 0.95, 1.1)
    with pytest.raises(ValueError, match="repetition_penalty must be 0.1..10, got 0"):
        Channel(repetition_penalty=0)


class ForgetfulTokenizer:
    """Drops the token that ends a text, as `FileTokenizer` does."""

    unknown_id = None

    def token_id(self, name):
        return None

    def encode(self, text):
        return [1] * len(text.replace("<end>", ""))


class LetterTokenizer:
    """Knows few letters."""

    unknown_id = 0

    def token_id(self, name):
        return None

    def encode(self, text):
        return [ord(c) if c in "ab c" else 0 for c in text]


def test_texts_that_cannot_be_said():
    layout.check_text(CONFIG, BYTES, "好 é")
    with pytest.raises(ValueError, match="the text is empty"):
        layout.check_text(CONFIG, BYTES, " ")
    with pytest.raises(ValueError, match="has characters that the tokenizer lacks: 'xé'"):
        layout.check_text(CONFIG, LetterTokenizer(), "abx éa")
    with pytest.raises(ValueError, match="not valid Unicode"):
        layout.check_text(CONFIG, BYTES, "a\ud800")
    with pytest.raises(ValueError, match="the text '<end>' has no tokens"):
        layout.check_text(CONFIG, ForgetfulTokenizer(), "<end>")
    with pytest.raises(ValueError, match="the text of the prompt 'x' has characters"):
        request = Request("a", np.array([[0]]), "x")
        layout.check_request(CONFIG, LetterTokenizer(), request)
    with pytest.raises(ValueError, match="reference must be 0..15, got 0..16"):
        layout.check_request(CONFIG, BYTES, Request("a", np.array([[0, 16]])))
    with pytest.raises(ValueError, match="beginning must be integers, got float"):
        layout.check_request(CONFIG, BYTES, Request("a", beginning=np.zeros((3, 2))))
    with pytest.raises(ValueError, match="language 'x' has characters"):
        chat = dataclasses.replace(CONFIG, layout="chat")
        layout.check_request(chat, LetterTokenizer(), Request("a", details={"language": "x"}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, speech):
    """Checkpoints of the model and of two codecs, and prompts."""
    folder = tmp_path_factory.mktemp("speak")
    params = init_params(CODEC)
    codecs.save(folder / "codec", CODEC, params)
    part = {name: params[name] for name in ("encoder", "quantizer")}
    config = dataclasses.replace(CONFIG, codec=codecs.fingerprint(Codec(part, CODEC)))
    files = pretrained.files(config, BYTES)
    checkpoint.save(folder / "tts", files, {"params": speech.params})
    params["quantizer"]["codebooks"] += 0.1
    codecs.save(folder / "other", CODEC, params)
    soundfile.write(folder / "noise.wav", NOISE, 16000)  # of another rate: 20 frames
    soundfile.write(folder / "long.wav", np.tile(NOISE, 8), 16000)
    soundfile.write(folder / "silent.wav", 0 * NOISE, 16000)
    (folder / "empty.txt").write_text("\n")
    (folder / "twice.jsonl").write_text('{"text": "a", "id": "x"}\n{"text": "b", "id": "x"}\n')
    (folder / "long.jsonl").write_text(json.dumps({"text": "a", "id": "x" * 300}))
    (folder / "bar.jsonl").write_text('{"text": "a", "id": "x|y"}\n')
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    (folder / "up.jsonl").write_text('{"text": "a", "id": "../x"}\n')
    (folder / "key.jsonl").write_text('{"text": "a", "voice": "x"}\n')
    (folder / "blank.jsonl").write_text('{"text": "a"}\n{"text": " "}\n')
    (folder / "number.jsonl").write_text('{"text": "a", "id": [1]}\n')
    (folder / "alone.jsonl").write_text('{"text": "a", "prompt_text": "b"}\n')
    (folder / "alone.lst").write_text("u|b||a\n")
    return folder


def run(folder, *arguments):
    arguments = [str(a).replace("DIR", str(folder)) for a in arguments]
    paths = [f"--checkpoint={folder / 'tts'}", f"--codec={folder / 'codec'}"]
    return main(["speak", *arguments[:2], *paths, *arguments[2:]])


def test_the_command(folder, tmp_path, capfdbinary):
    assert run(folder, "ab", tmp_path / "a.wav", "--seed=3") == 0
    wav, rate = soundfile.read(tmp_path / "a.wav", dtype="int16")
    assert rate == 8000 and len(wav) % 16 == 0 and wav.any()
    capfdbinary.readouterr()
    assert run(folder, "ab", "-", "--seed=3", "--pcm=s16") == 0
    raw = capfdbinary.readouterr().out
    np.testing.assert_allclose(np.frombuffer(raw, "<i2"), wav, atol=1)
    assert run(folder, "ab", "-", "--seed=3") == 0
    out = capfdbinary.readouterr().out
    assert out[:4] == b"RIFF" and out[44:] == raw
    prompt = ("--prompt=DIR/noise.wav", "--num-quantizers=2")  # without what is said in it
    assert run(folder, "ab", tmp_path / "b.wav", *prompt) == 0


def test_the_command_says_if_speech_was_cut(folder, speech, tmp_path, capsys):
    greedy = ("--temperature=0,0,0",)
    for number, (words, spoken) in enumerate(
        zip(TEXTS, generate.generate(speech, REQUESTS, GREEDY), strict=True)
    ):
        assert run(folder, words, tmp_path / f"{number}.wav", *greedy) == 0
        is_cut = "cut at the longest duration" in capsys.readouterr().err
        assert is_cut == (not spoken.ended)


def test_sampling_options_of_channel_groups():
    def parse(*options):
        args = build_parser("speak").parse_args(["a", "a.wav", "--checkpoint=x", *options])
        return speak._parse_sampling(args)

    assert parse() == sampling.DEFAULT
    codes = Channel(0.5, 50, 0.95, 1.1)
    assert parse("--temperature=0.5") == Sampling(sampling.DEFAULT.text, codes, codes)
    assert parse("--top-k=0,1,2", "--repetition-penalty=1,1.2,1.3") == Sampling(
        Channel(1.0, 0, 0.95, 1.0), Channel(1.0, 1, 0.95, 1.2), Channel(1.0, 2, 0.95, 1.3)
    )


def test_the_command_for_a_list(folder, tmp_path):
    rows = [{"text": "ab"}, {"text": "c", "id": "see", "prompt": str(folder / "noise.wav")}]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(folder, tmp_path / "list.jsonl", tmp_path / "out") == 0
    assert sorted(p.name for p in (tmp_path / "out").glob("*.wav")) == ["0001.wav", "see.wav"]
    line = f"u1|hm|{folder / 'noise.wav'}|ab"
    (tmp_path / "list.lst").write_text(f"{line}|x.wav\nu2|||a b\n")
    paths = [f"--checkpoint={folder / 'tts'}", f"--codec={folder / 'codec'}"]
    options = [f"--speak={tmp_path / 'list.lst'}", f"--output={tmp_path / 'seed'}"]
    assert main(["evaluate", *paths, *options]) == 0
    assert sorted(p.name for p in (tmp_path / "seed").iterdir()) == ["meta.lst", "u1.wav", "u2.wav"]
    assert (tmp_path / "seed" / "meta.lst").read_text() == f"{line}\nu2|||a b\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--speak=a.lst", "--metrics=stoi"], "metrics has no effect with --speak"),
        (["--speak=a.lst"], "speak needs --checkpoint, a speech model"),
        (["--speak=none.lst", "--checkpoint=x"], "none.lst: no such file of texts"),
        (["--speak=a.csv", "--checkpoint=x"], "a.csv: a file of texts must end in .txt, .jsonl"),
        (["--dataset=a.jsonl", "--codec=x"], "codec has no effect without --speak"),
    ],
)
def test_options_of_evaluate_that_do_not_go_together(options, message, capsys, tmp_path):
    assert main(["evaluate", *options, f"--output={tmp_path / 'out'}"]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["", "OUT.wav"], "the text is empty"),
        (["ab", "OUT.mp3"], "must end in .wav, .flac or .ogg"),
        (["ab", "OUT.wav", "--num-quantizers=4"], "num_quantizers must be 1..3, got 4"),
        (["ab", "OUT.wav", "--num-quantizers=0"], "num_quantizers must be 1..3, got 0"),
        (["ab", "OUT.wav", "--codec=DIR/other"], "speaks codes of codec [0-9a-f]+, this codec is"),
        (["ab", "OUT.wav", "--checkpoint=DIR/codec"], "holds no speech model"),
        (["ab", "OUT.wav", "--prompt=DIR/silent.wav"], "silent.wav: the prompt is silent"),
        (["ab", "OUT.wav", "--prompt=DIR/none.wav"], "none.wav: no such file"),
        (["ab", "OUT.wav", "--prompt=DIR/long.wav"], "the prompt and the text have 1[67]. pos"),
        (["ab" * 40, "OUT.wav"], "the text has 81 positions, the context of this model is 64"),
        (["ab", "OUT.wav", "--prompt-text=a"], "prompt-text needs --prompt"),
        (["ab", "OUT.wav", "--pcm=s16"], "pcm is for standard output"),
        (["ab", "OUT.wav", "--top-p=0"], "top_p must be above 0"),
        (["ab", "OUT.wav", "--seed=-1"], "seed must be 0"),
        (["DIR/empty.txt", "OUT"], "empty.txt: no lines"),
        (["DIR/twice.jsonl", "OUT"], "twice.jsonl:2: another line has the id 'x', too"),
        (["DIR/up.jsonl", "OUT"], "up.jsonl:1: id must be a file's name"),
        (["DIR/long.jsonl", "OUT"], "long.jsonl:1: id must be a file's name"),
        (["DIR/bar.jsonl", "OUT"], "bar.jsonl:1: id must be a file's name"),
        (["DIR/latin.txt", "OUT"], "latin.txt: must be UTF-8 text"),
        (["DIR/key.jsonl", "OUT"], "key.jsonl:1: unknown key 'voice'; accepted: id, text"),
        (["DIR/blank.jsonl", "OUT"], "0002: the text is empty"),
        (["DIR/number.jsonl", "OUT"], r"number.jsonl:1: id must be a text, got \[1\]"),
        (["DIR/alone.jsonl", "OUT"], "alone.jsonl:1: the text of a prompt needs a prompt"),
        (["DIR/alone.lst", "OUT"], "alone.lst:1: the text of a prompt needs a prompt"),
        (["DIR/twice.jsonl", "-"], "must be a folder"),
        (["DIR/none.txt", "OUT.wav"], "none.txt: no such file of texts"),
        (["ab", "OUT.wav", "--prompt=DIR/noise.wav", "--prompt-text= "], "the prompt is empty"),
        (
            ["ab", "OUT.wav", "--temperature=1,2"],
            "temperature must be a number, or three for the t",
        ),
        (["ab", "OUT.wav", "--top-k=1.5"], "top-k must be an integer, or three for .*'1.5'"),
        (["ab", "OUT.wav", "--top-k=50,-1,50"], "top_k must be at least 0, got -1"),
    ],
)
def test_bad_input(folder, tmp_path, capsys, arguments, message):
    arguments = [a.replace("OUT", str(tmp_path / "out")) for a in arguments]
    assert run(folder, *arguments) == 2
    out, err = capsys.readouterr()
    assert re.match(f"error: .*{message}", err) and err.count("\n") == 1 and not out
    assert not list(tmp_path.iterdir())
