"""What comes from outside - API servers, dashboards, driver tools, remembered figures - may be anything."""

import csv
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clusters.capability import DeviceCapability, NodeCapability
from clusters.hardware import gpus
from clusters.kubernetes.messages import (
    event_trouble,
    explain_answer,
    is_ended,
    job_seen,
    object_of,
    objects_of,
    pod_troubles,
)
from clusters.probe.node import _read
from clusters.ray.connect import CannotConnect
from clusters.safe.reading import BadInput
from orchestrator.errors import ClusterError, JobError
from orchestrator.job.sections.machines import KubernetesSection
from orchestrator.remote.kube_nodes import read_nodes
from orchestrator.remote.record import Remote
from orchestrator.runs.run_folder import RunFolder

KEYS = [
    *("metadata", "name", "uid", "status", "spec", "labels", "annotations", "conditions", "type", "message", "reason"),
    *("containerStatuses", "state", "waiting", "terminated", "lastState", "image", "phase", "involvedObject", "kind"),
    *("jobDeploymentStatus", "jobStatus", "allocatable", "cpu", "memory", "taints", "key", "effect", "nvidia.com/gpu"),
    *("resourceVersion", "creationTimestamp", "unschedulable", "nvidia.com/gpu.memory", "nvidia.com/gpu.product"),
]
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 10**30), st.floats(allow_nan=False), st.text(max_size=8),
    st.sampled_from(["16", "64Gi", "1e400", "..", "9" * 30, "Failed", "False", "PodScheduled", "ErrImagePull"]),
)  # fmt: skip
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=8)
)


@settings(max_examples=100)
@given(VALUES)
def test_any_answer_of_an_api_server_is_read_or_named(value):
    body = json.dumps(value).encode()
    explain_answer(500, body.decode(), "list pods", "team", "here")
    try:
        objects_of(body, "the list of pods")
        thing = object_of(value, "the pod")
    except BadInput as error:
        assert str(error).startswith("the ")
        thing = object_of({**(value if isinstance(value, dict) else {}), "metadata": {"name": "a"}}, "the pod")

    assert isinstance(job_seen(thing).message, str) and is_ended(thing) in (True, False)
    assert all(isinstance(trouble.text, str) for trouble in [*pod_troubles(thing), event_trouble(thing)])
    with pytest.raises((ClusterError, JobError)):
        read_nodes([thing, value], KubernetesSection())


@pytest.mark.parametrize("quantity", ["", "x", "1.2.3", ".", "1Zi", "-1", "1e999", "٣", "9" * 30, "1 Gi", "1\n", "NaN"])
def test_a_quantity_that_is_none_is_the_clusters_fault(quantity):
    node = {"metadata": {"name": "a"}, "status": {"allocatable": {"cpu": quantity, "memory": "64Gi"}}}
    with pytest.raises((ClusterError, JobError)):
        read_nodes([node], KubernetesSection())


@pytest.mark.parametrize(("cpu", "cores"), [("16", 15), ("15890m", 14), ("1e1", 9), ("0.5", 1), ("2k", 1999)])
def test_a_quantity_is_read_as_kubernetes_writes_it(cpu, cores):
    node = {"metadata": {"name": "a"}, "status": {"allocatable": {"cpu": cpu, "memory": "68719476736"}}}

    assert read_nodes([node], KubernetesSection()).nodes[0].num_cores == cores


@pytest.fixture
def dashboard():
    """A server that says what a test wants: `says` maps the end of a path to (status, body)."""
    says: dict[str, tuple[int, bytes]] = {}

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            code, body = next((says[end] for end in says if self.path.endswith(end)), (404, b""))
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_PUT = do_DELETE = do_GET

        def log_message(self, *_):
            """Not into the tests' output."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield says, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


VERSION = b'{"version": "4", "ray_version": "2.60.0", "ray_commit": "x", "session_name": "s"}'
GARBAGE = [
    (200, b"<html>"), (200, b""), (200, b"[]"), (200, b"null"), (200, b"{}"), (200, b'{"status": "DANCING"}'),
    (200, b"\xff\xfe"), (200, b"[" * 100_000), (200, b'{"logs": 7}'), (200, b'{"type": "SUBMISSION", "status": 1}'),
    (500, b"boom"), (302, b""), (418, b"\x1b[2J"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "body"), GARBAGE)
def test_a_dashboard_that_answers_anything_is_named(dashboard, tmp_path, code, body):
    from clusters.job_backend import JobLost
    from clusters.ray.jobs import RayJobsClient

    says, address = dashboard
    says |= {"/api/version": (200, VERSION), "job": (code, body), "logs": (code, body), "/": (code, body)}
    client = RayJobsClient(address, tmp_path)

    for ask in (client.look, client.logs, lambda name: client.start(name, "true")):
        with pytest.raises((JobLost, CannotConnect)):
            ask("job")
    says["/api/version"] = (code, body)
    with pytest.raises(CannotConnect):
        RayJobsClient(address, tmp_path)


@pytest.mark.parametrize(
    "address",
    [
        "http://",
        "http://[",
        "http://a b:1",
        "http://\ud800",
        "http://127.0.0.1:99999",
        "http://" + "a" * 300,
        "http://é.",
    ],
)
def test_an_address_that_is_none_is_named(address, tmp_path):
    from clusters.ray.jobs import RayJobsClient

    with pytest.raises(CannotConnect, match="no Ray dashboard"):
        RayJobsClient(address, tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{}", '{"address": 1}', "{", '{"address": "a", "storage": "b", "attempts": "c"}', "[" * 9999,
     '{"address": "a", "storage": "b", "attempts": [1]}', '{"address": "a", "storage": "b", "attempts": []}', "\xff"],
)  # fmt: skip
def test_a_damaged_record_of_where_a_run_was_sent_is_named(tmp_path, text):
    (tmp_path / "remote.json").write_text(text, encoding="latin-1")

    with pytest.raises(JobError, match=r"remote\.json: "):
        Remote.of(RunFolder(tmp_path))


def test_a_record_of_where_a_run_was_sent_comes_back(tmp_path):
    remote = Remote("http://a:1", "/storage/runs", ("a-1", "a-2"), f"/storage/jobs/{tmp_path.name}", True)

    assert Remote.of(RunFolder(tmp_path)) is None
    assert Remote.of(remote.keep(RunFolder(tmp_path)) and RunFolder(tmp_path)) == remote


@pytest.mark.parametrize("folder", ["/", "/storage", "/storage/jobs", "/storage/jobs/other", "/storage/jobs/..", ""])
def test_no_other_folder_than_the_run_s_own_is_deleted_on_the_cluster(tmp_path, folder):
    Remote("kuberay", "/storage/runs", ("a-1",), folder).keep(RunFolder(tmp_path))

    with pytest.raises(JobError, match=r"remote\.json: uploads: .* is not /storage/jobs/"):
        Remote.of(RunFolder(tmp_path))


NVIDIA = "0, GPU-1, {name}, {free}, {total}, {power}, 550, {compute}"


@pytest.mark.parametrize("amount", ["nan", "inf", "-inf", "-5", "1e400", "[N/A]", "", "12 MiB", "٣x"])
def test_a_driver_that_says_no_amount_says_nothing(amount):
    row = {"name": "A\x1b[2J\nB" * 50, "memory.free": amount, "memory.total": amount, "power.limit": amount}

    found = gpus.nvidia_gpu({**row, "compute_cap": "²."})

    assert (found.memory_bytes, found.memory_total_bytes, found.power_w, found.compute_capability) == (None,) * 4
    assert found.name.isprintable() and len(found.name) < 600


@pytest.mark.parametrize(
    "answer", ["[]", "{", "[" * 9999, '{"card0": 1}', '{"card0": []}', '{"card0": {"Card series": {}}}']
)
def test_an_amd_tool_that_answers_anything_hides_its_cards_alone(monkeypatch, answer):
    answers = {"rocm-smi": answer, "nvidia-smi": "0, a\0b, " + "x" * 200_000}
    monkeypatch.setattr(gpus, "_answer", lambda tool, *arguments: (answers[tool], None))
    limit = csv.field_size_limit(2**17)  # as in a process that has read no data

    found, problems = gpus.look_at_gpus()

    csv.field_size_limit(limit)
    assert len(found) <= 1
    said = [
        "nvidia-smi's output is malformed",
        *([] if found else ["rocm-smi's output is malformed"]),
    ]
    assert [problem.split(" (")[0] for problem in problems] == said
    assert all(problem.isprintable() for problem in problems)


@pytest.mark.parametrize(
    "change",
    [{"devices": 3}, {"devices": [3]}, {"devices": []}, {"num_cores": "8"}, {"name": None},
     {"disk_write_bytes_per_s": "x"},
     {"devices": [{"kind": "cpu", "name": "a", "memory_bytes": "8"}]}, {"devices": [{"kind": "tpu", "name": "a"}]},
     {"devices": [{"kind": "cpu", "name": "a", "memory_bytes": 8, "flops_per_s": {"float32": 0}}]},
     {"devices": [{"kind": "cpu", "name": "a", "memory_bytes": 8, "flops_per_s": {"float32": -1.0}}]},
     {"devices": [{"kind": "cpu", "name": "a", "memory_bytes": 8, "memory_bytes_per_s": 0}]}],
)  # fmt: skip
def test_remembered_figures_that_are_damaged_are_measured_again(tmp_path, change):
    node = NodeCapability("box", 8, 8, (DeviceCapability("cpu", "a", 8),))
    whole = {
        "name": "box",
        "num_cores": 8,
        "memory_bytes": 8,
        "devices": [{"kind": "cpu", "name": "a", "memory_bytes": 8}],
    }
    file = tmp_path / "figures.json"
    file.write_text(json.dumps(whole))
    assert _read(file, node) is not None

    for text in (json.dumps({**whole, **change}), json.dumps(whole)[:-9], "[" * 9999, "NaN", "\0"):
        file.write_text(text)
        assert _read(file, node) is None
