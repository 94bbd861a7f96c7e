"""Jobs through an API server: a double on loopback whose pods are Ray processes of this machine, or the real cluster.

`make test-k8s KUBECONFIG=FILE` runs what is marked `either` on that cluster: it needs KubeRay, the image
orchestrator:cpu on its nodes and the volume claim `runs` (k8s/README.md).
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator.rundir import RunFolder
from tests.conftest import rows, write_jsonl
from tests.kube_api import KubeApi, Operator

pytestmark = [pytest.mark.k8s, pytest.mark.timeout(580)]
ROOT = Path(__file__).resolve().parents[2]
REAL = os.environ.get("KUBECONFIG")

JOB = """\
name: sent
model: {{model_name_or_path: {model}, dtype: float32}}
data: {{train: train.jsonl, eval: eval.jsonl, max_length: 64}}
method: {{lora_r: 4}}
train: {{global_batch_size: 8, max_steps: {steps}, learning_rate: 3e-3}}
checkpoint: {{save_steps: 20}}
eval: {{max_new_tokens: 8, eval_steps: 60}}
cluster: {{storage: {storage}, shared_paths: [{model}]}}
kubernetes: {{claim: runs, keep_s: 5}}
tracking: {{report_to: []}}
"""


@pytest.fixture(scope="module")
def place(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("k8s")
    (folder / "volume").mkdir()
    write_jsonl(folder / "train.jsonl", rows(40))
    write_jsonl(folder / "eval.jsonl", rows(8, start=100))
    for name, steps in (("job", 30), ("long", 1500)):
        text = JOB.format(model=model_folder, steps=steps, storage=folder / "volume")
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def api(place):
    node = {
        "metadata": {"name": "node-1", "labels": {"kubernetes.io/arch": "amd64"}},
        "spec": {},
        "status": {"allocatable": {"cpu": "2", "memory": "8Gi", "pods": "110"}},
    }
    api = KubeApi(place, [node])
    operator = Operator(api, missing_images=("nowhere/none:1",))
    yield api
    operator.close()
    api.close()


def command(place, api, *arguments):
    return {
        "args": [sys.executable, "-m", "orchestrator", *map(str, arguments)],
        "cwd": place,
        "env": {**os.environ, "KUBECONFIG": str(api.kubeconfig()), "PYTHONPATH": str(ROOT)},
        "text": True,
    }


def verb(place, api, *arguments, code=0):
    done = subprocess.run(**command(place, api, *arguments), capture_output=True, timeout=500)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def newest(place, known=()):
    (run,) = [run for run in RunFolder.all(place / "runs") if run.run_id not in known]
    return run


def wait_for(condition, seconds=120):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until
        time.sleep(0.5)
    return found


def nothing_left(api):
    return not any(api.named(plural) for plural in ("rayjobs", "rayclusters", "configmaps", "pods"))


def test_a_job_goes_there_and_its_adapter_comes_back(place, api):
    said = verb(place, api, "submit", "job.yaml", "--cluster", "kuberay")

    run = newest(place)
    assert run.state() == "finished", said
    assert (run.exported() / "adapter_model.safetensors").is_file()
    assert run.read_json("result.json")["steps"] == 30
    assert "step 30/30" in said and "fetched" in said
    wait_for(lambda: nothing_left(api), 20)
    assert "finished" in verb(place, api, "status", run.run_id)
    assert "step 30/30" in verb(place, api, "logs", run.run_id)
