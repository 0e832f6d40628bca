"""What the tests of the demo share: a server, sounds, and the page in a headless browser."""

import asyncio
import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from aiohttp.test_utils import TestClient, TestServer
from helpers import RATE

from moss_tok.demo import server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WIDE = {"width": 1280, "height": 900}
NARROW = {"width": 390, "height": 844}
SCREENSHOTS = os.environ.get("MOSS_TOK_SCREENSHOTS")  # folder to keep pictures of the page in


def noise(seconds=1.0, scale=0.1):
    return scale * np.random.default_rng(0).standard_normal(int(seconds * RATE))


def wav_bytes(samples, rate=RATE):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV")
    return buffer.getvalue()


def serve(codec, check, speaker=None):
    """Runs `check`, a coroutine function of a client, against a server."""

    async def run():
        app = server.Demo(codec, "tiny", "a test", speaker).app()
        async with TestClient(TestServer(app)) as client:
            return await check(client)

    return asyncio.run(run())


@contextlib.contextmanager
def demo(*arguments):
    """The address of a demo in another process."""
    argv = [sys.executable, "-m", "moss_tok", "demo", "--port=0", *map(str, arguments)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            yield re.search(r"http://127\.0\.0\.1:\d+/", line)[0]
        finally:  # also if the test is skipped; otherwise Popen would wait for ever
            process.terminate()


@contextlib.contextmanager
def chromium(*flags):
    """Headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("no Chromium")
    with playwright.sync_playwright() as run:
        started = run.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *flags])
        yield started
        started.close()


# A microphone with a beep each second, and pages that may play.
FAKE_DEVICES = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
                "--autoplay-policy=no-user-gesture-required")  # fmt: skip


def open_page(browser, address, viewport=WIDE, **options):
    """The page, the addresses that it asks for, and the errors that its console shows."""
    page = browser.new_context(viewport=viewport, **options).new_page()
    page.set_default_timeout(120_000)
    asked = []
    errors = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "console",
        lambda entry: "Content Security Policy" in entry.text and errors.append(entry.text),
    )
    page.goto(address)
    page.wait_for_selector("body[data-ready]")
    return page, asked, errors


def wait_until(page, expression, seconds=60):
    """Waits until a JavaScript expression is true; wait_for_function breaks the page's policy."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(50)


def screenshot(page, name):
    if SCREENSHOTS:
        page.screenshot(path=Path(SCREENSHOTS) / f"{name}.png", full_page=True)


def no_sideways_scrolling(page):
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")
