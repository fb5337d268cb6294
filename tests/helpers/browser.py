"""A headless Chromium that tests click through, by its DevTools protocol (https://chromedevtools.github.io/devtools-protocol/).

with Browser(tmp_path) as browser:
    browser.open(page, width=1200, height=900, dark=True)
    browser.click("#theme")
    assert browser.evaluate("document.title") == "…"
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
WITHOUT = "no Chromium on this machine (Debian: apt-get install chromium)"
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync --disable-background-networking "
    "--disable-component-update --hide-scrollbars --remote-debugging-port=0"
)
SECONDS = 120.0
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Home": 36, "End": 35, "Tab": 9, " ": 32}


class Browser:
    """One page. `errors` holds what its console complained of, and exceptions of its scripts."""

    def __init__(self, folder: Path) -> None:
        assert CHROMIUM is not None
        self.profile = folder / "profile"
        self.loop = asyncio.new_event_loop()
        self.numbers = itertools.count(1)
        self.errors: list[str] = []
        self.session: Any = None
        self.process = subprocess.Popen(
            [CHROMIUM, *shlex.split(FLAGS), f"--user-data-dir={self.profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def __enter__(self) -> Browser:
        try:
            self.loop.run_until_complete(self._connect())
        except BaseException:
            self.__exit__()
            raise
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        if self.session is not None:
            self.loop.run_until_complete(self.session.close())
        self.process.kill()
        self.process.wait()
        self.loop.close()

    async def _connect(self) -> None:
        import aiohttp

        port_file, until = self.profile / "DevToolsActivePort", time.monotonic() + SECONDS
        while not (port_file.is_file() and port_file.read_text().strip()):
            assert self.process.poll() is None, "Chromium has ended"
            assert time.monotonic() < until, "Chromium doesn't listen"
            await asyncio.sleep(0.1)
        address = f"http://127.0.0.1:{port_file.read_text().split()[0]}"
        self.session = session = aiohttp.ClientSession()
        async with session.get(f"{address}/json") as answer:
            pages = [page for page in await answer.json() if page["type"] == "page"]
        self.socket = await session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.loop.run_until_complete(asyncio.wait_for(self._call(method, parameters), SECONDS))

    async def _call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        number = next(self.numbers)
        await self.socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = json.loads((await self.socket.receive()).data)
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(str(message["params"]["exceptionDetails"]))
            elif message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
                self.errors.append(str(message["params"]["entry"]["text"]))

    def open(self, page: Path, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Load a file and wait until it is there."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page.absolute().as_uri())
        until = time.monotonic() + SECONDS
        while self.evaluate("document.readyState + location.protocol") != "completefile:":
            assert time.monotonic() < until, "the page doesn't load"
            time.sleep(0.05)
        self.settle()

    def settle(self) -> None:
        """Wait for what is drawn with the next frame."""
        frames = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))"
        self.call("Runtime.evaluate", expression=frames, awaitPromise=True)

    def evaluate(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Left, top, width and height of an element in the window, scrolled to."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{found}.scrollIntoView({{block: 'center'}})")
        self.settle()
        return tuple(self.evaluate(f"(b => [b.left, b.top, b.width, b.height])({found}.getBoundingClientRect())"))

    def click(self, selector: str, times: int = 1) -> None:
        left, top, width, height = self.box(selector)
        for count in range(1, times + 1):
            for kind in ("mousePressed", "mouseReleased"):
                self.mouse(kind, left + width / 2, top + height / 2, count)
        self.settle()

    def drag(self, selector: str, start: float, end: float) -> None:
        """Over an element, from one share of its width to another."""
        left, top, width, height = self.box(selector)
        middle = top + height / 2
        self.mouse("mousePressed", left + start * width, middle)
        for part in (0.3, 0.7, 1.0):
            self.mouse("mouseMoved", left + (start + part * (end - start)) * width, middle)
        self.mouse("mouseReleased", left + end * width, middle)
        self.settle()

    def mouse(self, kind: str, x: float, y: float, count: int = 1) -> None:
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=count)

    def hover(self, selector: str, share: float = 0.5) -> None:
        left, top, width, height = self.box(selector)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=left + share * width, y=top + height / 2)
        self.settle()

    def key(self, key: str, shift: bool = False) -> None:
        code = KEYS.get(key, ord(key[0].upper()))
        text = {"text": key} if len(key) == 1 else {}
        common: dict[str, Any] = {"key": key, "windowsVirtualKeyCode": code, "modifiers": 8 * shift}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)
        self.settle()

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
