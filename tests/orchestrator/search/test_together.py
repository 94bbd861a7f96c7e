"""Trials that share one base model come to what each comes to by itself, whatever becomes of the others."""

import math

import pytest

from orchestrator.errors import RunFailed
from orchestrator.lifecycle.calibration import calibrated
from orchestrator.runs.events import Note
from orchestrator.runs.search_folder import SearchFolder
from orchestrator.search.together import TrainerLost

DIVERGING = "search.space={train.learning_rate: [1.0e+30, 1.0e-3, 1.0e-2], method.lora_r: [8]}"


def by_point(folder):
    return {trial.key: trial for trial in folder.trials()}


def assert_as_alone(folder, each_alone, keys=None):
    """The same losses at every rung that was reached."""
    ours, theirs = by_point(folder), by_point(each_alone)
    for key in keys or theirs:
        assert [step for step, _ in ours[key].curve] == [step for step, _ in theirs[key].curve][: len(ours[key].curve)]
        for (_, loss), (_, expected) in zip(ours[key].curve, theirs[key].curve, strict=False):
            assert loss == pytest.approx(expected, rel=1e-5), key


def test_trials_over_one_base_come_to_the_losses_and_the_recommendation_of_each_alone(search_with, trainer, each_alone):
    folder, listener = search_with()

    assert trainer.calls[:2] == ["3 places", ([1, 2, 3], [], [])] and trainer.calls[-1] == "end"
    assert "trials of one layout share one base model in one worker, 3 at a time" in " ".join(listener.said)
    assert_as_alone(folder, each_alone)
    assert folder.summary().recommended.point == each_alone.summary().recommended.point
    assert folder.state() == "finished" and (folder.path / "recommended.yaml").is_file()


def test_their_times_are_parts_of_passes_and_teach_the_planner_nothing(search_with, each_alone):
    folder, _ = search_with()

    for trial in folder.trials():
        assert trial.step_s > 0 and trial.seconds > 0 and trial.tokens_per_s > 0
        assert trial.predicted_step_s is None and trial.time["formula_step_s"] is None
        assert trial.time["runs_together"] == 3
        alone = by_point(each_alone)[trial.key]
        assert trial.tensors_bytes == pytest.approx(alone.tensors_bytes, rel=0.02)
    planned = {outcome.trial: outcome.total_s for outcome in folder.summary().outcomes}
    assert len(set(planned.values())) == 2  # the plan's, by rank; no trial corrects it
    assert calibrated(folder.capability(), _only(folder, "trials")) == folder.capability()


def _only(folder, name):
    """A folder of runs that holds this search alone."""
    place = folder.path.parent.parent / name
    place.mkdir(exist_ok=True)
    if not (place / folder.run_id).exists():
        (place / folder.run_id).symlink_to(folder.path)
    return place


def test_a_trial_that_the_scheduler_stops_frees_its_place_and_the_others_are_as_alone(search_with, trainer, each_alone):
    folder, _ = search_with("search.scheduler=asha")

    trials = folder.trials()
    stopped = [trial for trial in trials if trial.status == "stopped"]
    assert stopped and all(trial.steps < 8 for trial in stopped)
    left = [(begin, leave) for begin, _, leave in trainer.calls[1:-1]]
    assert [number for _, leave in left for number in leave] == [trial.number for trial in stopped]
    assert any(begin and leave for begin, leave in left)  # the fourth begins where another one leaves
    assert_as_alone(folder, each_alone, [trial.key for trial in trials])
    assert folder.summary().recommended.point == each_alone.summary().recommended.point


def test_a_trial_that_diverges_fails_and_the_others_are_as_alone(search_with, each_alone):
    folder, _ = search_with(DIVERGING)

    (failed,) = [trial for trial in folder.trials() if trial.status == "failed"]
    assert failed.point["train.learning_rate"] == 1e30 and "not a number" in failed.reason
    others = [trial for trial in folder.trials() if trial is not failed and trial.status == "finished"]
    assert len(others) == 2 and all(math.isfinite(trial.eval_loss) for trial in others)
    assert_as_alone(folder, each_alone, [trial.key for trial in others])


@pytest.mark.parametrize("share_base", ["auto", "never"])
def test_a_trial_whose_held_out_loss_is_no_number_fails_and_the_others_count(search_with, share_base):
    """Its last update broke the weights: the loss of the step before it was finite."""
    rates = "search.space={train.learning_rate: [1.0e+30, 1.0e-3], method.lora_r: [8]}"
    folder, _ = search_with(rates, "search.trial_steps=1", f"search.share_base={share_base}")

    (failed,) = [trial for trial in folder.trials() if trial.status == "failed"]
    assert (
        failed.point["train.learning_rate"] == 1e30 and "held-out loss is not a number after 1 steps" in failed.reason
    )
    assert folder.summary().recommended.point["train.learning_rate"] == 1e-3


def test_a_memory_s_surprising_rows_are_tried_as_they_are_trained(search_with):
    method = "method={type: experimental_memory, memory_rows: 256, updated_rows: 20}"
    folder, _ = search_with(method, "search.space={method.slots: [all, surprising]}", "search.trial_steps=2")

    assert [(trial.status, trial.reason) for trial in folder.trials()] == [("finished", None)] * 2


def test_a_search_that_was_stopped_resumes_with_the_trials_that_are_left(
    search_with, resumed, search_place, each_alone
):
    with pytest.raises(RunFailed, match="continues with the remaining trials"):
        search_with("search.scheduler=asha", stop_after=1)
    folder = SearchFolder.all(search_place / "runs")[-1]
    before = folder.trials()
    assert len(before) < 4

    resumed(folder)

    assert folder.trials()[: len(before)] == before and len(by_point(folder)) == 4
    assert_as_alone(folder, each_alone)
    assert folder.summary().recommended.point == each_alone.summary().recommended.point


def test_trials_whose_trainer_is_lost_are_tried_again_by_themselves(search_with, trainer, each_alone):
    def lose(self, timeout_s):
        raise TrainerLost("its process was killed")

    trainer.poll = lose
    folder, listener = search_with()

    assert trainer.calls == ["3 places", ([1, 2, 3], [], []), "end"]  # no second one of its kind
    assert "trial 1 is tried again by itself" in " ".join(listener.said)
    assert any("trial 1 is tried again by itself" in note.text for note in folder.events_of(Note))
    assert_as_alone(folder, each_alone)
    assert all(trial.predicted_step_s for trial in folder.trials())


def test_a_trial_that_runs_out_of_memory_beside_others_is_tried_again_by_itself(search_with, trainer, each_alone):
    def poll(self, timeout_s):
        reports, notes = super(trainer, self).poll(timeout_s)
        for report in reports:
            if report["trial"]["number"] == 2 and report["done"]:
                report["trial"] |= {"status": "failed", "reason": "not one row fits"}
                report["short_of_memory"] = True
        return reports, notes

    trainer.poll = poll
    folder, listener = search_with()

    assert "trial 2 is tried again by itself: memory ran out beside others (not one row fits)" in listener.said
    assert [trial.predicted_step_s is None for trial in sorted(folder.trials(), key=lambda one: one.number)] == [
        *(True, False, True, True),
    ]
    assert_as_alone(folder, each_alone)


def test_a_search_without_others_to_share_with_is_as_before(search_with, trainer, each_alone):
    folder, listener = search_with("search.space={method.lora_r: [2], train.learning_rate: [1.0e-3]}")

    assert trainer.calls == [] and "share one base" not in " ".join(listener.said)
    assert_as_alone(folder, each_alone, by_point(folder))
