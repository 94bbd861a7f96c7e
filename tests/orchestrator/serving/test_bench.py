"""A serving benchmark of a tiny run: measured over HTTP, shown, compared, in the report; and what it refuses."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from orchestrator.language.catalogue import translator
from orchestrator.report.html import html, report_of
from orchestrator.report.serving import serving_blocks
from orchestrator.runs.run_folder import RunFolder
from orchestrator.serving.bench.load import AnswerTimes, Load, LoadRequest, LoadRound, joined, latency, send
from tests.cli import called
from tests.processes import end, start_python, wait_for

FAKE = Path(__file__).with_name("fake_vllm.py")
NEW, CONCURRENCY = 6, (1, 3)


@pytest.fixture(scope="module")
def runs(finished, tmp_path_factory):
    """A folder of runs with a finished one."""
    folder = tmp_path_factory.mktemp("benches") / "runs"
    shutil.copytree(finished.path, folder / "done")
    return folder


@pytest.fixture(scope="module")
def found(runs, tmp_path_factory):
    """The result of all that the benchmark measures, with a double of vLLM on PATH."""
    programs = tmp_path_factory.mktemp("programs")
    (programs / "vllm").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKE}" "$@"\n')
    (programs / "vllm").chmod(0o755)
    path = f"{programs}:/usr/bin:/bin"
    options = ("--concurrency", "1,3", "--adapters", 2, "--new-tokens", NEW, "--models", "base,tuned", "--json")
    done = called("bench", "latest", "--serve", *options, cwd=runs.parent, check=0, PATH=path)
    return json.loads(done.stdout)


def test_a_merged_model_is_measured_and_leaves_no_copy(runs, tmp_path):
    """By the double of vLLM: an engine of ours takes seconds to start, and merged models are served as others are."""
    file = tmp_path / "found.json"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nshift 2; exec "{sys.executable}" "{FAKE}" "$@"\n')
    python.chmod(0o755)
    options = ("--engines", "vllm,llama.cpp", "--vllm-python", python, "--models", "merged", "--prompt-lengths", 20)

    called("bench", "done", "--serve", *options, "--concurrency", 2, "--output", file, cwd=runs.parent, check=0)

    found = json.loads(file.read_text())
    (row,) = found["rows"]
    assert (row["engine"], row["model"], row["requests"]) == ("vllm", "merged", 4)
    assert row["prompt_tokens"] == 20 and row["new_tokens"] == 32 and found["prompts"] == "random tokens, 20 a prompt"
    assert [(one["engine"], one["model"]) for one in found["not_measured"]] == [("llama.cpp", "merged")]
    assert not found["adapters"] and not list((runs / "done").glob(".bench*"))


@pytest.mark.slow
def test_a_merged_model_is_measured_in_the_precision_of_its_run(runs, tmp_path):
    options = ("--engines", "transformers", "--models", "merged", "--concurrency", 1, "--new-tokens", 2, "--json")

    found = json.loads(called("bench", "done", "--serve", *options, cwd=runs.parent, check=0).stdout)

    assert [(row["model"], row["weights"]) for row in found["rows"]] == [("merged", "float32")]


def test_engines_and_models_are_measured_side_by_side(found):
    rows = {(row["engine"], row["model"], row["concurrency"]): row for row in found["rows"]}

    engines, models = ("transformers", "vllm"), ("base", "adapter")
    assert set(rows) == {(engine, model, c) for engine in engines for model in models for c in CONCURRENCY}
    for row in rows.values():
        assert row["answers"] == found["repeats"] * row["requests"] and row["refused"] == 0
        assert row["new_tokens"] == NEW, "an answer ended early, or is counted wrongly"
        assert 0 < row["first_token_s"] <= row["first_token_p95_s"]
        assert row["tokens_per_s_low"] <= row["tokens_per_s"] <= row["tokens_per_s_high"]
    assert found["num_prompts"] > 1 and rows["transformers", "base", 1]["prompt_tokens"] > 1
    reasons = {one["engine"]: one["reason"] for one in found["not_measured"]}
    assert set(reasons) == {"llama.cpp"} and re.search("not installed|GGUF", reasons["llama.cpp"])


def test_several_adapters_are_measured_in_three_orders(found):
    orders = {row["order"]: row for row in found["adapters"]}

    assert set(orders) == {"one", "mixed", "grouped"}
    for order, row in orders.items():
        assert (row["num_adapters"], row["concurrency"], row["requests"]) == (1 + (order != "one"), 3, 6)
        assert row["answers"] == 18 and row["new_tokens"] == NEW


def test_only_the_result_stays_in_the_runs_folder(found, runs):
    assert json.loads((runs / "done/bench-serve.json").read_text()) == {k: v for k, v in found.items() if k != "file"}
    assert not list((runs / "done").glob(".bench*"))


def test_results_are_shown_and_compared(found, runs):
    shown = called("bench", "--compare", found["file"], found["file"], cwd=runs.parent, check=0)

    assert "transformers adapter x3 tokens_per_s" in shown.stdout and "x1.00" in shown.stdout
    from orchestrator.views.bench import bench_view
    from orchestrator.views.screen import out

    with out.capture() as printed:
        out.print(bench_view(found))
    assert "not measured: llama.cpp (base, adapter)" in printed.get()
    assert re.search(r"transformers +adapter +3 ", printed.get()) and re.search(r"2 +mixed +3 ", printed.get())


@pytest.fixture
def run(found, runs):
    """The run with its result, which a test may damage."""
    file = runs / "done/bench-serve.json"
    kept = file.read_bytes()
    yield RunFolder(runs / "done")
    file.write_bytes(kept)


def test_the_report_shows_it_in_both_languages(run):
    english, japanese = (html(report_of(run, run.job(), lang)) for lang in ("en", "ja"))

    assert '<figure id="serving">' in english and "requests at a time" in english
    assert "Requests for 2 adapters, 3 at a time: " in english and "llama.cpp" in english
    assert "cost.power_w" in english, "an unknown price names its key"
    assert '<figure id="serving">' in japanese and "同時リクエスト数" in japanese and "元のモデル" in japanese


@pytest.mark.parametrize(
    ("damage", "shown"),
    [
        (lambda text: text[:100], "is not JSON"),
        (lambda text: text.replace('"engine"', '"motor"'), "rows.0.engine"),
        (lambda text: json.dumps({**json.loads(text), "rows": []}), "rows: none was measured"),
        (lambda text: re.sub(r'"tokens_per_s": [\d.]+', '"tokens_per_s": 0', text), "tokens_per_s is not above 0"),
    ],
    ids=["cut", "renamed", "empty", "zero"],
)
def test_a_damaged_result_is_named_in_the_report(run, damage, shown):
    file = run.path / "bench-serve.json"
    file.write_text(damage(file.read_text()))

    (english,), (japanese,) = (serving_blocks(translator(lang), run, run.job(), run.plan()) for lang in ("en", "ja"))

    assert english.text.startswith("The measurements of serving cannot be read")
    assert "bench-serve.json" in english.text and shown in english.text
    assert japanese.text.startswith("サービングの測定結果を読み込めません")


def test_a_million_tokens_cost_the_hours_that_they_take(run):
    file = run.path / "bench-serve.json"
    result = json.loads(file.read_text())
    row = result["rows"][0] | {"tokens_per_s": 1000 / 3.6}  # a million in an hour
    file.write_text(json.dumps(result | {"rows": [row]}))
    document = run.path / "job.yaml"
    text = document.read_text()
    try:
        document.write_text(f"{text}\ncost: {{nodes: {{'*': {{per_hour: 2.5}}}}}}\n")
        *_, costs, _ = serving_blocks(translator("en"), run, run.job(), run.plan())
    finally:
        document.write_text(text)

    (cells,) = costs.rows
    assert cells[1:] == ("277.8", "1 h 00 min", "-", "2.50 EUR", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("job.yaml", "--serve"), "job.yaml is a file: --serve measures what a finished run made"),
        (("nothing", "--serve"), "no such run"),
        (("stopped", "--serve"), "not finished"),
        (("done", "--serve", "--generate"), "--serve and --generate measure different things"),
        (("done", "--serve", "--concurrency", "0"), "whole numbers above 0"),
        (("done", "--serve", "--concurrency", "257"), "a server takes 256 requests at a time"),
        (("done", "--serve", "--engines", "tgi"), "--engines tgi: give one or more of transformers, llama.cpp, vllm"),
        (("done", "--serve", "--models", "mine"), "--models mine: give one or more of base, tuned, merged"),
        (("done", "--serve", "--adapters", "1"), "one adapter cannot be mixed"),
        (("done", "--serve", "--prompt-lengths", "64,128"), "--serve takes one length"),
        (("done", "--serve", "--prompt-lengths", "251", "--new-tokens", "6"), "ends at 256"),
        (("done", "--serve", "--steps", "3"), "--steps: not used by bench of --serve"),
        (("job.yaml", "--concurrency", "1"), "--concurrency: not used by bench of a training step"),
        (("done", "--serve", "--engines", "llama.cpp"), "nothing could be measured"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_measured_is_said(arguments, message, runs, interrupted):
    if not (runs / "stopped").exists():
        shutil.copytree(interrupted.path, runs / "stopped")
        (runs.parent / "job.yaml").write_text("name: some-job\n")

    done = called("bench", *arguments, cwd=runs.parent)

    assert done.returncode in (2, 4) and message in " ".join(done.output.split()), done.output
    assert "Traceback" not in done.output


def test_latencies_are_those_of_all_answers_and_rates_those_of_a_repeat():
    answers = [AnswerTimes(first_s, first_s + 0.9, 10, 10) for first_s in (0.1, 0.2, 0.3)]
    single, silent = AnswerTimes(0.4, 0.4, 20, 1), AnswerTimes(None, 5.0, 10, 10)

    rounds = {1.0: answers, 2.0: [*answers, single], 3.0: [*answers, silent]}
    row = latency([LoadRound(seconds, found, ["full"][: seconds < 2]) for seconds, found in rounds.items()])

    assert row.first_token_s == 0.2 and row.first_token_p95_s == pytest.approx(0.355)  # of 0.1 to 0.4, ten values
    assert (row.next_token_s, row.next_token_p95_s) == pytest.approx((0.1, 0.1))
    assert (row.tokens_per_s, row.tokens_per_s_low, row.tokens_per_s_high) == (15.5, 40 / 3, 30.0)
    assert (row.answers, row.refused, row.prompt_tokens) == (11, 1, 120 / 11)


def test_rounds_one_after_the_other_take_the_sum_of_their_times():
    answer = AnswerTimes(0.1, 1.0, 5, 8)

    both = joined([LoadRound(1.0, [answer], []), LoadRound(3.0, [answer], ["gone"])])

    assert (both.seconds, both.tokens_per_s, both.refusals) == (4.0, 4.0, ["gone"])


def test_refusals_and_broken_connections_are_counted_and_end_nothing(tmp_path):
    options = ("--host", "127.0.0.1", "--port", 0, "--served-model-name", "base", "--enable-lora")
    ranks = ("--max-lora-rank", 8, "--max-cpu-loras", 1, "--max-loras", 1)
    server = start_python(FAKE, "serve", "model", *options, *ranks, cwd=tmp_path, output=tmp_path / "printed",
                          VLLM_ALLOW_RUNTIME_LORA_UPDATING="True")  # fmt: skip
    port = wait_for(lambda: re.search(r"listens at (\d+)", (tmp_path / "printed").read_text()), server)[1]
    requests = [LoadRequest(model, [1, 2]) for model in ("base", "other", "base", "cut")]

    found = send(f"http://127.0.0.1:{port}", None, Load(2, requests, 5))
    end(server)
    alone = send(f"http://127.0.0.1:{port}", None, Load(2, requests, 5))

    assert [(one.prompt_tokens, one.new_tokens) for one in found.answers] == [(2, 5)] * 2
    assert sorted(found.refusals) == ["no model other", "the answer broke off before its end"]
    assert len(alone.refusals) == 4 and not alone.answers and "connection" in alone.refusals[0]
