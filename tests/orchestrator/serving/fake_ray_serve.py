"""A double of a Ray cluster at its two HTTP doors: the dashboard's REST API of Serve, and what Serve answers.

What comes in and goes out is checked by Ray's own schemas (ray.serve.schema), and applications change as the
controller changes them: those that a PUT does not name are deleted, unless a program deployed them.  An application
that is asked answers with the model's name and the question; its adapters are folders on this disk, where an object
store would be.
"""

import json
import threading
import time
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("grpc_reflection", reason="Ray's schemas of Serve need grpcio-reflection, an extra of `dev`")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray 2.60 declares fields in a way that pydantic 2.14 deprecates
    from ray.serve.schema import ApplicationDetails, ServeDeploySchema, ServeInstanceDetails

NODES = [
    {"node_id": "a", "state": "ALIVE", "is_head_node": True, "resources_total": {"CPU": 8.0}},
    {"node_id": "b", "state": "ALIVE", "is_head_node": False, "resources_total": {"CPU": 8.0, "GPU": 2.0}},
    {"node_id": "c", "state": "DEAD", "is_head_node": False, "resources_total": {"GPU": 8.0}},
]


class FakeApplication:
    """What the controller knows of one."""

    def __init__(self, config, source="declarative"):
        self.config, self.source = config, source
        self.state, self.message, self.part_message = "DEPLOYING", "", ""
        self.looks_left = 2

    def details(self, name):
        """As Serve's controller fills them; a look at an application brings it on."""
        is_up = self.state == "RUNNING"
        part = {
            "name": "LLMServer:base",
            "status": {"RUNNING": "HEALTHY", "DEPLOYING": "UPDATING"}.get(self.state, self.state),
            "status_trigger": "UNSPECIFIED",
            "message": self.part_message,
            "deployment_config": {"name": "LLMServer:base"},
            "target_num_replicas": 1,
            "required_resources": {"CPU": 1},
            "replicas": [{"replica_id": "r", "state": "RUNNING" if is_up else "STARTING", "start_time_s": 1.0}],
        }
        has_parts = self.state in ("RUNNING", "DEPLOYING", "UNHEALTHY") or self.part_message
        return ApplicationDetails.model_validate(
            {
                "name": name,
                "route_prefix": self.config["route_prefix"] if self.config else f"/{name}",
                "docs_path": None,
                "status": self.state,
                "message": self.message,
                "last_deployed_time_s": 1.0,
                "source": self.source,
                "deployments": {"LLMServer:base": part} if has_parts else {},
                "external_scaler_enabled": False,
                **({"deployed_app_config": self.config} if self.config and self.state != "DELETING" else {}),
            }
        )


class FakeCluster:
    """Both doors, each a server in threads of this process."""

    def __init__(self, adapters: Path, token=None):
        self.adapters, self.token, self.nodes = adapters, token, NODES
        self.applications, self.puts = {}, []
        self.fails_with = None  # (message of the application, message of its deployment)
        self.target_capacity, self.has_serve = None, True
        self.lock = threading.Lock()
        self.asked, self.left = [], threading.Event()
        self.dashboard, self.proxy = self._serve(Dashboard), self._serve(Proxy)

    def _serve(self, handler):
        server = ThreadingHTTPServer(("127.0.0.1", 0), type(handler.__name__, (handler,), {"cluster": self}))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    @property
    def address(self):
        return f"http://127.0.0.1:{self.dashboard.server_port}"

    def stop(self):
        for server in (self.dashboard, self.proxy):
            server.shutdown()
            server.server_close()

    def details(self):
        with self.lock:
            for name, one in list(self.applications.items()):
                one.looks_left -= 1
                if one.looks_left == 0 and one.state == "DELETING":
                    del self.applications[name]
                elif one.looks_left == 0 and one.state == "DEPLOYING":
                    one.state = "DEPLOY_FAILED" if self.fails_with else "RUNNING"
                    one.message, one.part_message = self.fails_with or ("", "")
            return ServeInstanceDetails(
                target_capacity=self.target_capacity,
                http_options={"host": "0.0.0.0", "port": self.proxy.server_port},
                proxies={"a": {"node_id": "a", "node_ip": "127.0.0.1", "status": "HEALTHY"}},
                applications={name: one.details(name) for name, one in self.applications.items()},
            )._get_user_facing_json_serializable_dict(exclude_unset=True)

    def apply(self, body):
        config = ServeDeploySchema.model_validate(body)
        with self.lock:
            self.puts.append(body)
            self.target_capacity = config.target_capacity
            named = {one.name: one.model_dump(exclude_unset=True) for one in config.applications}
            for name, one in self.applications.items():
                if one.source == "declarative" and name not in named and one.state != "DELETING":
                    one.state, one.looks_left = "DELETING", 2
            for name, one in named.items():
                known = self.applications.get(name)
                if known is None or known.config != one:
                    self.applications[name] = FakeApplication(one)


class Handler(BaseHTTPRequestHandler):
    cluster: FakeCluster

    def answer(self, status, body):
        text = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def body(self):
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

    def log_message(self, *_):
        pass


class Dashboard(Handler):
    def is_let_in(self):
        shown = self.headers.get("Authorization")
        if self.cluster.token is None:
            assert shown is None, "a token was shown to a cluster that asks for none"
        elif shown is None:
            self.answer(401, "Unauthorized: Missing authentication token")
        elif shown != f"Bearer {self.cluster.token}":
            self.answer(403, "Forbidden: Invalid authentication token")
        return self.cluster.token is None or shown == f"Bearer {self.cluster.token}"

    def do_GET(self):
        if not self.is_let_in():
            return None
        if self.path == "/api/version":
            return self.answer(200, {"version": "4", "ray_version": "2.60.0", "ray_commit": "x", "session_name": "s"})
        if self.path.startswith("/api/v0/nodes"):
            found = {"total": len(self.cluster.nodes), "result": self.cluster.nodes}
            return self.answer(200, {"result": True, "msg": "", "data": {"result": found}})
        if self.path == "/api/serve/applications/":
            if not self.cluster.has_serve:
                return self.answer(501, 'Serve dependencies are not installed. Please run `pip install "ray[serve]"`.')
            return self.answer(200, self.cluster.details())
        return self.answer(404, "404: Not Found")

    def do_PUT(self):
        if not self.is_let_in():
            return None
        try:
            self.cluster.apply(self.body())
        except ValueError as error:
            return self.answer(400, repr(error))
        return self.answer(200, "")


class Proxy(Handler):
    def application(self):
        """The one whose prefix the path has; None where Serve knows none."""
        for name, one in self.cluster.applications.items():
            if self.path.startswith(f"/{name}/") and one.state != "DELETING":
                return one
        self.answer(404, f"Path '{self.path}' not found. Ping http://.../-/routes for available routes.")
        return None

    def do_GET(self):
        if self.application():
            self.answer(200, {"object": "list", "data": [{"id": "base"}]})

    def do_POST(self):
        body = self.body()
        if (one := self.application()) is None:
            return None
        self.cluster.asked.append(body)
        base, _, adapter = body["model"].partition(":")
        (settings,) = one.config["args"]["llm_configs"]
        assert base == settings["model_loading_config"]["model_id"]
        if adapter:
            folder = settings["lora_config"]["dynamic_lora_loading_path"].rpartition("/")[2]
            if not (self.cluster.adapters / folder / adapter / "adapter_config.json").is_file():
                return self.refuse(404, f'Unable to find LoRA adapter config file "adapter_config.json" in {adapter}')
        said = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        if said == "too long":
            return self.refuse(400, "This model's maximum context length is 2048 tokens")
        if said == "die":
            one.state, one.message = "UNHEALTHY", "The deployments ['LLMServer:base'] are UNHEALTHY."
            one.part_message = "A replica's health check failed.\nTraceback:\n  in engine\nRuntimeError: out of memory"
            return self.connection.close()
        return self.stream(body, said)

    def refuse(self, status, message):
        """As Ray's middleware wraps an error."""
        text = f"Message: {message} (Request ID: 1), Internal exception: x, original exception: {message}"
        self.answer(status, {"error": {"message": text, "code": status, "type": "Error"}})

    def stream(self, body, said):
        is_chat = "chat" in self.path
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        parts = [body["model"], ": ", said]
        try:
            for part in parts:
                self.event({"choices": [{**({"delta": {"content": part}} if is_chat else {"text": part})}]})
            while said == "for ever":
                time.sleep(0.01)
                self.event({"choices": [{"delta": {"content": "."}}]})
        except OSError:
            self.cluster.left.set()
            return
        if said == "break off":
            return
        shown = {"delta": {}} if is_chat else {"text": ""}
        self.event({"choices": [{**shown, "finish_reason": "stop"}]})
        self.event({"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": len(parts)}})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, body):
        self.wfile.write(b"data: " + json.dumps(body).encode() + b"\n\n")
