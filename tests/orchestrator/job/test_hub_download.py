"""A model fetched by the hub's own client from a server on this machine, told byte by byte.  The server is the fake."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.processes import PATIENCE_S

COMMIT = "a" * 40
FILES = {"config.json": b"{}", "model.safetensors": bytes(25_000_000), "README.md": b"not needed"}
FETCH = """
import json
from dataclasses import astuple
from orchestrator.job.hub import fetch_model
from orchestrator.progress.updates import reporting_to

heard = []
with reporting_to(heard.append):
    folder = fetch_model("me/tiny", None)
print(json.dumps([str(folder), sorted(file.name for file in folder.iterdir()), [astuple(one) for one in heard]]))
"""


class Hub(BaseHTTPRequestHandler):
    """What of the hub a download needs: the listing of a repository, and its files with their digests."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        if self.path.startswith("/api/models/"):
            sizes = [
                {"name": name, "size": len(content), "id": f"{len(content):040}"} for name, content in FILES.items()
            ]
            if "/tree/" in self.path:
                body = [{"type": "file", "path": one["name"], "size": one["size"], "oid": one["id"]} for one in sizes]
            else:
                listed = [{"rfilename": one["name"], "size": one["size"], "blobId": one["id"]} for one in sizes]
                body = {"id": "me/tiny", "sha": COMMIT, "siblings": listed}
            self.answer(json.dumps(body).encode(), {"Content-Type": "application/json"})
        else:
            name = self.path.rpartition("/")[2]
            self.answer(FILES.get(name, b""), {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT})

    def answer(self, content, headers):
        self.send_response(200)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_download_is_told_with_the_bytes_of_all_files_that_are_needed(hub, tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}

    shown = subprocess.run(
        [sys.executable, "-c", FETCH], capture_output=True, text=True, env=environment, timeout=PATIENCE_S, check=True
    )

    folder, names, heard = json.loads(shown.stdout)
    assert names == ["config.json", "model.safetensors"] and COMMIT in folder
    total = sum(len(FILES[name]) for name in names)
    assert {(phase, of, unit) for phase, _, of, unit in heard} == {("download", total, "bytes")}
    done = [done for _, done, _, _ in heard]
    assert done == sorted(done) and done[-1] == total and len(done) > 2
    assert shown.stderr == ""
