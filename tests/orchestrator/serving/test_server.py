"""A server as a user starts it: its answers, what it refuses, and that it outlives its engine and its clients."""

import asyncio
import http.client
import io
import json
import logging
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections import Counter
from types import SimpleNamespace

import psutil
import pytest

from clusters.safe.reading import printable_lines
from orchestrator.serving.catalog import Catalog
from orchestrator.serving.door import MOST_BYTES
from orchestrator.serving.server import Address, bind, serving
from orchestrator.serving.terminal import ApiClient, ChatSession
from strategies.adapter_bank.store import Bank
from tests.cli import called
from tests.orchestrator.serving.conftest import add_to, write_adapter
from tests.orchestrator.serving.test_openai_api import malformed
from tests.processes import PATIENCE_S, ROOT, end, start, wait_for

PATHS = ("/v1/chat/completions", "/v1/completions")
HELLO = [{"role": "user", "content": "the cat sees a dog"}]


class Server:
    """A running server."""

    def __init__(self, process, url, key=None):
        self.process, self.url, self.key = process, url, key
        self.host, _, port = url.removeprefix("http://").partition(":")
        self.port = int(port)

    def call(self, method, path, body=None, **headers):
        """Status, headers and text of an answer."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=600)
        sent = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        known = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        connection.request(method, path, sent, known | headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return SimpleNamespace(status=answer.status, headers=answer.headers, text=text)

    def json(self, method, path, body=None):
        answer = self.call(method, path, body)
        return answer.status, json.loads(answer.text)

    def chat(self, model, **options):
        body = {"model": model, "messages": HELLO, "max_tokens": 8, **options}
        return self.call("POST", "/v1/chat/completions", body)

    def text(self, model, **options):
        answer = self.chat(model, **options)
        assert answer.status == 200, answer.text
        return json.loads(answer.text)["choices"][0]["message"]["content"]

    def metrics(self):
        lines = self.call("GET", "/metrics").text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    def engine(self):
        """The process that computes."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        return next((one for one in found if "orchestrator.serving.engines.host" in one.cmdline()), None)


def served(folder, *arguments, key=None):
    printed = folder / "served.json"
    environment = {"ORCHESTRATOR_API_KEY": key} if key else {}
    process = start("serve", *arguments, "--port", 0, "--json", cwd=folder, output=printed, **environment)
    text = wait_for(lambda: re.search(r'"url": "(.*?)"', printed.read_text()), process)
    return Server(process, text[1], key)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, adapters, model_folder):
    made = tmp_path_factory.mktemp("served")
    bank = Bank(made / "bank", create=True)
    for name in ("plain", "scaled"):
        add_to(bank, model_folder, adapters[name], name)
    return made


@pytest.fixture(scope="module")
def server(folder):
    """A bank, served whole."""
    found = served(folder, "--bank", "--bank-folder", "bank", "--max-adapters", 2)
    yield found
    end(found.process)


def events(text):
    return [line.removeprefix("data: ") for line in text.split("\n\n") if line]


def test_models_are_listed_and_unknown_ones_are_not_found(server):
    status, listed = server.json("GET", "/v1/models")
    _, one = server.json("GET", "/v1/models/plain")
    missing, body = server.json("GET", "/v1/models/other")

    assert status == 200 and [model["id"] for model in listed["data"]] == ["base", "plain", "scaled"]
    assert one["object"] == "model" and one["id"] == "plain"
    assert missing == 404 and body["error"]["code"] == "model_not_found"


def test_a_stream_is_the_answer_in_parts(server):
    whole = json.loads(server.chat("plain", logprobs=True).text)

    answer = server.chat("plain", stream=True, stream_options={"include_usage": True})

    *chunks, last = events(answer.text)
    parsed = [json.loads(chunk) for chunk in chunks]
    said = "".join(choice["delta"].get("content") or "" for chunk in parsed for choice in chunk["choices"])
    assert answer.headers["content-type"].startswith("text/event-stream") and last == "[DONE]"
    assert said == whole["choices"][0]["message"]["content"]
    assert parsed[-1]["usage"] == whole["usage"]
    assert whole["usage"]["total_tokens"] == whole["usage"]["prompt_tokens"] + whole["usage"]["completion_tokens"]
    assert len(whole["choices"][0]["logprobs"]["content"]) >= 1


def test_models_answer_differently_and_completions_too(server):
    assert len({server.text(model) for model in ("base", "plain", "scaled")}) == 3

    status, body = server.json("POST", "/v1/completions", {"model": "plain", "prompt": "the cat", "max_tokens": 4})

    assert status == 200 and body["object"] == "text_completion" and body["usage"]["completion_tokens"] <= 4


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"", 400),
        (b"[1]", 400),
        (b"\xff", 400),
        (b'{"model": "plain"}', 400),
        (b'{"model": "nobody", "messages": [{"role": "user", "content": "x"}]}', 404),
        (b'{"model": "plain", "n": 3, "messages": [{"role": "user", "content": "x"}]}', 400),
        (b"x" * (MOST_BYTES + 1), 413),
    ],
    ids=["cut", "empty", "list", "not utf-8", "no messages", "unknown model", "n", "large"],
)
def test_a_wrong_request_is_refused_in_the_form_of_the_api(server, body, status):
    answer = server.call("POST", "/v1/chat/completions", body)

    assert answer.status == status
    assert set(json.loads(answer.text)["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in answer.text


def test_a_thousand_malformed_requests_are_answered_in_the_form_of_the_api(server):
    """Whole bodies with wrong fields, and bodies that are cut or have a byte changed."""
    draw, statuses = random.Random(2), Counter()
    connection = http.client.HTTPConnection(server.host, server.port, timeout=600)
    for _ in range(1000):
        body = json.dumps({"max_tokens": 1} | malformed(draw) | {"model": "nobody"}).encode()
        if draw.random() < 0.5:
            place = draw.randrange(len(body))
            body = (
                body[:place] if draw.random() < 0.5 else body[:place] + bytes([draw.randrange(256)]) + body[place + 1 :]
            )
        connection.request("POST", draw.choice(PATHS), body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read().decode()
        statuses[answer.status] += 1
        assert set(json.loads(text)["error"]) == {"message", "type", "param", "code"}
        assert "Traceback" not in text
    connection.close()

    assert set(statuses) <= {400, 404} and statuses[400] > 700 and statuses[404] > 20, statuses
    assert server.json("GET", "/health")[0] == 200 and server.text("plain")


def test_other_paths_and_methods_are_errors_too(server):
    assert server.json("GET", "/v1/nothing")[0] == 404
    status, body = server.json("GET", "/v1/chat/completions")
    assert status == 405 and body["error"]["type"] == "invalid_request_error"


def test_a_browser_reads_errors_in_its_language(server):
    shown = {
        name: json.loads(server.call("POST", "/v1/completions", b"[]", **{"Accept-Language": name}).text)["error"]
        for name in ("ja,en-US;q=0.9", "en-US,ja;q=0.5", "")
    }

    assert shown["ja,en-US;q=0.9"]["message"] == "本文が JSON のオブジェクトではありません"
    assert (
        shown["en-US,ja;q=0.5"] == shown[""] == shown["ja,en-US;q=0.9"] | {"message": "the body is not a JSON object"}
    )


def test_pages_of_other_sites_are_refused(server):
    body = json.dumps({"model": "base", "messages": HELLO}).encode()

    assert server.call("POST", "/v1/chat/completions", body, Origin="https://example.org").status == 403
    assert server.call("GET", "/v1/models", Host="example.org").status == 403
    assert server.call("GET", "/v1/models", Origin=server.url).status == 200


def test_the_chat_page_needs_nothing_from_elsewhere(server):
    answer = server.call("GET", "/")

    assert answer.status == 200 and answer.headers["content-type"].startswith("text/html")
    assert not re.findall(r"""(?:src|href)=["'](?!data:)|https?://|@import""", answer.text)
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "チャット" in answer.text


def test_metrics_count_requests_tokens_and_adapters(server):
    before = server.metrics()
    answer = json.loads(server.chat("plain").text)
    server.chat("nobody")

    name = 'orchestrator_completion_tokens_total{model="plain"}'
    after = server.metrics()
    assert after[name] - before.get(name, 0) == answer["usage"]["completion_tokens"]
    request = 'orchestrator_requests_total{model="plain",path="/v1/chat/completions",status="200"}'
    assert after[request] - before.get(request, 0) == 1
    assert any(key.startswith("orchestrator_first_token_seconds_bucket") for key in after)
    wait_for(lambda: any('count="adapter_loads"' in key and value for key, value in server.metrics().items()))


def test_requests_that_come_together_are_computed_together(server):
    texts = {}

    def ask(number):
        texts[number] = server.text(("base", "plain", "scaled")[number % 3], max_tokens=40)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(texts) == 9
    assert all(texts[number] == texts[number % 3] for number in texts)
    assert texts[1] == server.text("plain", max_tokens=40)


def test_a_client_that_goes_away_frees_its_row(server):
    body = json.dumps({"model": "base", "messages": HELLO, "stream": True, "temperature": 2, "max_tokens": 200})
    connection = http.client.HTTPConnection(server.host, server.port, timeout=600)
    connection.request("POST", "/v1/chat/completions", body)
    connection.getresponse().read(20)
    connection.close()

    def rows():
        return [value for name, value in server.metrics().items() if 'count="rows"' in name]

    wait_for(lambda: rows() == [0.0])
    assert server.text("base")


def test_a_client_that_sends_slowly_stops_nobody(server):
    with socket.create_connection((server.host, server.port)) as slow:
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")

        assert server.text("base")


def test_an_adapter_that_comes_into_the_bank_is_served_soon_and_no_longer_when_it_goes(server, folder, model_folder):
    bank = Bank(folder / "bank")
    card = add_to(bank, model_folder, write_adapter(model_folder, folder / "third", 33), "third")
    wait_for(lambda: server.json("GET", "/v1/models/third")[0] == 200)
    text = server.text("third")

    bank.remove(card)

    wait_for(lambda: server.json("GET", "/v1/models/third")[0] == 404)
    assert text and server.chat("third").status == 404


def test_an_engine_that_is_killed_is_started_again_and_only_what_it_computed_is_lost(server):
    """It is stopped for the moment of a second request, which it so has not begun, and then killed."""
    old, answers = server.engine(), {}
    body = {"model": "base", "messages": HELLO, "stream": True, "temperature": 2, "max_tokens": 230}
    connection = http.client.HTTPConnection(server.host, server.port, timeout=600)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    stream = connection.getresponse()
    first = stream.readline()
    old.suspend()
    waiting = threading.Thread(target=lambda: answers.update(waiting=server.chat("plain")))
    waiting.start()
    wait_for(lambda: server.metrics())
    old.kill()
    rest = stream.read().decode()
    connection.close()
    waiting.join()

    assert first.startswith(b"data: ")
    ended = '"finish_reason": "' in rest  # it was faster than the kill, or drew the end of text
    assert "the engine's process ended (SIGKILL" in rest or ended
    assert answers["waiting"].status == 200, answers["waiting"].text
    assert server.engine().pid != old.pid
    assert any("engine_restarts" in name and value == 1 for name, value in server.metrics().items())
    assert server.json("GET", "/health") == (200, {"status": "ok", "models": 3})


def test_a_chat_in_the_terminal_switches_models_and_keeps_its_turns(server):
    shown = []
    client = ApiClient(server.url)
    session = ChatSession(client, client.models(), "plain", "plain", shown.append, most=8)

    goes_on = [session.take(text) for text in ("", "hello cat", "/base", "hello dog", "/tuned", "/model", "/quit")]

    assert goes_on == [True] * 6 + [False]
    assert [turn["role"] for turn in session.turns] == ["user", "assistant"] * 2, shown
    assert session.turns[1]["content"] in "".join(shown)
    assert "base answers now" in "".join(shown) and "* plain" in "".join(shown)


def test_a_chat_reads_a_pipe(server, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello cat\n/quit\nnever\n"))

    done = called("chat", "scaled", "--url", server.url, "--max-tokens", 4, cwd=tmp_path, check=0)

    (answer,) = [
        json.loads(server.chat("scaled", messages=[{"role": "user", "content": "hello cat"}], max_tokens=4).text)
    ]
    said = answer["choices"][0]["message"]["content"]
    assert done.stdout.strip().startswith(said.strip()[:2])


def test_a_message_gets_one_answer(server, tmp_path):
    options = ("--url", server.url, "--max-tokens", 4, "--message", "hello cat")

    plain = called("chat", "scaled", *options, cwd=tmp_path, check=0)
    done = called("chat", "scaled", *options, "--json", cwd=tmp_path, check=0)

    body = json.loads(server.chat("scaled", messages=[{"role": "user", "content": "hello cat"}], max_tokens=4).text)
    wanted = {"model": "scaled", "message": "hello cat", "usage": body["usage"]}
    wanted |= {"answer": body["choices"][0]["message"]["content"], "finish_reason": body["choices"][0]["finish_reason"]}
    assert json.loads(done.stdout) == wanted and done.stdout.count("\n") == 1
    assert "".join(plain.stdout.split()) == "".join(printable_lines(wanted["answer"]).split())


def test_a_chat_in_json_answers_line_by_line(server, tmp_path, monkeypatch):
    typed = "hello cat\n\n/base\nhello\\\ndog\n/clear\n" + "x " * 300 + "\nhello\n/quit\nnever\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))

    done = called("chat", "scaled", "--url", server.url, "--max-tokens", 4, "--json", cwd=tmp_path)

    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["model"], line["message"][:9]) for line in lines] == [
        ("scaled", "hello cat"), ("base", "hello\ndog"), ("base", "x x x x x"), ("base", "hello")
    ]  # fmt: skip
    assert ["error" in line for line in lines] == [False, False, True, False]
    assert lines[1]["usage"]["prompt_tokens"] > lines[3]["usage"]["prompt_tokens"], "the conversation was not kept"
    assert "context" in lines[2]["error"] and "base answers now" in done.stderr
    assert done.returncode == 2 and "not answered: 1 of the messages" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"), [(("--message", " "), "--message: it is empty"), (("--message", "x"), "no such run")]
)
def test_a_message_that_cannot_be_sent_is_said(arguments, message, tmp_path):
    done = called("chat", "nothing", *arguments, "--json", cwd=tmp_path)

    assert done.returncode == 2 and message in json.loads(done.stdout)["error"]


def test_a_chat_starts_a_server_of_its_own_and_ends_it(adapters, tmp_path):
    command = [sys.executable, "-m", "orchestrator", "chat", str(adapters["plain"]), "--max-tokens", "4"]
    typed, mark = "hello cat\n/model\n/base\nhello dog\n", uuid.uuid4().hex

    done = subprocess.run(
        command, input=typed, capture_output=True, text=True, cwd=tmp_path, timeout=PATIENCE_S,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MARK": mark},
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert "* plain" in done.stdout and "  base" in done.stdout and "base answers now" in done.stdout
    assert not [one for one in psutil.process_iter(["environ"]) if (one.info["environ"] or {}).get("MARK") == mark]


def test_a_server_with_a_key_answers_nobody_without_it(adapters, tmp_path):
    server = served(tmp_path, adapters["plain"], "--host", "0.0.0.0", key="a secret")
    stranger = Server(server.process, server.url)

    status, body = stranger.json("GET", "/v1/models")

    assert status == 401 and body["error"]["code"] == "invalid_api_key"
    assert stranger.call("GET", "/metrics").status == 401
    assert stranger.call("GET", "/").status == stranger.call("GET", "/health").status == 200
    assert server.json("GET", "/v1/models")[0] == 200
    end(server.process)
    assert "a secret" not in (tmp_path / "served.json").read_text()


def test_a_token_does_not_wait_for_the_acknowledgement_of_the_one_before():
    """Nagle's algorithm is off on every connection: with it streams came in bursts of 40 ms."""

    async def is_off():
        found: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()
        listening = bind(Address(port=0))
        async with await asyncio.start_server(lambda _, writer: found.put_nowait(writer), sock=listening) as server:
            _, client = await asyncio.open_connection(*server.sockets[0].getsockname())
            accepted = await found.get()
            flag = accepted.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            for one in (client, accepted):
                one.close()
            return flag

    assert asyncio.run(is_off())


def test_it_ends_with_its_engine_when_it_is_asked_to(adapters, tmp_path):
    server = served(tmp_path, adapters["plain"])
    engine = server.engine()

    server.process.send_signal(signal.SIGINT)

    assert server.process.wait(timeout=600) == 0
    engine.wait(timeout=600)
    assert not engine.is_running()


def test_an_engine_ends_with_a_server_that_is_killed(adapters, tmp_path):
    server = served(tmp_path, adapters["plain"])
    engine = server.engine()

    os.kill(server.process.pid, signal.SIGKILL)

    engine.wait(timeout=600)
    assert not engine.is_running()


def test_a_server_in_this_process_leaves_its_logging_as_it_is():
    closed = []

    class Handler(logging.StreamHandler):
        def close(self):
            closed.append(self)
            super().close()

    handler = Handler()
    catalog = Catalog(None, print)

    with serving(catalog, lambda base: pytest.fail("there is no model")):
        pass

    assert not closed and handler.stream is sys.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name a run"),
        (("nothing",), "no such run"),
        (("--bank", "--bank-folder", "nowhere"), "holds no bank"),
        (("x", "--host", "0.0.0.0"), "needs a key"),
        (("x", "--dtype", "int3"), "one of float32"),
        (("x", "--api-key-file", "nothing"), "does not exist"),
    ],
)
def test_what_cannot_be_served_is_said(arguments, message, tmp_path):
    done = called("serve", *arguments, cwd=tmp_path)

    assert done.returncode == 2 and message in done.output, done.output


def test_a_port_in_use_is_said(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = called("serve", "x", "--port", taken.getsockname()[1], cwd=tmp_path)

    assert done.returncode == 2 and "another program listens there" in done.output
