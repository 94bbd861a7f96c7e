"""The chat page in a browser: models are listed, a message is typed, both answers stream in, the model is switched."""

import asyncio
import base64
import json
import re

import pytest

from tests.browser import needs_chromium, opened
from tests.orchestrator.serving.test_server import served
from tests.processes import end

pytestmark = [pytest.mark.slow, needs_chromium]
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
