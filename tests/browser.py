"""A page in headless Chromium, driven by the DevTools protocol (https://chromedevtools.github.io/devtools-protocol/)."""

import asyncio
import contextlib
import itertools
import re
import shutil
import subprocess

import aiohttp
import pytest

from tests.processes import PATIENCE_S

needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")


class Page:
    """One tab; what it complains of is kept."""

    def __init__(self, socket):
        self._socket, self._numbers, self.complaints = socket, itertools.count(1), []

    async def call(self, method, **parameters):
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        async with asyncio.timeout(PATIENCE_S):
            while True:
                message = await self._socket.receive_json()
                entry = message.get("params", {}).get("entry", {})
                if message.get("method") == "Runtime.exceptionThrown" or entry.get("level") in ("warning", "error"):
                    self.complaints.append(message["params"])
                if message.get("id") == number:
                    assert "error" not in message, message
                    return message["result"]

    async def value(self, expression):
        found = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return found["result"].get("value")

    async def until(self, expression):
        async with asyncio.timeout(PATIENCE_S):
            while not (found := await self.value(expression)):
                await asyncio.sleep(0.05)
        return found

    async def show(self, width, height=900, dark=False):
        """The size of the window, and the colours that its user prefers."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])

    async def type(self, text):
        """Into what has the focus, and Enter."""
        await self.call("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            await self.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13)


@contextlib.asynccontextmanager
async def opened(url, profile, *flags):
    """The page of an address, in a browser of its own."""
    browser = subprocess.Popen(
        ["chromium", *FLAGS, *flags, "--remote-debugging-port=0", f"--user-data-dir={profile}", url],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        line = next(line for line in browser.stderr if "DevTools listening" in line)
        address = re.search(r"ws://([^/]+)/", line)[1]
        async with aiohttp.ClientSession() as session:
            tabs = []
            while not tabs:
                async with session.get(f"http://{address}/json") as reply:
                    tabs = [one for one in await reply.json() if one["type"] == "page"]
            async with session.ws_connect(tabs[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Page(socket)
                for domain in ("Runtime", "Log", "Page"):
                    await page.call(f"{domain}.enable")
                yield page
    finally:
        browser.terminate()
        browser.wait(PATIENCE_S)
        browser.stderr.close()
