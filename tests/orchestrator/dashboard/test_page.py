"""The page in a browser: rows change, a live curve grows, a page that was away continues; wide, phone, Japanese."""

import asyncio

import pytest

from orchestrator.runs.events import Evaluation
from tests.benchmarks.reading import copy_runs, make_run
from tests.browser import needs_chromium, opened
from tests.orchestrator.dashboard.served import Training, served

pytestmark = [pytest.mark.slow, needs_chromium]
ROWS = "[...document.querySelectorAll('tbody tr')].map(row => row.querySelector('a').textContent)"
FITS = "document.documentElement.scrollWidth <= window.innerWidth"
POINTS = "(document.querySelector('svg .smooth')?.getAttribute('d') ?? '').split('L').length"


@pytest.fixture
def runs(tmp_path):
    copy_runs(make_run(tmp_path / "runs" / "run-00000", 60, 2), 3)
    return tmp_path / "runs"


async def look_at_table(url, folder, training, width, dark):
    async with opened("about:blank", folder / "profile") as page:
        await page.show(width, dark=dark)
        await page.call("Page.navigate", url=url)
        first = await page.until(f"{ROWS}.length == 4 ? {ROWS} : null")
        training.train(2)
        await page.until("document.querySelector('tbody tr').textContent.includes('2 / 4')")
        fits = await page.value(FITS)
        await page.value("document.querySelector('input').value = '00002'")
        await page.value("document.querySelector('input').dispatchEvent(new Event('input'))")
        found = await page.value(ROWS)
        await page.value("document.querySelector('tbody a').click()")
        await page.until("document.title == 'run-00002' && document.querySelector('svg') !== null")
        return first, found, fits, await page.value(FITS), page.complaints


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)], ids=["wide", "phone, dark"])
def test_rows_change_while_one_looks_and_lead_to_their_runs(runs, tmp_path, width, dark):
    with Training(runs / "live") as training, served(runs) as url:
        first, found, *fits, complaints = asyncio.run(look_at_table(url, tmp_path, training, width, dark))

    assert first[0] == "live" and sorted(first[1:]) == ["run-00000", "run-00001", "run-00002"]
    assert found == ["run-00002"]
    assert fits == [True, True] and not complaints, complaints


async def look_at_run(url, folder, training):
    async with opened("about:blank", folder / "profile") as page:
        await page.show(390)
        await page.call("Page.navigate", url=f"{url}run/live?lang=ja")
        await page.until(f"{POINTS} == 3")
        training.train(2)
        training.run.record(Evaluation(5, 2.0))
        await page.until(f"{POINTS} == 5 && document.querySelectorAll('svg .held').length == 2")
        await page.value("Object.defineProperty(document, 'hidden', {value: true, configurable: true})")
        await page.value("document.dispatchEvent(new Event('visibilitychange'))")
        training.train(4)
        await asyncio.sleep(1.5)
        away = await page.value(POINTS)
        await page.value("Object.defineProperty(document, 'hidden', {value: false})")
        await page.value("document.dispatchEvent(new Event('visibilitychange'))")
        await page.until(f"{POINTS} == 9")
        training.end()
        await page.until("document.querySelector('.state').textContent == '停止'")
        texts = await page.value("[...document.querySelectorAll('h2, summary')].map(one => one.textContent)")
        return away, texts, await page.value(FITS), page.complaints


def test_a_curve_grows_and_a_page_that_was_away_misses_nothing(runs, tmp_path):
    with Training(runs / "live") as training, served(runs) as url:
        training.train(3)
        away, texts, fits, complaints = asyncio.run(look_at_run(url, tmp_path, training))

    assert away == 5
    assert {"損失", "マシン", "イベント", "選ばれた設定とその理由"} <= set(texts)
    assert fits and not complaints, complaints
