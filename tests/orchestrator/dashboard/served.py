"""A dashboard in a thread of this process, and a client that reads its streams."""

import asyncio
import contextlib
import http.client
import json
import shutil
import threading

from orchestrator.dashboard.server import Settings, serve
from orchestrator.runs.events import ModelReady, QualityReport, StateChange, StepReport
from orchestrator.serving.address import listen
from tests.benchmarks.reading import make_run, one_step


@contextlib.contextmanager
def served(folder, **settings):
    """The dashboard's address, with its token where it has one."""
    loop, began, found = asyncio.new_event_loop(), threading.Event(), []

    def begun(url):
        found.append(url)
        began.set()

    listening = listen("127.0.0.1", 0)
    task = loop.create_task(serve(Settings(folder, **settings), listening, begun))

    def run():
        asyncio.set_event_loop(loop)
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    began.wait(30)
    try:
        yield found[0]
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(30)


def get(url, path="/", method="GET", **headers):
    """(status, headers, body) of one request; a host header may be given."""
    connection = http.client.HTTPConnection(url.split("/")[2], timeout=60)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read().decode()
    finally:
        connection.close()


class Stream:
    """Messages of a stream one by one, as (kind, values, id)."""

    def __init__(self, url, path, last_id=None):
        self._connection = http.client.HTTPConnection(url.split("/")[2], timeout=60)
        self._connection.request("GET", path, headers={"Last-Event-ID": last_id} if last_id else {})
        self._answer = self._connection.getresponse()
        assert self._answer.status == 200

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._answer.close()
        self._connection.close()

    def next(self, *kinds):
        """The next message of some kinds; others are passed over."""
        kind, number, values = None, None, None
        while True:
            line = self._answer.readline().decode().rstrip("\n")
            name, _, value = line.partition(": ")
            if name == "event":
                kind, number = value, None
            elif name == "id":
                number = value
            elif name == "data":
                values = json.loads(value)
            elif not line and kind:
                if kind in kinds:
                    return kind, values, number
                kind = None


class Training:
    """A run that this test holds and writes."""

    def __init__(self, folder, num_workers=1):
        self.run, self.num_workers, self.step = make_run(folder, 4, num_workers), num_workers, 0
        (folder / "events.jsonl").unlink()
        self.run.take_back("result.json")
        shutil.rmtree(folder / "adapter")
        self._held = contextlib.ExitStack()

    def __enter__(self):
        self._held.enter_context(self.run.lock())
        self.run.record(StateChange("running", pid=1))
        self.run.record(ModelReady(1.0))
        self.run.record(QualityReport("before", 3.2, extra={"seconds": 2.0}))
        return self

    def __exit__(self, *_):
        self._held.close()

    def train(self, count=1):
        """Some steps; their losses by step."""
        import random

        made = {}
        for _ in range(count):
            self.step += 1
            event = one_step(self.step, 4, self.num_workers, random.Random(self.step), 0.0)
            assert isinstance(event, StepReport)
            self.run.record(event)
            made[self.step] = event.loss
        return made

    def end(self):
        self.run.record(StateChange("stopped", step=self.step))
        self._held.close()
