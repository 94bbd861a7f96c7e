"""What the page gets: who may ask, rows that change, a run's events of which a client that comes back misses none."""

import json
import re
from pathlib import Path

import pytest

from orchestrator.runs.events import Note
from tests.benchmarks.reading import make_run
from tests.orchestrator.dashboard.served import Stream, Training, get, served

PAGE = Path(__file__).resolve().parents[3] / "orchestrator" / "dashboard"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "done", 60, 2)
    (folder / "notes").mkdir()
    return folder


@pytest.fixture(scope="module")
def url(runs):
    with served(runs) as found:
        yield found


def test_the_table_has_a_run_with_its_model_method_and_losses(url):
    (row,) = json.loads(get(url, "/api/runs")[2])["runs"]

    assert (row["run"], row["state"], row["method"], row["model"]) == ("done", "finished", "lora", "model")
    assert (row["before"], row["after"], row["step"]) == (3.2, 1.1, 60)


@pytest.mark.parametrize("lang", ["en", "ja"])
def test_the_page_loads_nothing_from_elsewhere_and_no_script_of_its_text(url, lang):
    status, headers, text = get(url, f"/?lang={lang}")

    assert status == 200 and f'<html lang="{lang}">' in text
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
    assert set(re.findall(r'(?:src|href)="(?!data:)([^"]*)"', text)) == {
        "/static/page.css",
        "/static/page.js",
        "/static/chart.js",
    }
    words = json.loads(re.search(r'id="settings">(.*?)</script>', text)[1])["words"]
    assert ("すべての実行" if lang == "ja" else "All runs") == words["all"]
    assert not re.search(r"https?://(?!www\.w3\.org)", "".join(file.read_text() for file in PAGE.glob("*.js")))


def test_every_word_that_the_script_asks_for_is_there(url):
    words = json.loads(re.search(r'id="settings">(.*?)</script>', get(url)[2])[1])["words"]
    script = "".join(file.read_text() for file in PAGE.glob("*.js"))

    asked = set(re.findall(r"words\.(\w+)", script))
    assert asked and asked <= set(words)
    heads = {name for listed in re.findall(r"heads = \[([^]]*)\]", script) for name in re.findall(r'"(\w+)"', listed)}
    assert len(heads) > 10 and heads <= set(words)


@pytest.mark.parametrize(
    "headers",
    [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Host": "[::"}],
    ids=["another name", "another site", "by the browser's word", "no name"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/", "/api/runs", "/api/runs/events", "/api/runs/done/events", "/report/done"])
def test_pages_of_other_sites_are_refused(url, path, headers):
    assert get(url, path, **headers)[0] == 403


def test_a_link_on_another_page_may_be_followed(url):
    followed = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}

    assert get(url, "/run/done", **followed)[0] == 200
    assert get(url, "/run/done", **{**followed, "Sec-Fetch-Dest": "iframe"})[0] == 403


@pytest.mark.parametrize("path", ["/api/runs", "/", "/api/runs/done/events"])
def test_nothing_can_be_changed(url, path):
    assert get(url, path, method="POST")[0] == 405


@pytest.mark.parametrize("name", ["notes", "..", "%2e%2e", "..%2f..%2fetc", "none", "done%2f..%2fdone"])
def test_only_runs_of_the_folder_are_read(url, name):
    assert get(url, f"/api/runs/{name}/events")[0] == 404
    assert get(url, f"/static/{name}")[0] == 404


def test_who_reaches_it_from_elsewhere_needs_the_token(runs, monkeypatch):
    from orchestrator.dashboard import server

    monkeypatch.setattr(server, "is_loopback", lambda host: False)
    with served(runs) as address:
        token = address.partition("token=")[2]
        assert len(token) > 20

        assert get(address, "/api/runs")[0] == 401
        assert get(address, "/api/runs?token=guessed")[0] == 401
        status, headers, _ = get(address, f"/?token={token}")
        assert status == 303 and headers["location"] == "/"
        cookie = headers["set-cookie"]
        assert "HttpOnly" in cookie and "samesite=lax" in cookie.lower()
        assert get(address, "/api/runs", Cookie=cookie.partition(";")[0], Host="pc.lan:8200")[0] == 200


def test_rows_that_changed_are_sent_and_only_those(tmp_path):
    make_run(tmp_path / "done", 8)
    with Training(tmp_path / "live") as training, served(tmp_path) as url, Stream(url, "/api/runs/events") as stream:
        _, first, _ = stream.next("all")
        training.train(4)
        _, changed, number = stream.next("rows")

        assert {row["run"]: row["state"] for row in first} == {"done": "finished", "live": "running"}
        assert [(row["run"], row["doing"], row["step"]) for row in changed] == [("live", "training", 4)]
        assert changed[0]["left_s"] >= 2.0  # the evaluation after training takes what the one before took
        training.end()
        with Stream(url, "/api/runs/events", number) as again:
            assert [(row["run"], row["state"]) for row in again.next("rows", "all")[1]] == [("live", "stopped")]
        with Stream(url, "/api/runs/events", "another-7") as again:
            assert len(again.next("all")[1]) == 2


def test_a_client_that_comes_back_misses_nothing(tmp_path):
    path, seen = "/api/runs/live/events", {}
    with Training(tmp_path / "live") as training, served(tmp_path) as url:
        made = training.train(3)
        with Stream(url, path) as stream:
            _, whole, last = stream.next("whole")
            seen |= dict(whole["losses"])
            made |= training.train(2)
            while len(seen) < 5:
                _, more, last = stream.next("more")
                seen |= dict(more["losses"])
        made |= training.train(4)
        training.run.record(Note("while nobody looked"))
        with Stream(url, path, last) as stream:
            _, more, last = stream.next("more", "whole")
            seen |= dict(more["losses"])
            assert [line.split(maxsplit=3)[3] for line in more["lines"]] == ["text=while nobody looked"]

        assert "plan" in whole and "plan" not in more
        assert seen == made and len(seen) == 9


def test_a_client_of_a_server_that_was_started_again_goes_on(tmp_path):
    with Training(tmp_path / "live") as training:
        training.train(3)
        with served(tmp_path) as url, Stream(url, "/api/runs/live/events") as stream:
            last = stream.next("whole")[2]
        made = training.train(2)
        with served(tmp_path) as url, Stream(url, "/api/runs/live/events", last) as stream:
            _, more, _ = stream.next("more", "whole")

    assert dict(more["losses"]) == made


@pytest.mark.parametrize("last", ["999999999", "7", "x", "-1"])
def test_an_id_that_means_nothing_brings_everything(url, last):
    with Stream(url, "/api/runs/done/events", last) as stream:
        assert len(stream.next("whole", "more")[1]["losses"]) == 60


def test_what_changes_is_sent_with_the_run(url):
    with Stream(url, "/api/runs/done/events?lang=ja") as stream:
        _, whole, _ = stream.next("whole")
        _, now, number = stream.next("now")

    assert number is None  # the browser keeps the id of the events
    assert [one["node"] for one in now["machines"]] == ["node-0", "node-1"]
    assert all(0 < one["busy"] <= 1 for one in now["machines"])
    assert now["facts"][0][0] == "トークン/秒" and now["row"]["state"] == "finished"
    assert any(key == "method.type" and value == "lora" for key, value, _ in whole["plan"]["settings"])
    assert whole["held_out"][0] == [0, 3.2] and whole["held_out"][-1] == [60, 1.1]


def test_logs_of_workers_are_sent_from_their_end_on_and_masked(tmp_path):
    with Training(tmp_path / "live") as training, served(tmp_path) as url:
        training.run.logs.mkdir(exist_ok=True)
        file = training.run.logs / "worker-0.log"
        file.write_text("x" * 50_000 + "\nfrom https://me:secret@host/data\n")
        with Stream(url, "/api/runs/live/events") as stream:
            _, first, _ = stream.next("log")
            with file.open("a") as log:
                log.write("step 2\n")
            _, second, _ = stream.next("log")

    assert first == {"file": "worker-0.log", "text": "from https://***@host/data\n", "is_first": True}
    assert second == {"file": "worker-0.log", "text": "step 2\n", "is_first": False}


def test_a_damaged_run_is_said_to_be_and_does_not_end_the_stream(tmp_path):
    run = make_run(tmp_path / "run", 8)
    (run.path / "plan.json").write_text("{")
    with served(tmp_path) as url:
        (row,) = json.loads(get(url, "/api/runs")[2])["runs"]
        with Stream(url, "/api/runs/run/events") as stream:
            _, now, _ = stream.next("now")

    assert row["state"] == now["row"]["state"] == "damaged" and "plan.json" in row["damage"]


@pytest.mark.slow
def test_a_report_is_made_by_another_process_and_runs_no_script(url, runs):
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}

    status, headers, page = get(url, "/report/done?lang=ja")

    assert status == 200 and '<html lang="ja">' in page and "<svg" in page
    assert "script-src" not in headers["content-security-policy"]
    assert before == {path: path.stat().st_mtime_ns for path in runs.rglob("*")}


@pytest.mark.slow
def test_a_cluster_that_does_not_answer_is_named(runs):
    with served(runs, cluster="127.0.0.1:1") as url:
        found = json.loads(get(url, "/api/nodes")[2])

    assert found["cluster"] == "127.0.0.1:1" and "orchestrator head" in found["error"]
