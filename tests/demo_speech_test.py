"""The tab Speak of the demo: its server, and its page in a headless browser."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
import soundfile
from flax import linen as nn
from helpers import CODEC, RATE, init_params

pytest.importorskip("aiohttp", reason="the extra `demo` is not installed")

from aiohttp import WSMsgType
from demo_helpers import (
    FAKE_DEVICES,
    NARROW,
    WIDE,
    chromium,
    demo,
    no_sideways_scrolling,
    noise,
    open_page,
    screenshot,
    serve,
    wait_until,
    wav_bytes,
)

from moss_tok import checkpoint
from moss_tok.cli.main import main
from moss_tok.codec import pretrained as codecs
from moss_tok.codec.inference import Codec
from moss_tok.demo.speech import Speaker
from moss_tok.language.text import ByteTokenizer
from moss_tok.speech import layout, pretrained, speaking
from moss_tok.speech.config import SpeechConfig, StackConfig
from moss_tok.speech.layout import Request
from moss_tok.speech.steps import Speech

CONFIG = SpeechConfig(
    codebook_size=16, num_quantizers=3,
    temporal=StackConfig(16, 1, 2, 1, 8, 24), depth=StackConfig(12, 1, 2, 1, 8, 16),
    adapter_dim=10, frame_rate=20.0, max_positions=512, **layout.token_fields(ByteTokenizer()),
)  # fmt: skip


class LetterTokenizer:
    """Knows few letters."""

    vocab_size = 257
    end_id = 256
    json = ""
    unknown_id = 0

    def token_id(self, name):
        return None

    def encode(self, text):
        return [ord(c) if c in "ab c" else 0 for c in text]


@pytest.fixture(scope="module")
def speech():
    """A random model that speaks until the longest length for its text."""
    init = jax.jit(pretrained.init_boxed, static_argnums=0)
    params = nn.meta.unbox(init(CONFIG, jax.random.key(3)))
    out = params["out"]
    # The states of the text channel get positive, as silu(x) x is.
    out["up"] = out["up"].at[0].set(out["gate"][0])
    out["down"] = out["down"].at[0].set(abs(out["down"][0]))
    out["text_head"] = out["text_head"].at[:, CONFIG.slot_id].set(1).at[:, CONFIG.end_id].set(-1)
    return Speech(params, CONFIG, ByteTokenizer())


@pytest.fixture
def speaker(speech, micro):
    return Speaker(speech, micro, "tts")


async def upload(client, samples):
    response = await client.post("/recordings?name=a.wav", data=wav_bytes(samples))
    return (await response.json())["id"]


def wish_of(**changes):
    wish = {"text": "ab", "num_quantizers": 2, "seed": 5, "prompt": "", "prompt_text": ""}
    return wish | changes


async def speak(client, wish):
    """The blocks of samples, and the last message."""
    blocks = []
    async with client.ws_connect("/speak") as socket:
        await socket.send_str(wish if isinstance(wish, str) else json.dumps(wish))
        async for message in socket:
            if message.type != WSMsgType.BINARY:
                return blocks, message.json()
            blocks.append(np.frombuffer(message.data, "<f4"))


def test_speech_arrives_while_it_is_sampled(micro, speech, speaker):
    async def check(client):
        blocks, result = await speak(client, wish_of())
        base = f"/recordings/{result['id']}"
        wav, rate = soundfile.read(io.BytesIO(await (await client.get(f"{base}/0.wav")).read()))
        for name in ("0.png", "2.codes.png"):
            response = await client.get(f"{base}/{name}")
            assert (await response.read()).startswith(b"\x89PNG")
        prompt = await upload(client, noise(0.1))
        _, other = await speak(client, wish_of(prompt=prompt, prompt_text="hm"))
        facts = await (await client.get("/codec")).json()
        return blocks, result, wav, rate, other, facts["speaker"]

    blocks, result, wav, rate, other, facts = serve(micro, check, speaker)
    assert len(blocks) == 38 and all(block.size == 16 for block in blocks)
    whole = speaking.speak(speech, micro, [Request("ab")], seed=5, num_quantizers=2)[0].wav
    np.testing.assert_allclose(np.concatenate(blocks), np.clip(whole[0], -1, 1), atol=1e-5)
    np.testing.assert_allclose(wav, np.clip(whole[0], -1, 1), atol=1e-4)
    assert rate == RATE and result["num_frames"] == whole.shape[1] // 16
    assert result["seconds"] == pytest.approx(whole.shape[1] / RATE)
    assert not result["ended"]
    assert other["num_frames"] and facts == {"name": "tts", "num_quantizers": 3}


def test_a_page_that_leaves_ends_the_sampling(micro, speaker):
    async def check(client):
        async with client.ws_connect("/speak") as socket:
            await socket.send_str(json.dumps(wish_of(text="ab" * 50)))
            assert (await socket.receive()).type == WSMsgType.BINARY
        return await speak(client, wish_of())

    _, result = serve(micro, check, speaker)
    assert result["num_frames"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": " "}, "the text is empty"),
        ({"text": "abx"}, "the text 'abx' has characters that the tokenizer lacks: 'x'"),
        ({"num_quantizers": 4}, "num_quantizers must be 1..3, got 4"),
        ({"seed": -1}, "seed must be 0..2147483647, got -1"),
        ({"seed": "1"}, "seed must be of type int, got '1'"),
        ({"prompt": "x"}, "this recording is not kept any more: load it again"),
        ({"prompt": "QUIET"}, "the recording of the voice: the prompt is silent"),
        ({"prompt": "LONG", "prompt_text": "a"}, "the prompt and the text have "),
    ],
)
def test_errors_are_one_sentence(micro, speech, changes, message):
    speaker = Speaker(dataclasses.replace(speech, tokenizer=LetterTokenizer()), micro, "tts")

    async def check(client):
        kept = {"QUIET": noise(0.1, 3e-4), "LONG": noise(2.0)}
        wish = wish_of(**changes)
        if wish["prompt"] in kept:
            wish["prompt"] = await upload(client, kept[wish["prompt"]])
        return await speak(client, wish)

    blocks, result = serve(micro, check, speaker)
    assert not blocks and result["error"].startswith(message) and "\n" not in result["error"]


def test_without_a_speaker(micro):
    async def check(client):
        return (await (await client.get("/codec")).json())["speaker"], await speak(client, "{}")

    facts, (_, result) = serve(micro, check)
    assert facts is None and result == {"error": "the demo was started without --speaker"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, speech):
    """A codec, a run of a speech model with it, and a model of another codec."""
    folder = tmp_path_factory.mktemp("demo")
    params = init_params(CODEC)
    codecs.save(folder / "codec", CODEC, params)
    part = {name: params[name] for name in ("encoder", "quantizer")}
    for name, print_ in (("tts", codecs.fingerprint(Codec(part, CODEC))), ("other", "0123")):
        config = dataclasses.replace(CONFIG, codec=print_)
        files = pretrained.files(config, ByteTokenizer())
        checkpoint.save(folder / name, files, {"params": speech.params})
    settings = json.dumps({"codec": str(folder / "codec")})
    (folder / "tts" / checkpoint.RUN_CONFIG_NAME).write_text(settings)
    return folder


def test_speakers_that_do_not_fit(folder, capsys):
    def error(*arguments):
        assert main(["demo", "--port=0", *arguments]) == 2
        return capsys.readouterr().err

    codec, other = folder / "codec", folder / "other"
    assert "other does not say which codec it speaks with: give --ch" in error(f"--speaker={other}")
    fits_not = error(f"--speaker={other}", f"--checkpoint={codec}")
    assert "the speech model speaks codes of codec 0123, this codec is" in fits_not
    no_model = error(f"--speaker={codec}", f"--checkpoint={codec}")
    assert "codec: holds no speech model" in no_model


@pytest.fixture(scope="module")
def address(folder):
    with demo("--speaker", folder / "tts") as found:
        yield found


@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_a_text_on_the_page(address, viewport, tmp_path):
    (tmp_path / "zeros.wav").write_bytes(wav_bytes(np.zeros(RATE)))
    (tmp_path / "noise.wav").write_bytes(wav_bytes(noise(0.2)))
    with chromium(*FAKE_DEVICES) as browser:
        page, asked, errors = open_page(browser, f"{address}#speak", viewport)
        page.click("#say")
        page.wait_for_selector("#speak-message.bad")
        assert page.inner_text("#speak-message") == "the text is empty"
        page.set_input_files("#choose-voice", tmp_path / "zeros.wav")
        message = "zeros.wav: the recording is silent (-120 dB)"
        wait_until(page, f"document.getElementById('speak-message').textContent == '{message}'")
        page.set_input_files("#choose-voice", tmp_path / "noise.wav")
        page.wait_for_selector("#voice-text")
        assert page.inner_text("#voice-name") == "noise.wav, 0.2 s"
        page.fill("#voice-text", "hm")
        page.fill("#text", "ab")
        page.fill("#speak-quantizers", "2")
        page.click("#say")
        page.wait_for_selector("#spoken[data-shown]")
        assert "2 of 3 · 4 kbit/s" in page.inner_text("#speak-bitrate")
        assert page.inner_text("#say") == "Speak"
        cut = "The speech was cut at the longest duration for its text."
        assert page.inner_text("#speak-message") == cut
        assert float(page.inner_text("#speak-speed")) > 0
        for track in ("speech", "speech-codes"):
            wait_until(page, f"document.querySelector('#{track} img').naturalWidth > 1")
        screenshot(page, f"speak-{viewport['width']}")
        page.click("#speech .view")
        wait_until(page, "document.querySelector('#speech audio').currentTime > 0")
        page.click("#remove-voice")
        assert not page.is_visible("#voice")
        assert no_sideways_scrolling(page)
        local = (address, f"blob:{address}", address.replace("http", "ws"))
        assert all(url.startswith(local) for url in asked)
        assert not errors


def test_recording_a_voice_on_the_page(address):
    with chromium(*FAKE_DEVICES) as browser:
        page, _, errors = open_page(browser, f"{address}#speak", permissions=["microphone"])
        page.click("#record-voice")
        wait_until(page, "document.getElementById('record-voice').textContent.includes('2 s')")
        page.click("#record-voice")
        page.wait_for_selector("#voice-text")
        assert page.inner_text("#voice-name").startswith("recording.wav, ")
        assert page.inner_text("#record-voice") == "Record" and not errors


def test_the_page_without_a_speaker(folder):
    with demo("--checkpoint", folder / "codec") as address, chromium() as browser:
        page, _, errors = open_page(browser, f"{address}#speak")
        assert "start the demo with a speech model: moss-tok demo --speaker RUN" in page.inner_text(
            "#speak-missing"
        )
        assert not page.is_visible("#speak-form") and not errors
