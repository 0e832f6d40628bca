"""The demo: its server, and its page in a headless browser (skipped without Chromium)."""

import io
import socket

import numpy as np
import pytest
import soundfile
from helpers import RATE

pytest.importorskip("aiohttp", reason="the extra `demo` is not installed")

from aiohttp import WSMsgType, web
from demo_helpers import (
    FAKE_DEVICES,
    NARROW,
    WIDE,
    chromium,
    demo,
    no_sideways_scrolling,
    noise,
    open_page,
    serve,
    wait_until,
    wav_bytes,
)

from moss_tok.cli.main import main
from moss_tok.codec import pretrained
from moss_tok.demo import sound


def test_a_recording(micro):
    async def check(client):
        upload = await client.post("/recordings?name=a.wav", data=wav_bytes(noise()))
        fields = await upload.json()
        assert fields["seconds"] == fields["file_seconds"] == 1.0
        assert fields["num_frames"] == 500
        base = f"/recordings/{fields['id']}"
        original, rate = soundfile.read(
            io.BytesIO(await (await client.get(f"{base}/0.wav")).read())
        )
        np.testing.assert_allclose(original, noise(), atol=1e-4)
        assert rate == RATE
        few = await (await client.get(f"{base}/1.wav")).read()
        many = await (await client.get(f"{base}/3.wav")).read()
        assert few != many
        values = await (await client.get(f"{base}/3")).json()
        assert values["bitrate"] == micro.config.bitrate(3)
        assert set(values["distances"]) == {"mel_loss", "stft", "stoi"}
        for name in ("0.png", "3.png", "2.codes.png"):
            response = await client.get(f"{base}/{name}")
            assert (await response.read()).startswith(b"\x89PNG")
            assert "default-src 'self'" in response.headers["Content-Security-Policy"]
        codec = await (await client.get("/codec")).json()
        assert (codec["num_quantizers"], codec["sample_rate"], codec["note"]) == (4, RATE, "a test")
        assert "<title>" in await (await client.get("/")).text()
        return [
            await error(client.get(f"{base}/5.wav")),
            await error(client.get("/recordings/x/1")),
        ]

    too_many, unknown = serve(micro, check)
    assert too_many == "num_quantizers must be 1..4, got 5"
    assert unknown == "this recording is not kept any more: load it again"


async def error(request):
    """The error sentence of a response."""
    response = await request
    assert response.status == 400
    return (await response.json())["error"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "a.wav: the file is empty"),
        (b"hello", "a.wav: not audio"),
        (b"<!DOCTYPE html><html>", "a.wav: "),
        (wav_bytes(noise())[:3000], "a.wav: truncated"),
        (wav_bytes(np.zeros(800)), "a.wav: the recording is silent (-120 dB)"),
    ],
)
def test_bad_recordings_get_one_sentence(micro, data, message):
    async def check(client):
        return await error(client.post("/recordings?name=a.wav", data=data))

    line = serve(micro, check)
    assert line.startswith(message)
    assert "\n" not in line


def test_long_recordings_are_cut(micro, monkeypatch):
    monkeypatch.setattr(sound, "MAX_SECONDS", 0.5)
    recording = sound.read(micro, wav_bytes(noise(2.0)), "a.wav")
    assert (recording.seconds, recording.wav.shape) == (2.0, (1, RATE // 2))


def test_live_audio_is_the_reconstruction(micro):
    samples = (np.round(noise(0.1) * 32768) / 32768).astype(np.float32)  # exact in a WAV file

    async def check(client):
        earlier = await client.ws_connect("/live?quantizers=2")
        assert await earlier.receive_json() == {"ready": True}
        async with client.ws_connect("/live?quantizers=2") as live:
            ended = {"error": "Live audio was started on another page."}
            assert await earlier.receive_json() == ended
            await earlier.close()
            assert await live.receive_json() == {"ready": True}
            parts = []
            for block in np.split(samples, 8):  # of 100 samples, 6 1/4 frames
                await live.send_bytes(block.tobytes())
            while sum(map(len, parts)) < samples.size // 16 * 16:
                message = await live.receive()
                if message.type == WSMsgType.BINARY:
                    parts.append(np.frombuffer(message.data, "<f4"))
                else:
                    fields = message.json()
                    assert len(fields["codes"]) == 2
                    assert fields["encode_ms"] > 0
        async with client.ws_connect("/live?quantizers=9") as live:
            assert (await live.receive_json())["error"].startswith("num_quantizers must be 1..4")
        return np.concatenate(parts)

    live = serve(micro, check)
    recording = sound.read(micro, wav_bytes(samples), "a.wav")
    expected = sound.reconstruct(micro, recording, 2)[0]
    np.testing.assert_allclose(live, expected[: live.size], atol=1e-4)


def test_an_earlier_page_that_was_closed_does_not_end_the_next(micro, monkeypatch):
    send = web.WebSocketResponse.send_json

    async def fail_on_errors(response, fields):
        if "error" in fields:
            raise ConnectionResetError("Cannot write to closing transport")
        await send(response, fields)

    monkeypatch.setattr(web.WebSocketResponse, "send_json", fail_on_errors)

    async def check(client):
        async with client.ws_connect("/live?quantizers=2") as earlier:
            await earlier.receive_json()
            async with client.ws_connect("/live?quantizers=2") as live:
                await earlier.close()
                return await live.receive_json()

    assert serve(micro, check) == {"ready": True}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, micro):
    folder = tmp_path_factory.mktemp("demo") / "tiny"
    pretrained.save(folder, micro.config, micro.params)
    return folder


def test_busy_port(checkpoint, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["demo", "--checkpoint", str(checkpoint), "--port", str(port)]) == 2
    message = f"error: port {port} cannot be used (Address already in use): choose another"
    assert capsys.readouterr().err.startswith(message)
    assert main(["demo", "--checkpoint", str(checkpoint), "--port", "99999"]) == 2
    assert "port 99999 cannot be used (not a port number)" in capsys.readouterr().err


@pytest.fixture(scope="module")
def address(checkpoint):
    with demo("--checkpoint", checkpoint) as found:
        yield found


@pytest.fixture
def browser():
    with chromium(*FAKE_DEVICES) as started:
        yield started


@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_a_file_on_the_page(browser, address, tmp_path, viewport):
    (tmp_path / "noise.wav").write_bytes(wav_bytes(noise(1.5)))
    (tmp_path / "zeros.wav").write_bytes(wav_bytes(np.zeros(RATE)))
    page, asked, errors = open_page(browser, address, viewport)
    page.set_input_files("#choose", tmp_path / "noise.wav")
    page.wait_for_selector("#result[data-shown='4']")
    page.fill("#quantizers", "1")
    page.wait_for_selector("#result[data-shown='1']")
    assert "1 of 4 · 2 kbit/s" in page.inner_text("#bitrate")
    assert "mel " in page.inner_text("#distances")
    for track in ("original", "reconstruction", "codes"):
        assert page.evaluate(f"document.querySelector('#{track} img').naturalWidth") > 10
    page.click("#reconstruction .view")
    wait_until(page, "document.querySelector('#reconstruction audio').currentTime > 0")
    assert page.inner_text("#file-message", timeout=1000) == "" or not page.is_visible(
        "#file-message"
    )
    page.set_input_files("#choose", tmp_path / "zeros.wav")
    page.wait_for_selector("#file-message.bad")
    assert page.inner_text("#file-message") == "zeros.wav: the recording is silent (-120 dB)"
    assert no_sideways_scrolling(page)
    assert all(url.startswith((address, f"blob:{address}")) for url in asked)
    assert not errors


@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_live_on_the_page(browser, address, viewport):
    page, asked, errors = open_page(
        browser, f"{address}#live", viewport, permissions=["microphone"]
    )
    page.click("#start")
    wait_until(page, "document.getElementById('latency').textContent.endsWith('ms')")
    page.wait_for_timeout(1000)
    assert float(page.inner_text("#encode").removesuffix(" ms")) > 0
    assert float(page.inner_text("#latency").removesuffix(" ms")) > 2  # a frame
    page.click("#start")
    assert page.inner_text("#start") == "Start"
    assert no_sideways_scrolling(page)
    assert all(url.startswith((address, address.replace("http", "ws"))) for url in asked)
    assert not errors


def test_recording_on_the_page(browser, address):
    page, _, errors = open_page(browser, address, permissions=["microphone"])
    page.click("#record")
    wait_until(page, "document.getElementById('record').textContent.includes('2 s')")
    page.click("#record")
    page.wait_for_selector("#result[data-shown='4']")
    assert page.inner_text("#file-name") == "recording.wav"
    assert not errors


def test_a_double_click_opens_one_microphone(browser, address):
    page, _, errors = open_page(browser, address, permissions=["microphone"])
    page.evaluate("""() => {
        const { mediaDevices } = navigator;
        const open = mediaDevices.getUserMedia.bind(mediaDevices);
        window.numOpened = 0;
        mediaDevices.getUserMedia = (wanted) => { window.numOpened++; return open(wanted); };
    }""")
    page.dblclick("#record")
    wait_until(page, "document.getElementById('record').textContent.includes('2 s')")
    assert page.evaluate("window.numOpened") == 1
    page.click("#record")
    page.wait_for_selector("#result[data-shown='4']")
    assert not errors


def test_positions_that_the_slider_passes_are_not_computed(browser, address, tmp_path):
    (tmp_path / "noise.wav").write_bytes(wav_bytes(noise(1.5)))
    page, asked, errors = open_page(browser, address)
    page.set_input_files("#choose", tmp_path / "noise.wav")
    page.wait_for_selector("#result[data-shown='4']")
    asked.clear()
    page.evaluate("""() => {
        const slider = document.getElementById("quantizers");
        for (const position of [1, 2, 3, 2]) {
            slider.value = position;
            slider.dispatchEvent(new Event("input"));
        }
    }""")
    page.wait_for_selector("#result[data-shown='2']")
    numbers = {url.rsplit("/", 1)[-1] for url in asked if url.startswith("http")}
    assert numbers == {"1", "1.wav", "1.png", "1.codes.png", "2", "2.wav", "2.png", "2.codes.png"}
    assert not errors


def test_no_microphone(address):
    with chromium() as browser:
        page, _, _ = open_page(browser, f"{address}#live", permissions=["microphone"])
        page.click("#start")
        page.wait_for_selector("#live-message.bad")
        assert page.inner_text("#live-message") == "No microphone was found."
        assert page.inner_text("#start") == "Start"
