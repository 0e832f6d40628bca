"""A client of live_server.py: sends a file, in real time or faster, and writes what comes back.

    python experiments/examples/live_client.py experiments/starter/speech-test-00.opus out.wav

Writes the audio to out.wav and the codes to out.npz, as int16 [Q, T]. Prints how much came back and
after how many seconds. Needs `pip install -e '.[demo]'` (aiohttp).
"""

import argparse
import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import command
import numpy as np

from moss_tok.audio import files

BLOCK_SECONDS = 0.02


async def stream(url: str, path: str, speed: float) -> tuple[np.ndarray, np.ndarray, int]:
    """Sends a file `speed` times as fast as real time (0: at once).

    Returns:
      Codes [Q, T], audio [C, S] (without what only padded the last frame), and its sample rate.

    Raises:
      ValueError: The server refuses, or closes the connection before the end.
    """
    async with aiohttp.ClientSession() as session, session.ws_connect(url) as socket:
        config = _checked(await socket.receive())
        rate = config["sample_rate"]
        channels = config["num_channels"]
        wav = await asyncio.to_thread(files.read, path, rate, channels)
        sending = asyncio.create_task(_send(socket, wav, round(BLOCK_SECONDS * rate), speed))
        codes = [np.zeros((config["num_quantizers"], 0), np.int16)]
        wavs = [np.zeros((channels, 0), np.float32)]
        while "end" not in (message := _checked(await socket.receive())):
            codes.append(np.array(message["codes"], np.int16))
            samples = np.frombuffer((await socket.receive()).data, "<f4")
            wavs.append(samples.reshape(-1, channels).T)
        await sending
    return np.concatenate(codes, 1), np.concatenate(wavs, 1)[:, : wav.shape[1]], rate


def _checked(message: Any) -> dict[str, Any]:
    """The fields of a JSON message; ValueError for errors and for a closed connection."""
    if message.type != aiohttp.WSMsgType.TEXT:
        raise ValueError("the server closed the connection before the end")
    fields = message.json()
    if "error" in fields:
        raise ValueError(f"the server answered: {fields['error']}")
    return fields


async def _send(socket: Any, wav: np.ndarray, block_size: int, speed: float) -> None:
    start = time.monotonic()
    for first in range(0, wav.shape[1], block_size):
        if speed:
            due = start + first / block_size * BLOCK_SECONDS / speed
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        block = wav[:, first : first + block_size]
        await socket.send_bytes(np.ascontiguousarray(block.T).astype("<f4").tobytes())
    await socket.send_str("end")


def main(argv: Sequence[str] | None = None) -> None:
    """Sends a file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("input", help="audio file to send")
    parser.add_argument("output", type=Path, help="audio file to write; codes go to .npz beside it")
    parser.add_argument("--url", default="http://127.0.0.1:8765", help="address of the server")
    parser.add_argument(
        "--speed", type=float, default=1.0, help="multiple of real time; 0: all at once"
    )
    args = parser.parse_args(argv)
    files.check_output(args.output)
    start = time.monotonic()
    codes, wav, rate = asyncio.run(stream(args.url, args.input, args.speed))
    files.write(args.output, wav, rate)
    np.savez(args.output.with_suffix(".npz"), codes=codes)
    print(f"{args.output}: {codes.shape[0]} x {codes.shape[1]} codes, {wav.shape[1] / rate:.1f} s "
          f"of audio, after {time.monotonic() - start:.1f} s")  # fmt: skip


if __name__ == "__main__":
    command.run(main)
