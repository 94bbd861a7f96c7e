"""The script for a real card, as far as it goes without one: a dry run of every part, its table and its file."""

import pytest

from tests import first_contact
from tests.benchmarks import predictions
from tests.first_contact_parts.checks import judged, read

WITHOUT_ITS_OWN_TEST = [name for name in first_contact.PARTS if name != "quick_start"]  # tests/integration has one


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """Exit code and file of a run on the CPU."""
    file = tmp_path_factory.mktemp("dry") / "first_contact.json"
    only = ",".join(WITHOUT_ITS_OWN_TEST)
    return first_contact.main(["--device", "cpu", "--small", "--only", only, "--out", str(file)]), file


def test_a_dry_run_goes_through_every_part_and_none_fails(dry_run):
    code, file = dry_run
    about, checks = read(file)

    assert [check for check in checks if check.verdict == "failed"] == []
    assert code == 0
    assert {check.part for check in checks} == set(WITHOUT_ITS_OWN_TEST)
    assert about["device"] == "cpu" and about["small"] is True


def test_what_needs_a_gpu_is_said_not_to_have_run(dry_run):
    _, checks = read(dry_run[1])

    skipped = {check.part: check.text for check in checks if check.verdict == "not run"}
    assert {"full_card", "packed_kernels", "two_cards"} <= set(skipped)
    assert "needs a GPU" in skipped["full_card"]


def test_gradients_and_resumed_weights_are_compared_on_the_cpu_too(dry_run):
    _, checks = read(dry_run[1])

    ran = {part: [check for check in checks if check.part == part and check.verdict == "ok"] for part in
           ("exact", "resume", "divided", "lanes", "mixed", "scaling")}  # fmt: skip
    assert all(ran.values())
    assert all(check.figures["gradient_error"] > 0 for check in ran["exact"] if check.name != "float32 document packed")
    assert {check.figures["difference"] for check in ran["resume"]} == {0.0}


def test_predictions_reads_the_file(dry_run, capsys):
    predictions.card(dry_run[1])

    printed = capsys.readouterr().out
    assert "a dry run" in printed and "lora packed" in printed and "Kendall tau" in printed


def test_a_part_that_fails_stops_no_other_and_decides_the_exit_code(tmp_path, monkeypatch, capsys):
    def breaks(bench):
        yield judged("first", True, "fine")
        raise RuntimeError("the driver is gone")

    def follows(bench):
        yield judged("second", False, "3 differs from 4", difference=1.0)

    monkeypatch.setattr(first_contact, "PARTS", {"breaks": breaks, "follows": follows})
    code = first_contact.main(["--device", "cpu", "--small", "--out", str(tmp_path / "out.json")])

    found = [(check.part, check.name, check.verdict) for check in read(tmp_path / "out.json")[1]]
    assert code == 1
    assert found == [("breaks", "first", "ok"), ("breaks", "went through", "failed"), ("follows", "second", "failed")]
    assert "RuntimeError: the driver is gone" in capsys.readouterr().out


def test_a_part_that_does_not_exist_is_named():
    with pytest.raises(SystemExit) as ended:
        first_contact.main(["--device", "cpu", "--only", "exact,nothing"])

    assert ended.value.code == 2
