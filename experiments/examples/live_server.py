"""A live server: clients send audio over WebSockets and get codes and reconstructed audio back.

    python experiments/examples/live_server.py --port 8765 --num_slots 4
    python experiments/examples/live_client.py experiments/starter/speech-test-00.opus out.wav

Every client has a slot of one `EncoderStream` and one `DecoderStream`, so that blocks which arrive
at about the same time are computed together. Codes and audio are those of the whole recording.
Prints the address when the streams are compiled, then a line per client. Needs
`pip install -e '.[demo]'` (aiohttp). It listens on 127.0.0.1 only and has no authentication.

Protocol: the server sends {"sample_rate", "num_channels", "num_quantizers"}, or {"error"} if all
slots are in use. The client sends binary messages of float32 samples, channels interleaved, any
number of them, then the text "end". For frames that are complete the server sends {"codes"}, nested
lists [Q, T], then a binary message of their samples; at last {"end": true}.
"""

import argparse
import asyncio
import dataclasses
from collections.abc import Sequence
from typing import Any

import command
import numpy as np
from aiohttp import WSMsgType, web

import moss_tok
from moss_tok.demo.server import bind

CHUNK_FRAMES = (1, 4)  # compiled sizes; 4 to catch up
MAX_WAITING = 64  # blocks of a client that wait; then the server stops reading its socket


@dataclasses.dataclass
class Client:
    """A client and its slot.

    Attributes:
      slot: The slot of both streams.
      blocks: Audio [C, S] that waits.
      ended: Whether no more audio comes.
      replies: (codes, wav) of each computation; None at the end.
      room: Set while more blocks may wait.
    """

    slot: int
    blocks: list[np.ndarray] = dataclasses.field(default_factory=list)
    ended: bool = False
    replies: asyncio.Queue = dataclasses.field(default_factory=asyncio.Queue)
    room: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)


class Server:
    """Streams with slots, and the clients that use them."""

    def __init__(self, codec: Any, num_slots: int, num_quantizers: int | None = None):
        """Compiles the streams. Raises ValueError for numbers out of range."""
        self._config = codec.config
        self._num_quantizers = codec.config.check_num_quantizers(num_quantizers)
        settings = self._num_quantizers, num_slots, CHUNK_FRAMES
        self._encoder = moss_tok.EncoderStream(codec, *settings)
        self._decoder = moss_tok.DecoderStream(codec, *settings)
        self._free = list(range(num_slots))
        self._clients: list[Client] = []
        self._work: asyncio.Event  # set while a client has something to compute

    def app(self) -> web.Application:
        """The application; it computes as long as it runs."""
        app = web.Application()
        app.add_routes([web.get("/", self._handle)])
        app.cleanup_ctx.append(self._computing)
        return app

    async def _computing(self, _: web.Application):
        self._work = asyncio.Event()  # here, because it belongs to the loop that runs
        task = asyncio.create_task(self._compute_forever())
        yield
        task.cancel()

    async def _compute_forever(self) -> None:
        """Repeatedly computes the waiting blocks of all clients at once, in a thread."""
        while True:
            await self._work.wait()
            self._work.clear()
            blocks = {}
            ended = []
            for client in list(self._clients):
                if client.blocks:
                    blocks[client.slot] = np.concatenate(client.blocks, axis=1)
                    client.blocks.clear()
                    client.room.set()
                if client.ended:
                    ended.append(client.slot)
            results = await asyncio.to_thread(self._compute, blocks, ended)
            for client in list(self._clients):
                if client.slot in results:
                    client.replies.put_nowait(results[client.slot])
                if client.slot in ended:
                    client.replies.put_nowait(None)
                    self._clients.remove(client)
                    self._free.append(client.slot)
                    self._free.sort()

    def _compute(self, blocks: dict[int, np.ndarray], ended: list[int]) -> dict[int, tuple]:
        """Codes [Q, T] and audio [C, S] of each slot; slots that end are ready for new streams."""
        codes = self._encoder.push(blocks)
        for slot, last in self._encoder.finish(ended).items():
            before = codes.get(slot, last[:, :0])
            codes[slot] = np.concatenate([before, last], axis=1)
        wavs = self._decoder.push(codes)
        self._encoder.reset(ended)
        self._decoder.reset(ended)
        return {slot: (codes[slot], wavs[slot]) for slot in codes}

    async def _handle(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(max_msg_size=2**22)
        await socket.prepare(request)
        if not self._free:
            await socket.send_json({"error": "all slots are in use; try again later"})
            await socket.close()
            return socket
        client = Client(self._free.pop(0))
        self._clients.append(client)
        print(f"slot {client.slot}: a client has connected", flush=True)
        sender = asyncio.create_task(self._send(socket, client))
        try:
            await self._receive(socket, client)
        except ValueError as error:
            await socket.send_json({"error": str(error)})
        finally:  # also when the client is gone: the slot is free after its last computation
            client.ended = True
            self._work.set()
            await asyncio.gather(sender, return_exceptions=True)
        print(f"slot {client.slot}: the client has ended", flush=True)
        await socket.close()
        return socket

    async def _receive(self, socket: web.WebSocketResponse, client: Client) -> None:
        """Takes audio until "end" or until the client is gone. Raises ValueError on bad blocks."""
        async for message in socket:
            if message.type == WSMsgType.TEXT and message.data == "end":
                return
            if message.type != WSMsgType.BINARY:
                raise ValueError('a message must be float32 samples or the text "end"')
            client.blocks.append(self._parse(message.data))
            self._work.set()
            if len(client.blocks) >= MAX_WAITING:
                client.room.clear()
                await client.room.wait()

    def _parse(self, data: bytes) -> np.ndarray:
        """Samples [C, S]. A bad block must not reach `push`, which would refuse all slots."""
        channels = self._config.num_channels
        if len(data) % (4 * channels):
            raise ValueError(f"a block must be float32 samples of {channels} channels")
        samples = np.frombuffer(data, "<f4").reshape(-1, channels).T
        if not np.isfinite(samples).all():
            raise ValueError("samples must be finite numbers")
        return samples

    async def _send(self, socket: web.WebSocketResponse, client: Client) -> None:
        await socket.send_json({
            "sample_rate": self._config.sample_rate,
            "num_channels": self._config.num_channels,
            "num_quantizers": self._num_quantizers,
        })  # fmt: skip
        while (reply := await client.replies.get()) is not None:
            codes, wav = reply
            if codes.shape[1]:
                await socket.send_json({"codes": codes.tolist()})
                await socket.send_bytes(np.ascontiguousarray(wav.T).astype("<f4").tobytes())
        await socket.send_json({"end": True})


def main(argv: Sequence[str] | None = None) -> None:
    """Serves until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--num_slots", type=int, default=4, help="clients at the same time")
    parser.add_argument("--num_quantizers", type=int, help="codes per frame; default: all")
    args = parser.parse_args(argv)
    listener = bind(args.port)
    server = Server(moss_tok.load(), args.num_slots, args.num_quantizers)
    print(f"ws://127.0.0.1:{listener.getsockname()[1]} with {args.num_slots} slots", flush=True)
    web.run_app(server.app(), sock=listener, print=None, access_log=None)


if __name__ == "__main__":
    command.run(main)
