"""The demo's server: the page, recordings as a small HTTP interface, and live audio.

  GET  /                            the page and its files
  GET  /codec                       what the page shows about the codec, JSON
  POST /recordings?name=NAME        an audio file; its id and length, JSON
  GET  /recordings/ID/N             bitrate and distances with N quantizers, JSON
  GET  /recordings/ID/N.wav, .png   the audio and its spectrogram; N = 0: the original
  GET  /recordings/ID/N.codes.png   the codes, those of N quantizers in colour
  GET  /live?quantizers=N           a WebSocket, see `_live`
  GET  /speak                       a WebSocket, see `_speak`; the result is a recording

Errors are JSON {"error": one sentence} with status 400. This server has everything that the page
needs, and it forbids the browser to load anything from elsewhere.
"""

import asyncio
import collections
import contextlib
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import WSMsgType, web

import moss_tok
from moss_tok.codec.inference import Codec
from moss_tok.demo import sound, speech

_PAGE = Path(__file__).parent / "page"
_MAX_RECORDINGS = 8  # in memory
_MAX_RESULTS = 16  # reconstructions in memory
_MAX_BYTES = 2**28  # of an uploaded file
_CHUNK_FRAMES = (1, 4)  # of the live streams; 4 to catch up
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; media-src blob:",
    "Cache-Control": "no-store",
}


def bind(port: int) -> socket.socket:
    """A socket on 127.0.0.1; port 0 is any free one. Raises ValueError if the port is in use."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen()
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or "not a port number"
        raise ValueError(
            f"port {port} cannot be used ({reason}): choose another with --port"
        ) from error
    return listener


def run(demo: "Demo", listener: socket.socket) -> None:
    """Serves the demo until it is interrupted."""
    web.run_app(demo.app(), sock=listener, print=lambda *_: None, access_log=None)


class Demo:
    """The state of the server: the models and the latest recordings."""

    def __init__(self, codec: Codec, name: str, note: str, speaker: speech.Speaker | None = None):
        """The page shows the name of the codec and the note about it."""
        self._codec = codec
        self._speaker = speaker
        self._name = name
        self._note = note
        self._recordings: collections.OrderedDict[str, sound.Recording] = collections.OrderedDict()
        self._results: collections.OrderedDict[tuple[str, int], np.ndarray] = (
            collections.OrderedDict()
        )
        self._computing = asyncio.Lock()
        self._live_page: web.WebSocketResponse | None = None  # the latest
        self._streaming = asyncio.Lock()
        self._speaking = asyncio.Lock()

    def app(self) -> web.Application:
        """The application."""
        app = web.Application(client_max_size=_MAX_BYTES, middlewares=[_one_sentence])
        app.on_response_prepare.append(_add_headers)
        app.add_routes([
            web.get("/", _index),
            web.get("/codec", self._describe),
            web.post("/recordings", self._add),
            web.get(r"/recordings/{id}/{n:\d+}", self._measure),
            web.get(r"/recordings/{id}/{n:\d+}.{kind:wav|png|codes\.png}", self._show),
            web.get("/live", self._live),
            web.get("/speak", self._speak),
            web.static("/page", _PAGE),
        ])  # fmt: skip
        return app

    async def _describe(self, _: web.Request) -> web.Response:
        config = self._codec.config
        return web.json_response({
            "name": self._name,
            "note": self._note,
            "sample_rate": config.sample_rate,
            "num_channels": config.num_channels,
            "frame_rate": config.frame_rate,
            "hop_length": config.hop_length,
            "num_quantizers": config.quantizer.num_quantizers,
            "codebook_size": config.quantizer.codebook_size,
            "bitrate": config.bitrate(1),
            "max_seconds": sound.MAX_SECONDS,
            "ticks": sound.frequency_ticks(config.sample_rate),
            "speaker": self._speaker and self._speaker.describe(),
        })  # fmt: skip

    async def _add(self, request: web.Request) -> web.Response:
        data = await request.read()
        name = request.query.get("name", "recording")
        recording = await self._compute(sound.read, self._codec, data, name)
        return web.json_response(self._keep(recording))

    def _keep(self, recording: sound.Recording) -> dict[str, Any]:
        """Stores a recording; its id and lengths for the page."""
        key = secrets.token_hex(8)
        self._recordings[key] = recording
        while len(self._recordings) > _MAX_RECORDINGS:
            self._recordings.popitem(last=False)
        return {
            "id": key,
            "seconds": recording.wav.shape[1] / self._codec.config.sample_rate,
            "file_seconds": recording.seconds,
            "num_frames": recording.codes.shape[1],
        }

    async def _measure(self, request: web.Request) -> web.Response:
        recording, number = self._requested(request)
        config = self._codec.config
        wav_hat = await self._wav(request)
        values = await self._compute(sound.distances, recording, wav_hat, config.sample_rate)
        return web.json_response({"bitrate": config.bitrate(number), "distances": values})

    async def _show(self, request: web.Request) -> web.Response:
        recording, number = self._requested(request)
        config = self._codec.config
        kind = request.match_info["kind"]
        if kind == "codes.png":
            size = config.quantizer.codebook_size
            body = await self._compute(sound.draw_codes, recording.codes, size, number)
            return web.Response(body=body, content_type="image/png")
        wav = await self._wav(request)
        if kind == "wav":
            body = await self._compute(sound.to_wav, wav, config.sample_rate)
            return web.Response(body=body, content_type="audio/wav")
        draw = sound.draw_spectrogram
        body = await self._compute(draw, wav, recording.wav, config.sample_rate)
        return web.Response(body=body, content_type="image/png")

    def _requested(self, request: web.Request) -> tuple[sound.Recording, int]:
        recording = self._recording(request.match_info["id"])
        number = int(request.match_info["n"])
        if number:  # 0 is the original
            self._codec.config.check_num_quantizers(number)
        return recording, number

    def _recording(self, key: str) -> sound.Recording:
        if key not in self._recordings:
            raise ValueError("this recording is not kept any more: load it again")
        self._recordings.move_to_end(key)  # the least recently used one is dropped first
        return self._recordings[key]

    async def _wav(self, request: web.Request) -> np.ndarray:
        """The original (N = 0) or a reconstruction; the latest ones are kept."""
        recording, number = self._requested(request)
        if number == 0:
            return recording.wav
        key = (request.match_info["id"], number)
        async with self._computing:
            if key not in self._results:
                function = sound.reconstruct
                wav_hat = await asyncio.to_thread(function, self._codec, recording, number)
                self._results[key] = wav_hat
                while len(self._results) > _MAX_RESULTS:
                    self._results.popitem(last=False)
            return self._results[key]

    async def _compute(self, function: Callable[..., Any], *args: Any) -> Any:
        """Runs a function in a thread, one at a time."""
        async with self._computing:
            return await asyncio.to_thread(function, *args)

    async def _live(self, request: web.Request) -> web.WebSocketResponse:
        """Live audio: blocks of float32 mono samples in; codes and reconstructed samples out.

        After the streams are compiled the server sends {"ready": true}. For each block that
        completes frames it sends {"codes": [[...], ...], "encode_ms", "decode_ms"} and then the
        reconstructed samples of these frames. The page closes the socket. When another page starts
        live audio, the server closes the socket of the earlier page.
        """
        response = web.WebSocketResponse(max_msg_size=2**20)
        await response.prepare(request)
        earlier = self._live_page
        self._live_page = response
        with contextlib.suppress(OSError):  # the earlier page was closed meanwhile
            if earlier is not None and not earlier.closed:
                await earlier.send_json({"error": "Live audio was started on another page."})
                await earlier.close()
        with contextlib.suppress(OSError):  # this page was closed meanwhile
            async with self._streaming:
                try:
                    await self._stream(response, int(request.query.get("quantizers", 0)))
                except ValueError as error:
                    await response.send_json({"error": str(error)})
            await response.close()
        return response

    async def _stream(self, response: web.WebSocketResponse, num_quantizers: int) -> None:
        streams = await asyncio.to_thread(LiveStreams, self._codec, num_quantizers)
        await response.send_json({"ready": True})
        async for message in response:
            if message.type != WSMsgType.BINARY:
                continue
            fields, samples = await asyncio.to_thread(streams.push, message.data)
            if samples.size:
                await response.send_json(fields)
                await response.send_bytes(samples.tobytes())

    async def _speak(self, request: web.Request) -> web.WebSocketResponse:
        """Speech while it is sampled.

        The page sends {"text", "num_quantizers", "seed", "prompt": id of a recording or "",
        "prompt_text"}. The server sends the mono samples of each block as float32, and at the end
        {"id", "seconds", "num_frames"} of the speech, which is kept as a recording. An error is
        {"error": one sentence}. The sampling ends early if the page closes the socket.
        """
        response = web.WebSocketResponse(max_msg_size=2**20)
        await response.prepare(request)
        message = await response.receive()
        with contextlib.suppress(OSError):  # a page that was closed meanwhile
            if message.type == WSMsgType.TEXT:
                async with self._speaking:
                    try:
                        await self._send_speech(response, message.data)
                    except ValueError as error:
                        await response.send_json({"error": " ".join(str(error).split())})
            await response.close()
        return response

    async def _send_speech(self, response: web.WebSocketResponse, text: str) -> None:
        if self._speaker is None:
            raise ValueError("the demo was started without --speaker")
        message = speech.parse_message(text)
        prompt = self._recording(message.prompt) if message.prompt else None
        blocks = await asyncio.to_thread(self._speaker.begin, message, prompt)
        # The page sends nothing more, so this is done when the page closes the socket.
        closing = asyncio.create_task(response.receive())
        sent = []
        try:
            while block := await asyncio.to_thread(next, blocks, None):
                if closing.done():
                    return
                sent.append(block)
                if block.wav.shape[1]:
                    await response.send_bytes(sound.to_mono(block.wav).tobytes())
        finally:
            closing.cancel()
            blocks.close()
        recording = await asyncio.to_thread(sound.join, sent, self._codec.config.sample_rate)
        await response.send_json(self._keep(recording) | {"ended": sent[-1].ended})


class LiveStreams:
    """An encoder and a decoder stream that blocks of mono samples pass through."""

    def __init__(self, codec: Codec, num_quantizers: int):
        """Compiles the streams. Raises ValueError if the codec has fewer quantizers."""
        self._num_channels = codec.config.num_channels
        self._encoder = moss_tok.EncoderStream(codec, num_quantizers, 1, _CHUNK_FRAMES)
        self._decoder = moss_tok.DecoderStream(codec, num_quantizers, 1, _CHUNK_FRAMES)

    def push(self, data: bytes) -> tuple[dict[str, Any], np.ndarray]:
        """Codes and times of the frames that a block completes, and their samples [S]."""
        if len(data) % 4:
            raise ValueError("a block must have float32 samples")
        samples = np.frombuffer(data, "<f4")
        block = np.repeat(np.clip(samples, -1, 1)[None], self._num_channels, axis=0)
        start = time.perf_counter()
        codes = self._encoder.push(block)
        encoded = time.perf_counter()
        wav_hat = self._decoder.push(codes)
        decoded = time.perf_counter()
        fields = {
            "codes": codes.tolist(),
            "encode_ms": 1000 * (encoded - start),
            "decode_ms": 1000 * (decoded - encoded),
        }
        return fields, sound.to_mono(wav_hat)


async def _index(_: web.Request) -> web.FileResponse:
    return web.FileResponse(_PAGE / "index.html")


async def _add_headers(_: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(_HEADERS)


@web.middleware
async def _one_sentence(request: web.Request, handler: Any) -> web.StreamResponse:
    """Answers user errors with their message."""
    try:
        return await handler(request)
    except (ValueError, OSError) as error:
        line = " ".join(str(error).split())
        return web.json_response({"error": line}, status=400)
    except web.HTTPRequestEntityTooLarge:
        line = f"the file is too large: at most {_MAX_BYTES / 2**20:.0f} MB"
        return web.json_response({"error": line}, status=400)
