"""A chat with servers that are none, break off or serve nothing, and messages that look like commands."""

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from orchestrator.errors import ClusterError, JobError
from orchestrator.serving.terminal import ApiClient, ChatSession, answer_messages, run_chat

MODELS = json.dumps({"data": [{"id": "tuned"}]})
ANSWER = json.dumps({"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}]})


@pytest.fixture
def serve():
    """A server that answers models and chats with these bodies; a length beyond a body's breaks it off."""
    servers = []

    def start(models=MODELS, chat=ANSWER, length=None):
        class Handler(BaseHTTPRequestHandler):
            def answer(self, body):
                self.send_response(200)
                self.send_header("Content-Length", str(length or len(body.encode())))
                self.end_headers()
                self.wfile.write(body.encode())

            def do_GET(self):
                self.answer(models)

            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                self.answer(chat)

            def log_message(self, *_):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return ApiClient(f"http://127.0.0.1:{server.server_port}")

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("body", ["<html>", "[]", "{}", '{"data": 3}', '{"data": [{"name": "x"}]}'])
def test_another_program_s_port_is_said_to_be_one(serve, body):
    with pytest.raises(ClusterError, match="answers, but not as the OpenAI API does"):
        serve(models=body).models()


def test_a_server_without_models_is_said_to_have_none(serve):
    with pytest.raises(ClusterError, match="serves no model"):
        serve(models='{"data": []}').models()


@pytest.mark.parametrize("chat", ["{", '{"choices": []}', '{"choices": [{"message": "x"}]}', "[1]"])
def test_an_answer_in_another_form_is_an_error_and_leaves_no_turn(serve, chat):
    session = ChatSession(serve(chat=chat), ["tuned"], "tuned", "tuned", lambda text: None)

    with pytest.raises(ClusterError, match="answers, but not as the OpenAI API does"):
        session.reply("hello")
    assert session.turns == []


def test_an_answer_that_breaks_off_is_said_and_the_chat_continues(serve):
    chunk = 'data: {"choices": [{"delta": {"content": "half"}}]}\n\n'
    shown = []
    session = ChatSession(serve(chat=chunk, length=10_000), ["tuned"], "tuned", "tuned", shown.append)

    assert session.take("hello")

    assert "half" in "".join(shown) and "broke off its answer" in "".join(shown) and session.turns == []
    with pytest.raises(ClusterError, match="broke off its answer"):
        session.reply("hello")


def test_a_stopped_answer_leaves_no_turn():
    class Stopped:
        def stream(self, *_):
            yield "half"
            raise KeyboardInterrupt

    shown = []
    session = ChatSession(Stopped(), ["tuned"], "tuned", "tuned", shown.append)

    assert session.take("question")

    assert session.turns == [] and "(stopped)" in "".join(shown)


def test_each_line_of_standard_input_has_an_object_also_a_path_and_a_misspelt_command(serve, monkeypatch):
    lines = ["hello", "/etc/hosts は何ですか", "/clera", "/clear", "bye"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    session, given = ChatSession(serve(), ["tuned"], "tuned", "tuned", lambda text: None), []

    failed = answer_messages(session, given.append)

    assert [one["message"] for one in given] == ["hello", "/etc/hosts は何ですか", "/clera", "bye"]
    assert failed == 1 and given[2]["error"] == "unknown command /clera"
    assert [one.get("answer") for one in given] == ["yes", "yes", None, "yes"] and len(session.turns) == 2


def test_input_in_another_encoding_says_so(serve, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO("こんにちは\n".encode("cp932")), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", stdin)
    session = ChatSession(serve(), ["tuned"], "tuned", "tuned", lambda text: None)

    with pytest.raises(JobError, match="standard input is not UTF-8"):
        answer_messages(session, print)
    with pytest.raises(JobError, match="standard input is not UTF-8"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\x83\n"), encoding="utf-8"))
        run_chat(session)
