"""The chat page in a browser: models are listed, a message is typed, both answers stream in, the model is switched."""

import asyncio
import base64
import contextlib
import itertools
import json
import re
import shutil
import subprocess

import aiohttp
import pytest

from tests.orchestrator.serving.test_server import served
from tests.processes import PATIENCE_S, end

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium"),
]
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")


class Page:
    """One tab, by the DevTools protocol (https://chromedevtools.github.io/devtools-protocol/)."""

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

    async def type(self, text):
        """Into what has the focus, and Enter."""
        await self.call("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            await self.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13)


@contextlib.asynccontextmanager
async def opened(url, profile, *flags):
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


ANSWERS = "[...document.querySelectorAll('.turn')].at(-1)?.querySelectorAll('.answer') ?? []"
DONE = f"[...{ANSWERS}].map(one => [one.querySelector('h2').textContent, one.querySelector('p').textContent])"


async def talk(url, folder, flags):
    async with opened(url, folder / "profile", *flags) as page:
        await page.until("document.getElementById('model')?.options.length > 2")
        await page.value("document.getElementById('model').value = 'plain'")
        await page.value("document.getElementById('most').value = 24")
        await page.value("document.getElementById('text').focus()")
        await page.type("the cat sees a dog")
        assert await page.until("document.querySelectorAll('.answer').length == 2")
        first = await page.until(f"document.querySelector('.busy') ? null : {DONE}")
        notes = await page.value("[...document.querySelectorAll('.answer small')].map(one => one.textContent)")

        await page.value("document.getElementById('model').value = 'scaled'")
        await page.value("document.getElementById('beside').checked = false")
        await page.value("document.getElementById('text').focus()")
        await page.type("hello\ncat")
        await page.until("document.querySelectorAll('.turn').length == 2")
        second = await page.until(f"document.querySelector('.busy') ? null : {DONE}")

        fits = await page.value("document.documentElement.scrollWidth <= window.innerWidth")
        picture = await page.call("Page.captureScreenshot", format="png")
        (folder / "page.png").write_bytes(base64.b64decode(picture["data"]))
        return first, notes, second, fits, page.complaints


@pytest.mark.parametrize(
    "flags", [("--window-size=1200,800",), ("--window-size=400,800", "--force-dark-mode")], ids=["wide", "phone, dark"]
)  # fmt: skip
def test_a_message_is_typed_and_both_models_answer(adapters, tmp_path, flags):
    server = served(tmp_path, adapters["plain"], adapters["scaled"])
    asked = {"max_tokens": 24, "messages": [{"role": "user", "content": "the cat sees a dog"}]}
    wanted = {model: server.text(model, **asked) for model in ("base", "plain")}

    first, notes, second, fits, complaints = asyncio.run(talk(server.url, tmp_path, flags))

    end(server.process)
    assert dict(first) == wanted and [name for name, _ in first] == ["base", "plain"]
    assert all(re.search(r"\d+ .*, [\d.]+ s", note) for note in notes), notes
    assert [name for name, _ in second] == ["scaled"] and second[0][1]
    assert fits and not complaints, json.dumps(complaints)[:2000]
