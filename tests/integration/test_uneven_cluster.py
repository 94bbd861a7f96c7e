"""One job over several Ray nodes, while workers and nodes are killed.

The nodes are raylets of one machine (ray.cluster_utils): enough for placement, naming and recovery.  Networks, power
cuts and hangs need machines of their own: tests/cluster.
"""

import json
import os
import signal
from pathlib import Path

import pytest

from clusters.ray.node_daemon import token_file
from orchestrator.runs.run_folder import RunFolder
from tests.conftest import rows, write_jsonl
from tests.processes import orchestrator, outcome, start, wait_for

SMALL = {"object_store_memory": 80 * 2**20, "num_gpus": 0}
JOB = """\
name: uneven
model: {{model_name_or_path: {model}, dtype: float32}}
data: {{train: train.jsonl, max_length: 64}}
method: {{lora_r: 4}}
train: {{global_batch_size: 8, max_steps: 40, learning_rate: 1e-4}}
strategy: {{shares: {shares}}}
cluster: {{address: "{address}", num_workers: 2, wait_for_nodes_s: 5}}
checkpoint: {{save_steps: 10}}
tracking: {{report_to: []}}
"""


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **SMALL})
        try:
            cluster.nodes_by_name = {name: add(cluster, name) for name in ("left", "right")}
            yield cluster
        finally:
            cluster.shutdown()


def add(cluster, name):
    return cluster.add_node(num_cpus=1, node_name=name, resources={"train_slot": 1}, **SMALL)


@pytest.fixture(scope="module")
def place(cluster, model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    write_jsonl(folder / "train.jsonl", rows(40))
    token_file(folder / "home" / ".ray" / "auth_token", make=True)  # as Ray itself leaves one; this cluster wants none
    (folder / "job.yaml").write_text(JOB.format(model=model_folder, address=cluster.address, shares="planned"))
    return folder


def submit(place, *arguments):
    return start("submit", "job.yaml", "--json", *arguments, cwd=place, HOME=str(place / "home"))


def submit_and_wait(place, step):
    """A process that trains the job and has come to a step, and the folder of its run."""
    before = {run.run_id for run in RunFolder.all(place / "runs")}
    process = submit(place)
    (run,) = wait_for(lambda: [run for run in RunFolder.all(place / "runs") if run.run_id not in before], process)
    wait_for(lambda: max(run.steps(), default=0) >= step, process)
    return process, run


def answer(process, code=0):
    done = outcome(process)
    assert done.returncode == code, done.output
    return json.loads(done.stdout), done.stderr


def search(place, *arguments):
    done = orchestrator("search", "job.yaml", "--json", *arguments, cwd=place, check=0, HOME=str(place / "home"))
    return json.loads(done.stdout)


def events(run, name):
    return [event for event in run.events()[0] if event.kind == name]


def per_step(run, key):
    return [getattr(report, key) for _, report in sorted(run.steps().items())]


@pytest.fixture(scope="module")
def undisturbed(place):
    told, _ = answer(submit(place))
    return RunFolder(Path(told["path"]))


def test_each_node_has_its_place_in_the_plan_and_the_workers_agree(undisturbed):
    (group,) = events(undisturbed, "group")
    plan = json.loads((undisturbed.path / "plan.json").read_text())

    assert {part["node"] for part in plan["nodes"]} == {"left", "right"} == {member.node for member in group.members}
    assert {member.extra["plan"] for member in group.members} == {plan["hash"]}
    assert sum(group.shares) == pytest.approx(1, abs=1e-3)
    for report in undisturbed.steps().values():
        assert sum(report.worker_tokens) == report.tokens
        assert len(report.worker_s) == 2
        assert report.step_bytes_sent > 0


@pytest.mark.slow
def test_a_killed_worker_costs_less_than_a_checkpoint_interval_and_changes_nothing(place, undisturbed):
    process, run = submit_and_wait(place, step=25)
    (group,) = events(run, "group")

    os.kill(group.members[1].extra["pid"], signal.SIGKILL)
    answer(process)

    assert per_step(run, "samples") == per_step(undisturbed, "samples")
    assert per_step(run, "loss") == per_step(undisturbed, "loss")  # bit by bit
    seen = [event.step for event in events(run, "step")]
    assert len(seen) - len(set(seen)) <= 10
    assert len(events(run, "failure")) == 1


@pytest.mark.slow
def test_a_search_runs_one_trial_on_each_machine_at_a_time(cluster, place):
    space = "{train.per_device_train_batch_size: [1, 2, 4], data.packing: [true, false]}"
    options = ("-s", f"search.space={space}", "-s", "search.trial_steps=4", "-s", "search.scheduler=none")
    told = search(place, "--trials", "4", *options)

    assert [trial["status"] for trial in told["trials"]] == ["finished"] * 4
    assert {trial["node"] for trial in told["trials"]} == {"left", "right"}
    recommended = (Path(told["path"]) / "recommended.yaml").read_text()
    assert "eval" not in recommended  # the held-out rows were lent to the search only


@pytest.mark.slow
def test_trials_of_one_layout_share_a_base_model_on_each_machine(cluster, place):
    space = "{method.lora_r: [2, 8], train.learning_rate: [1.0e-3, 1.0e-2]}"
    rows = ("train.per_device_train_batch_size=4", "train.global_batch_size=5")  # a row holds two steps, not three
    layout = ("model.dtype=float32", "data.packing=true", *rows)
    options = (*layout, f"search.space={space}", "search.trial_steps=4", "search.scheduler=none")
    told = search(place, "--trials", "4", *[part for option in options for part in ("-s", option)])

    assert [trial["status"] for trial in told["trials"]] == ["finished"] * 4
    assert {trial["time"]["runs_together"] for trial in told["trials"]} == {2}  # of the four two on each
    assert {trial["node"] for trial in told["trials"]} == {"left", "right"}


@pytest.mark.slow
def test_trials_may_keep_to_machines_that_the_job_leaves_idle(cluster, place):
    space = "{train.per_device_train_batch_size: [1, 2], data.packing: [true]}"
    options = ("search.nodes=idle", "cluster.num_workers=1", f"search.space={space}", "search.trial_steps=4")
    arguments = [part for option in options for part in ("-s", option)]
    told = search(place, "--trials", "2", *arguments)

    (trains,) = json.loads((Path(told["path"]) / "plan.json").read_text())["nodes"]
    assert {trial["node"] for trial in told["trials"]} == {"left", "right"} - {trains["node"]}


@pytest.mark.slow
def test_a_node_that_is_lost_for_good_is_planned_around(cluster, place, undisturbed):
    process, run = submit_and_wait(place, step=25)

    cluster.remove_node(cluster.nodes_by_name.pop("right"), allow_graceful=False)
    _, said = answer(process)

    replanned = events(run, "replanned")
    assert replanned[-1].nodes == ["left"] and replanned[-1].lost == ["right"], said
    assert per_step(run, "samples") == per_step(undisturbed, "samples")
    assert per_step(run, "loss") == pytest.approx(per_step(undisturbed, "loss"), rel=1e-5)
    seen = [event.step for event in events(run, "step")]
    assert len(seen) - len(set(seen)) <= 10
    cluster.nodes_by_name["right"] = add(cluster, "right")


@pytest.mark.slow
def test_a_machine_that_does_not_train_evaluates_the_base_model_meanwhile(cluster, place):
    write_jsonl(place / "eval.jsonl", rows(8, start=100))
    one = ("-s", "cluster.num_workers=1", "-s", "data.eval=eval.jsonl", "-s", "eval.eval_steps=40")
    told, said = answer(submit(place, *one))
    run = RunFolder(Path(told["path"]))

    plan = run.read_json("plan.json")
    (trains,) = [part["node"] for part in plan["nodes"]]
    (beside,) = plan["beside"]
    assert beside["does"] == "measures" and beside["node"] in {"left", "right"} - {trains}
    assert "evaluates the base model" in plan["left_out"][beside["node"]], said
    before = run.read_json("before.json")
    assert before["node"] == beside["node"]
    assert run.read_json("result.json")["before"]["eval_loss"] == before["eval_loss"] > 0
    assert [event.when for event in events(run, "quality")] == ["before", "after"]


@pytest.mark.slow
def test_lsp_offload_lets_another_node_keep_the_optimizer(place):
    here = ["--set", "cluster.num_workers=1", "--set", "train.max_steps=6"]
    here += ["--set", "method={type: experimental_lsp_offload, subspace_size: 24}"]
    runs = []
    for asked in ([], ["--set", "method.cpu_side=right"]):
        told, _ = answer(submit(place, *here, *asked))
        runs.append(RunFolder(Path(told["path"])))

    assert per_step(runs[1], "loss") == per_step(runs[0], "loss")
    told, _ = answer(submit(place, *here, "--set", "method.cpu_side=nowhere"), code=5)
    assert "nowhere is not in the cluster" in told["error"]


def test_a_model_in_stages_over_two_nodes_survives_the_loss_of_one(place, undisturbed):
    process = submit(place, "--set", "strategy.mode=pipeline")
    known = {undisturbed.run_id}
    (run,) = wait_for(lambda: [one for one in RunFolder.all(place / "runs") if one.run_id not in known], process)
    known.add(run.run_id)
    wait_for(lambda: max(run.steps(), default=0) >= 12, process)
    (group,) = events(run, "group")

    os.kill(group.members[1].extra["pid"], signal.SIGKILL)
    told, _ = answer(process)

    assert Path(told["path"]) == run.path
    stages = [part.techniques.stage for part in run.plan().nodes]
    assert [(stage.first_layer, stage.end_layer) for stage in stages] == [(0, 1), (1, 2)]
    assert len(events(run, "group")) == 2
    assert per_step(run, "loss") == pytest.approx(per_step(undisturbed, "loss"), rel=1e-5)
    assert run.plan().backend == "gloo"
