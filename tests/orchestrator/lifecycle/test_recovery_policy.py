"""What is decided when nodes are lost, return or join: a row for each fault, no clock, no cluster."""

from dataclasses import replace

import pytest

from orchestrator.lifecycle.recovery_policy import (
    Act,
    Answers,
    DoesNotFit,
    Ended,
    Failed,
    GpusProbed,
    NodeList,
    NodeMemory,
    OtherCut,
    SlowStage,
    Started,
    State,
    WiderPlan,
    decide,
)

GIB = 2**30
BOTH = frozenset({"a", "b"})
A, B, C = frozenset({"a"}), frozenset({"b"}), frozenset({"c"})
STATE = State(planned=BOTH, patience_s=40.0)
LOCAL = State(planned=A, is_local=True, max_failures=0)
ONCE = replace(STATE, failures=1, tries=1, last_step=7)  # a try ended at step 7
TWICE = replace(STATE, failures=2, tries=2, last_step=7)
WHOLE = {name: NodeMemory(8 * GIB, 8 * GIB) for name in BOTH}
JOINED = WiderPlan(new=C, used=BOTH | C, step_s=1.0, wider_step_s=0.5, steps_left=1000)
PIPELINE = State(planned=BOTH | C, patience_s=40.0)  # a stage each
SPARE = State(planned=BOTH, spares=frozenset("d"), patience_s=40.0, tries=1, is_patient=True)
SLOW = SlowStage("c", slower=1.5, ratios=(1.0, 1.0, 1.5))
CUT = OtherCut(SLOW, step_s=1.1, other_step_s=1.0, steps_left=1000)
JUDGED = replace(PIPELINE, judged=SLOW.ratios)

FAULTS = {
    "all planned nodes are there at the start": (STATE, Started(BOTH), Act.CONTINUE),
    "a node is lost before the start": (STATE, Started(A), Act.ASK_NODES),
    "a node that left before training started fails the try": (STATE, Failed(0, "b left"), Act.ASK_NODES),
    "a worker fails for the first time": (STATE, Failed(7, "RuntimeError: x"), Act.ASK_NODES),
    "it fails again at the same step": (ONCE, Failed(7, "x"), Act.PROBE_MEMORY),
    "it fails again at a later step": (ONCE, Failed(8, "x"), Act.ASK_NODES),
    "it fails twice at a step with all its memory": (ONCE, Failed(7, "x", memory=WHOLE), Act.ASK_NODES),
    "it fails three times at a step": (TWICE, Failed(7, "x", memory=WHOLE), Act.FAIL),
    "more failures than the job allows": (replace(STATE, max_failures=2, failures=2), Failed(9, "x"), Act.FAIL),
    "as many failures as the job allows": (replace(STATE, max_failures=2, failures=1), Failed(9, "x"), Act.ASK_NODES),
    "a failure that no other try helps": (STATE, Failed(9, "the loss is NaN", is_final=True), Act.FAIL),
    "a failure on one machine": (LOCAL, Failed(9, "x"), Act.FAIL),
    "a failure on one machine that allows it": (replace(LOCAL, max_failures=1), Failed(9, "x"), Act.CONTINUE),
    "a GPU is another one now": (STATE, Failed(7, "x", hardware_changed=True), Act.PROBE_GPUS),
    "the user stops the run": (STATE, Ended("stopped"), Act.END),
    "the run finishes": (STATE, Ended("finished"), Act.END),
    "the workers ended to be planned again": (STATE, Ended("replanning"), Act.ASK_NODES),
    "all nodes answer after a failure": (replace(ONCE, is_patient=True), Answers(BOTH, 0.1), Act.CONTINUE),
    "all nodes answer after less memory": (replace(STATE, is_patient=True), Answers(BOTH, 0.1), Act.PLAN),
    "a lost node may come back": (replace(ONCE, is_patient=True), Answers(A, 39.0), Act.WAIT),
    "a lost node does not come back": (replace(ONCE, is_patient=True), Answers(A, 40.0), Act.PLAN),
    "no node answers": (replace(ONCE, is_patient=True), Answers(frozenset(), 99.0), Act.WAIT),
    "nobody is waited for where the run asked for another plan": (STATE, Answers(A, 0.0), Act.PLAN),
    "a node joins": (STATE, NodeList(BOTH | C, 5.0), Act.WAIT),
    "a node that joined stays": (replace(STATE, seen_since={"c": 5.0}), NodeList(BOTH | C, 15.0), Act.PLAN_AHEAD),
    "a node that joined leaves": (replace(STATE, seen_since={"c": 5.0}), NodeList(BOTH, 15.0), Act.WAIT),
    "a node that the plan does not use": (replace(STATE, excluded=C), NodeList(BOTH | C, 99.0), Act.WAIT),
    "a node that was refused once": (replace(STATE, refused=C), NodeList(BOTH | C, 99.0), Act.WAIT),
    "a node that joined makes the rest faster": (STATE, JOINED, Act.REPLAN_RUN),
    "it would not be used": (STATE, replace(JOINED, used=BOTH), Act.WAIT),
    "it saves less than a restart costs": (STATE, replace(JOINED, steps_left=80), Act.WAIT),
    "it is hardly faster": (STATE, replace(JOINED, wider_step_s=0.95), Act.WAIT),
    "workers lack": (replace(STATE, lacks_workers=True), replace(JOINED, wider_step_s=2.0), Act.REPLAN_RUN),
    "a stage's node is lost": (PIPELINE, Failed(7, "another worker stopped answering"), Act.ASK_NODES),
    "a lost stage may come back": (replace(PIPELINE, tries=1, is_patient=True), Answers(BOTH, 39.0), Act.WAIT),
    "a spare takes a lost stage": (SPARE, Answers(A | frozenset("d"), 0.1), Act.PLAN),
    "a spare that is lost too takes nothing": (SPARE, Answers(A, 0.1), Act.WAIT),
    "one spare for two lost stages": (replace(SPARE, planned=BOTH | C), Answers(A | frozenset("d"), 0.1), Act.WAIT),
    "a lost stage does not come back": (replace(PIPELINE, tries=1, is_patient=True), Answers(BOTH, 40.0), Act.PLAN),
    "a lost stage's node comes back later": (STATE, replace(JOINED, step_s=12.0, wider_step_s=8.0), Act.REPLAN_RUN),
    "the node that stands by is none that joined": (replace(STATE, excluded=C), NodeList(BOTH | C, 99.0), Act.WAIT),
    "a stage is slower than planned": (PIPELINE, SLOW, Act.PLAN_AHEAD),
    "a stage is as slow as was judged": (JUDGED, replace(SLOW, ratios=(1.0, 1.1, 1.6)), Act.WAIT),
    "a stage is slower than was judged": (JUDGED, replace(SLOW, ratios=(1.0, 1.0, 1.8)), Act.PLAN_AHEAD),
    "another stage is slow now": (JUDGED, replace(SLOW, ratios=(1.5, 1.0, 1.5)), Act.PLAN_AHEAD),
    "another cut makes the rest faster": (PIPELINE, CUT, Act.REPLAN_RUN),
    "another cut is hardly faster": (PIPELINE, replace(CUT, step_s=1.09), Act.WAIT),
    "another cut saves less than a restart costs": (PIPELINE, replace(CUT, steps_left=400), Act.WAIT),
    "the workers of one machine ended to be planned again": (LOCAL, Ended("replanning"), Act.PLAN),
    "no plan fits both nodes": (STATE, DoesNotFit({"a": 8 * GIB, "b": 4 * GIB}), Act.PLAN),
    "no plan fits what is left": (STATE, DoesNotFit({"a": 8 * GIB}), Act.FAIL),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_has_its_act(fault):
    state, news, act = FAULTS[fault]

    assert decide(state, news).act is act


def test_failures_are_counted_by_the_step_they_end_at():
    first = decide(STATE, Failed(7, "x")).state
    second = decide(first, Failed(7, "x", memory=WHOLE)).state
    later = decide(second, Failed(9, "x")).state

    assert [(one.failures, one.tries, one.last_step) for one in (first, second, later)] == [
        (1, 1, 7),
        (2, 2, 7),
        (3, 1, 9),
    ]


def test_a_worker_that_was_killed_twice_gets_less_memory_up_to_four_times():
    news = Failed(7, "its process was killed", killed=B, memory={**WHOLE, "b": NodeMemory(8 * GIB)})
    state, shrunk = STATE, []

    while (decision := decide(state, news)).act is not Act.FAIL:
        state = decision.state
        shrunk.append(decision.shrunk)

    assert shrunk.count(B) == state.shrinks == 4 and len(shrunk) == 4 * 2 + 2
    assert decision.texts == ("its process was killed (3 tries in a row made no step)",)


def test_a_node_that_has_much_less_memory_than_planned_is_planned_with_that():
    news = Failed(7, "out of memory", memory={"a": NodeMemory(8 * GIB, 8 * GIB), "b": NodeMemory(8 * GIB, 4 * GIB)})

    decision = decide(ONCE, news)

    assert decision.measured == B and not decision.shrunk and decision.state.tries == 0
    assert decision.texts[0] == "b has only 4.0 GiB: planning with that"


def test_a_node_where_not_even_the_probe_lives_is_planned_without_and_not_taken_back():
    silent = {"a": NodeMemory(8 * GIB, 8 * GIB), "b": NodeMemory(8 * GIB, is_silent=True)}

    decision = decide(ONCE, Failed(7, "workers did not start", memory=silent))
    alone = decide(ONCE, Failed(7, "x", memory={name: NodeMemory(8 * GIB, is_silent=True) for name in BOTH}))

    assert (decision.act, decision.nodes, decision.state.tries) == (Act.PLAN, A, 0)
    assert decision.texts[-1].startswith("b: no process lives there")
    later = decide(replace(decision.state, planned=A), NodeList(BOTH, 100.0))
    assert later.act is Act.WAIT and not later.nodes
    assert alone.act is Act.ASK_NODES  # nowhere else to go: another try


def test_probing_leaves_the_count_to_the_decision_that_follows():
    decision = decide(ONCE, Failed(7, "x", killed=B))

    assert decision.state == ONCE and decision.nodes == B


@pytest.mark.parametrize(("now", "tries", "measured"), [(("new",), 0, BOTH), (("old",), 1, frozenset())])
def test_only_other_gpus_begin_a_new_count(now, tries, measured):
    decision = decide(ONCE, GpusProbed(frozenset({"old"}), frozenset(now)))

    assert (decision.state.tries, decision.measured, decision.act) == (tries, measured, Act.ASK_NODES)


def test_the_user_is_told_once_who_is_waited_for():
    first = decide(replace(ONCE, is_patient=True), Answers(A, 0.1))
    second = decide(first.state, Answers(A, 1.1))

    assert first.texts == ("b does not answer; waiting 40 s",) and second.texts == ()


def test_a_plan_for_those_that_answer_names_them():
    decision = decide(replace(ONCE, is_patient=True), Answers(A | C, 41.0))

    assert decision.nodes == A | C


def test_a_node_that_would_not_help_is_refused_once():
    refused = decide(STATE, replace(JOINED, steps_left=1))
    later = decide(refused.state, NodeList(BOTH | C, 1000.0))

    assert refused.texts == ("c joined, and would not make the rest of this run faster",)
    assert later.act is Act.WAIT and later.texts == ()


def test_the_node_of_least_memory_is_left_out_where_nothing_fits():
    decision = decide(STATE, DoesNotFit({"a": None, "b": 4 * GIB, "c": 8 * GIB}))

    assert decision.nodes == A | C


def test_a_cut_that_is_not_worth_it_is_judged_once_and_said():
    judged = decide(PIPELINE, replace(CUT, steps_left=1))

    assert judged.texts == (
        "c takes 1.50 times as long for its layers as planned, and no other cut would make the rest of this run faster",
    )
    assert decide(judged.state, SLOW).act is Act.WAIT


def test_a_new_cut_says_why_and_what_it_saves():
    assert decide(PIPELINE, replace(CUT, step_s=1.5)).texts == (
        "c takes 1.50 times as long for its layers as planned: planning again at the next step, 8 min 20 s faster",
    )
