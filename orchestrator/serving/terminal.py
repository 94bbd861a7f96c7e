"""A chat in the terminal, with a server of the OpenAI API: this machine's, started for it, or another."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from clusters.safe.cache import cache_folder
from clusters.safe.reading import first_line, printable
from orchestrator.errors import ClusterError, JobError
from orchestrator.language.catalogue import tr

HELP = """\
/base /tuned     answer by the model that was not tuned, or by the tuned one
/model NAME      answer by another model; without a name: list them
/system TEXT     the system message; without a text: none
/clear           forget the conversation
/quit            end; so does Ctrl-D.  Ctrl-C stops an answer
A line that ends in a backslash goes on in the next one, and so does all between two lines of \"\"\"."""
COMMANDS = ("/base", "/tuned", "/model", "/system", "/clear", "/quit", "/exit")
_MOST_LINE = 2**20


def is_command(text: str) -> bool:
    """Whether a message begins with a word as commands are; a path or a sentence is none.

    >>> [is_command(text) for text in ("/clear", "/clera it", "/etc/hosts?", "/ and so on")]
    [True, True, False, False]
    """
    return re.fullmatch("/[a-z]+", _first_word(text)) is not None


def _first_word(text: str) -> str:
    return text.strip().partition(" ")[0]


@dataclass(frozen=True)
class ApiClient:
    """Speaks to a server of the OpenAI API."""

    url: str  # up to and without /v1
    api_key: str | None = None

    def models(self) -> list[str]:
        """At least one.  Raises JobError or ClusterError."""
        with self._answer("/v1/models") as answer:
            found = [str(model["id"]) for model in json.load(answer)["data"]]
        if not found:
            raise ClusterError(f"{self.url} serves no model")
        return found

    def stream(self, model: str, messages: list[dict[str, str]], most: int | None) -> Iterator[str]:
        """The parts of an answer of at most `most` tokens.  Raises JobError or ClusterError as the server says."""
        body = {"model": model, "messages": messages, "stream": True, "max_tokens": most}
        with self._answer("/v1/chat/completions", body) as answer:
            for line in iter(lambda: answer.readline(_MOST_LINE), b""):
                kind, _, data = line.partition(b":")
                if kind != b"data":
                    continue
                if data.strip() == b"[DONE]":
                    return
                chunk = json.loads(data)
                if "error" in chunk:
                    raise ClusterError(str(chunk["error"].get("message")))
                yield from (choice["delta"].get("content") or "" for choice in chunk["choices"])
            raise http.client.IncompleteRead(b"")  # a body of lines just ends

    def reply(self, model: str, messages: list[dict[str, str]], most: int | None) -> dict[str, Any]:
        """The whole body of an answer.  Raises JobError or ClusterError as the server says."""
        body = {"model": model, "messages": messages, "max_tokens": most}
        with self._answer("/v1/chat/completions", body) as answer:
            found = json.load(answer)
            found["choices"][0]["message"].get("content")  # in the API's form, or one of the errors below
            return found

    @contextlib.contextmanager
    def _answer(self, path: str, body: dict[str, Any] | None = None) -> Iterator[Any]:
        """The body of an answer, to be read inside the block."""
        try:
            with self._open(path, body) as answer:
                yield answer
        except (http.client.HTTPException, OSError) as error:
            what = "it is not whole" if isinstance(error, http.client.IncompleteRead) else first_line(error)
            raise ClusterError(f"{self.url} broke off its answer: {what}") from None
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ClusterError(
                f"{self.url} answers, but not as the OpenAI API does: is it another program's?"
            ) from None

    def _open(self, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            return urllib.request.urlopen(urllib.request.Request(f"{self.url}{path}", data, headers))
        except urllib.error.HTTPError as error:
            raise JobError(_message_of(error)) from None
        except (urllib.error.URLError, OSError, ValueError) as error:
            raise ClusterError(f"{self.url} does not answer: {getattr(error, 'reason', error)}") from None


@dataclass
class ChatSession:
    """One conversation, and which model answers."""

    client: ApiClient
    models: list[str]
    model: str
    tuned: str  # that /tuned returns to
    show: Callable[[str], None]  # a part of an answer, without an end of line
    system: str = ""
    most: int | None = None  # tokens of an answer
    turns: list[dict[str, str]] = field(default_factory=list)

    def take(self, text: str) -> bool:
        """A command or a message; whether the chat goes on."""
        if not text.strip():
            return True
        if not is_command(text):
            self._ask(text)
            return True
        command, _, value = text.strip().partition(" ")
        if command in ("/quit", "/exit"):
            return False
        self.show(tr(self._command(command, value.strip())) + "\n")
        return True

    def _command(self, command: str, value: str) -> str:
        if command == "/clear":
            self.turns.clear()
            return "the conversation is forgotten"
        if command == "/system":
            self.system = value
            return "system message set" if value else "no system message"
        if command in ("/base", "/tuned", "/model"):
            return self._switch({"/base": "base", "/tuned": self.tuned}.get(command, value))
        return HELP

    def _switch(self, model: str) -> str:
        if not model:
            return "\n".join(f"{'*' if one == self.model else ' '} {one}" for one in self.models)
        if model not in self.models:
            return f"{printable(model)} is not served; there are {', '.join(self.models)}"
        self.model = model
        self.tuned = self.tuned if model == "base" else model
        return f"{model} answers now"

    def reply(self, text: str) -> dict[str, Any]:
        """A message's answer with its end and its tokens; both become turns.  Raises JobError or ClusterError."""
        said, asked = self._messages(text)
        body = self.client.reply(self.model, said + asked, self.most)
        choice = body["choices"][0]
        answer = choice["message"]["content"] or ""
        self.turns = [*asked, {"role": "assistant", "content": answer}]
        found = {"model": self.model, "message": text, "answer": answer, "finish_reason": choice["finish_reason"]}
        return {**found, "usage": body.get("usage")}

    def _messages(self, text: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
        """The system message, and the conversation with a message at its end."""
        said = [{"role": "system", "content": self.system}] if self.system else []
        return said, [*self.turns, {"role": "user", "content": text}]

    def _ask(self, text: str) -> None:
        """Print the answer as it comes; one that fails or is stopped with Ctrl-C leaves no turn."""
        said, asked = self._messages(text)
        parts = []
        try:
            for part in self.client.stream(self.model, said + asked, self.most):
                parts.append(part)
                self.show(part)
        except KeyboardInterrupt:
            self.show(f"\n{tr('(stopped)')}\n")
            return
        except (JobError, ClusterError) as error:
            self.show(f"{''.join(parts) and chr(10)}{tr(str(error))}\n")
            return
        self.show("\n")
        self.turns = [*asked, {"role": "assistant", "content": "".join(parts)}]


def run_chat(session: ChatSession) -> None:
    """Read messages until the input ends."""
    for text in _read_messages(_reader(), session):
        if not session.take(text):
            return


def answer_messages(session: ChatSession, give: Callable[[dict[str, Any]], None]) -> int:
    """Read messages from standard input and give an object for each; commands work as in a chat.

    Returns how many were not answered: their objects have an `error`.
    """
    failed = 0
    for text in _read_messages(lambda prompt: input(), session):
        if is_command(text) and _first_word(text) not in COMMANDS:
            failed += 1
            give({"model": session.model, "message": text, "error": f"unknown command {_first_word(text)}"})
            continue
        if not text.strip() or is_command(text):
            if not session.take(text):
                break
            continue
        try:
            give(session.reply(text))
        except (JobError, ClusterError) as error:
            failed += 1
            give({"model": session.model, "message": text, "error": str(error)})
    return failed


def _read_messages(read: Callable[[str], str], session: ChatSession) -> Iterator[str]:
    """Messages until the input ends."""
    while True:
        try:
            text = _whole_message(read, session.model)
        except (EOFError, KeyboardInterrupt):
            return
        except UnicodeDecodeError as error:
            raise JobError(f"standard input is not UTF-8 ({error}): save the messages as UTF-8") from None
        yield text


def _whole_message(read: Callable[[str], str], model: str) -> str:
    """A message of one line, or of several."""
    line = read(f"{model}> ")
    if line.strip() == '"""':
        lines = []
        while (line := read("... ")).strip() != '"""':
            lines.append(line)
        return "\n".join(lines)
    lines = []
    while line.endswith("\\"):
        lines.append(line[:-1])
        line = read("... ")
    return "\n".join([*lines, line])


def _reader() -> Callable[[str], str]:
    """Reads a line: in a terminal with history and editing, from a pipe as it comes."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return lambda prompt: input()
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory, InMemoryHistory
    except ImportError:  # a terminal without history is a terminal
        return input
    history = InMemoryHistory()
    with contextlib.suppress(OSError):
        file = cache_folder("chat-history")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        history = FileHistory(str(file))
    return PromptSession(history=history).prompt


def _message_of(error: urllib.error.HTTPError) -> str:
    """What the server says of an error, in the API's form or not."""
    with contextlib.suppress(ValueError, KeyError, TypeError, OSError):
        return f"{error.code}: {json.loads(error.read(_MOST_LINE))['error']['message']}"
    return f"the server answers {error.code} {error.reason}"
