"""What to do about nodes that are lost, return or join: pure rules, which recovery.py carries out.

`decide` takes what is known of the run and one piece of news, and returns what to do and what is known then.  It reads
no clock and asks no node: times and answers are in the news.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto

from clusters.units import format_bytes, format_s

LESS_MEMORY = 0.6  # of a node's memory is planned with after its worker was killed twice
_TRIES_WITHOUT_A_STEP = 3
_MOST_SHRINKS = 4
_SEEN_FOR_S = 10.0  # before a node that joined is counted on
_RESTART_S = 45.0  # what a new start costs, about
_GAIN = 1.1  # a node that joins, or another cut of the layers, must make steps so much faster
_OTHER_PACE = 1.15  # times as a stage was judged: worth another look


class Act(Enum):
    """What the executor does next."""

    WAIT = auto()  # nothing now; ask again in a moment
    CONTINUE = auto()  # with the same plan
    PLAN = auto()  # for `nodes`
    ASK_NODES = auto()  # which nodes answer, then decide with `Answers`
    PROBE_MEMORY = auto()  # of `nodes`, then decide again with the same news and what was measured
    PROBE_GPUS = auto()  # of `nodes`, then decide with `GpusProbed`
    PLAN_AHEAD = auto()  # for all that are there, then decide with `WiderPlan`
    REPLAN_RUN = auto()  # ask the workers to save and end, so that the run is planned again
    END = auto()
    FAIL = auto()  # for `texts`


@dataclass(frozen=True)
class State:
    """What is known of a run's nodes and failures."""

    planned: frozenset[str]  # nodes of the plan
    excluded: frozenset[str] = frozenset()  # nodes and devices that the plan does not use
    spares: frozenset[str] = frozenset()  # nodes that stand by for one that is lost
    is_local: bool = False  # one machine, whose Ray this program started
    lacks_workers: bool = False  # the job states more than the plan has
    max_failures: int | None = None  # None = any number
    patience_s: float = 0.0  # how long lost nodes are waited for
    failures: int = 0
    tries: int = 0  # that ended at `last_step`
    last_step: int = -1
    shrinks: int = 0  # how often less memory was planned with
    is_patient: bool = False  # lost nodes are waited for: the run did not ask to be planned again
    is_waiting: bool = False  # the user knows
    seen_since: Mapping[str, float] = field(default_factory=dict)  # new node -> when it was first seen, s
    refused: frozenset[str] = frozenset()  # nodes that would not make the run faster
    judged: tuple[float, ...] = ()  # of stages measured over planned seconds, for which no other cut was worth it


@dataclass(frozen=True)
class Decision:
    state: State
    act: Act
    nodes: frozenset[str] = frozenset()
    texts: tuple[str, ...] = ()  # for the user
    measured: frozenset[str] = frozenset()  # nodes to plan with as they were probed just now
    shrunk: frozenset[str] = frozenset()  # nodes to plan with LESS_MEMORY of


@dataclass(frozen=True)
class Started:
    """The run starts, or is resumed, and these nodes are there."""

    present: frozenset[str]


@dataclass(frozen=True)
class Ended:
    """The workers ended without an error; `state` is the last one that the run recorded."""

    state: str


@dataclass(frozen=True)
class NodeMemory:
    """Of a node, in bytes: what it was planned with, and what it has now where it was probed again."""

    planned: int | None
    now: int | None = None
    is_silent: bool = False  # it was asked, and what should have answered ended there


@dataclass(frozen=True)
class Failed:
    """The workers ended with an error that another try may help."""

    step: int  # the last that was trained
    reason: str
    is_final: bool = False  # another try would not help after all
    killed: frozenset[str] = frozenset()  # nodes whose worker was killed
    hardware_changed: bool = False
    memory: Mapping[str, NodeMemory] | None = None  # by node; None = not probed


@dataclass(frozen=True)
class GpusProbed:
    """UUIDs of the cluster's GPUs as planned and as they are now."""

    planned: frozenset[str | None]
    now: frozenset[str | None]


@dataclass(frozen=True)
class Answers:
    """Nodes that answer, `waited_s` after they were asked first."""

    nodes: frozenset[str]
    waited_s: float


@dataclass(frozen=True)
class NodeList:
    """Nodes that offer a slot while the run trains."""

    nodes: frozenset[str]
    now_s: float


@dataclass(frozen=True)
class WiderPlan:
    """A plan for all nodes that are there, because of `new` ones."""

    new: frozenset[str]
    used: frozenset[str]  # nodes of the wider plan
    step_s: float
    wider_step_s: float
    steps_left: int


@dataclass(frozen=True)
class SlowStage:
    """A pipeline waits for a stage that is slower than planned."""

    node: str
    slower: float  # times as planned
    ratios: tuple[float, ...]  # of every stage


@dataclass(frozen=True)
class OtherCut:
    """A plan with what was measured of the stages."""

    slow: SlowStage
    step_s: float  # now
    other_step_s: float
    steps_left: int


@dataclass(frozen=True)
class DoesNotFit:
    """No plan fits these nodes: name -> bytes of memory."""

    memory: Mapping[str, int | None]


News = Started | Ended | Failed | GpusProbed | Answers | NodeList | WiderPlan | SlowStage | OtherCut | DoesNotFit


def decide(state: State, news: News) -> Decision:
    """What to do about the news."""
    match news:
        case Started():
            return _at_start(state, news)
        case Ended():
            return _after_end(state, news)
        case Failed():
            return _after_failure(state, news)
        case GpusProbed():
            return _after_gpu_probe(state, news)
        case Answers():
            return _after_answers(state, news)
        case NodeList():
            return _look_at_new(state, news)
        case WiderPlan():
            return _judge_wider_plan(state, news)
        case SlowStage():
            return _look_at_slow(state, news)
        case OtherCut():
            return _judge_other_cut(state, news)
        case DoesNotFit():
            return _without_smallest(state, news)


def _at_start(state: State, news: Started) -> Decision:
    if state.planned <= news.present:
        return Decision(state, Act.CONTINUE)
    return Decision(replace(state, is_patient=True, is_waiting=False), Act.ASK_NODES)


def _after_end(state: State, news: Ended) -> Decision:
    if news.state != "replanning":
        return Decision(state, Act.END)
    restart = _restart(replace(state, is_patient=False))
    return replace(restart, act=Act.PLAN, nodes=state.planned) if state.is_local else restart


def _restart(state: State, texts: tuple[str, ...] = ()) -> Decision:
    """With the same plan on one machine; in a cluster, first see who answers."""
    return Decision(replace(state, is_waiting=False), Act.CONTINUE if state.is_local else Act.ASK_NODES, texts=texts)


def _after_failure(state: State, news: Failed) -> Decision:
    """Try again, with less memory where two tries ended at one step and memory is what is lacking."""
    if news.is_final:
        return Decision(state, Act.FAIL, texts=(news.reason,))
    tries = state.tries + 1 if news.step == state.last_step else 1
    counted = replace(state, failures=state.failures + 1, tries=tries, last_step=news.step, is_patient=True)
    if state.max_failures is not None and counted.failures > state.max_failures:
        return Decision(counted, Act.FAIL, texts=(news.reason,))
    may_shrink = tries > 1 and state.shrinks < _MOST_SHRINKS
    if may_shrink and news.memory is None:
        return Decision(state, Act.PROBE_MEMORY, news.killed or state.planned)
    silent = frozenset(name for name, memory in (news.memory or {}).items() if memory.is_silent) - news.killed
    if may_shrink and silent and state.planned - silent:
        text = f"{', '.join(sorted(silent))}: no process lives there long enough to be asked; planning without"
        counted = replace(counted, shrinks=state.shrinks + 1, tries=0, refused=state.refused | silent)
        return Decision(counted, Act.PLAN, state.planned - silent, (f"a worker failed ({news.reason})", text))
    measured, shrunk, texts = _less_memory(news) if may_shrink else (frozenset(), frozenset(), ())
    if measured or shrunk:
        counted = replace(counted, shrinks=state.shrinks + 1, tries=0)
    elif tries >= _TRIES_WITHOUT_A_STEP:
        return Decision(counted, Act.FAIL, texts=(f"{news.reason} ({tries} tries in a row made no step)",))
    retry = f"a worker failed after step {news.step} ({news.reason}); continuing from the last checkpoint"
    decision = _restart(counted, (*texts, retry))
    if news.hardware_changed:
        decision = replace(decision, act=Act.PROBE_GPUS, nodes=state.planned)
    return replace(decision, measured=measured, shrunk=shrunk)


def _less_memory(news: Failed) -> tuple[frozenset[str], frozenset[str], tuple[str, ...]]:
    """Nodes that have much less memory than planned, nodes whose worker was killed, and what to say of each."""
    measured, shrunk, texts = set[str](), set[str](), []
    for name, memory in (news.memory or {}).items():
        if memory.now and memory.now < LESS_MEMORY * (memory.planned or math.inf):
            measured.add(name)
            texts.append(f"{name} has only {format_bytes(memory.now)}: planning with that")
        elif name in news.killed:
            shrunk.add(name)
            texts.append(f"a worker on {name} was killed twice: planning with {LESS_MEMORY:.0%} of its memory")
    return frozenset(measured), frozenset(shrunk), tuple(texts)


def _after_gpu_probe(state: State, news: GpusProbed) -> Decision:
    """Other GPUs begin a new count of tries; where they are the same as planned, the failures count on."""
    if news.now == news.planned:
        return _restart(state)
    return replace(_restart(replace(state, tries=0)), measured=state.planned)


def _after_answers(state: State, news: Answers) -> Decision:
    """Wait a while for lost nodes where no spare takes their place; then the same plan, or one for those that answer.

    What returns later is a node that joins.
    """
    missing, spares = state.planned - news.nodes, state.spares & news.nodes
    if not missing and state.is_patient:
        is_other_plan = state.tries == 0  # of a start, of less memory, of other GPUs
        return Decision(state, Act.PLAN, state.planned) if is_other_plan else Decision(state, Act.CONTINUE)
    if missing and state.is_patient and len(missing) <= len(spares):
        text = f"{', '.join(sorted(missing))} does not answer; {', '.join(sorted(spares))} stood by"
        return Decision(state, Act.PLAN, news.nodes, (text,))
    patience_s = state.patience_s if state.is_patient else 0.0
    if news.nodes and news.waited_s >= patience_s:
        return Decision(state, Act.PLAN, news.nodes)
    text = f"{', '.join(sorted(missing)) or 'the cluster'} does not answer; waiting {patience_s:.0f} s"
    return Decision(replace(state, is_waiting=True), Act.WAIT, texts=() if state.is_waiting else (text,))


def _look_at_new(state: State, news: NodeList) -> Decision:
    """Nodes that joined and stayed are worth a plan."""
    new = news.nodes - state.planned - state.excluded - state.refused
    state = replace(state, seen_since={name: state.seen_since.get(name, news.now_s) for name in new})
    ready = frozenset(name for name, since in state.seen_since.items() if news.now_s - since >= _SEEN_FOR_S)
    return Decision(state, Act.PLAN_AHEAD if ready else Act.WAIT, ready)


def _judge_wider_plan(state: State, news: WiderPlan) -> Decision:
    """Plan the run again where new nodes make the rest of it faster than a restart costs, or where workers lack."""
    joining, gain_s = news.used & news.new, news.steps_left * (news.step_s - news.wider_step_s)
    again = f"{', '.join(sorted(joining))} joined: planning again at the next step"
    if joining and state.lacks_workers:
        return Decision(state, Act.REPLAN_RUN, texts=(again,))
    if joining and news.step_s > _GAIN * news.wider_step_s and gain_s > _RESTART_S:
        return Decision(state, Act.REPLAN_RUN, texts=(f"{again}, {format_s(gain_s)} faster",))
    text = f"{', '.join(sorted(news.new))} joined, and would not make the rest of this run faster"
    return Decision(replace(state, refused=state.refused | news.new), Act.WAIT, texts=(text,))


def _look_at_slow(state: State, news: SlowStage) -> Decision:
    """Another cut is looked for, once for each pace."""
    pairs = zip(news.ratios, state.judged, strict=False)
    known = bool(state.judged) and all(1 / _OTHER_PACE < now / before < _OTHER_PACE for now, before in pairs)
    return Decision(state, Act.WAIT if known else Act.PLAN_AHEAD)


def _judge_other_cut(state: State, news: OtherCut) -> Decision:
    """Plan the run again where that makes its steps so much shorter that the rest of it gains more than a restart."""
    slow, gain_s = news.slow, news.steps_left * (news.step_s - news.other_step_s)
    what = f"{slow.node} takes {slow.slower:.2f} times as long for its layers as planned"
    if news.step_s >= _GAIN * news.other_step_s and gain_s > _RESTART_S:
        text = f"{what}: planning again at the next step, {format_s(gain_s)} faster"
        return Decision(state, Act.REPLAN_RUN, texts=(text,))
    text = f"{what}, and no other cut would make the rest of this run faster"
    return Decision(replace(state, judged=slow.ratios), Act.WAIT, texts=(text,))


def _without_smallest(state: State, news: DoesNotFit) -> Decision:
    """A plan for the nodes without the one of least memory, as long as one is left."""
    if len(news.memory) < 2:
        return Decision(state, Act.FAIL)
    smallest = min(news.memory, key=lambda name: news.memory[name] or math.inf)
    return Decision(state, Act.PLAN, frozenset(news.memory) - {smallest})
