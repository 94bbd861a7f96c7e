"""The planner's choice beside an exhaustive one: every subset of slots, every setting, on random small instances."""

import itertools
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from clusters.capability import ClusterCapability, Link
from orchestrator.job.job_file import parse_job
from orchestrator.planning.candidates import Division, Placed, Switches, network_between, waiting_s
from orchestrator.planning.enumeration import Enumeration
from orchestrator.planning.memory_fit import device_shortage, needed_bytes, node_shortage
from orchestrator.planning.planner import offered_slots
from orchestrator.planning.settings import MICRO_BATCH_TOKENS
from orchestrator.planning.workload import describe
from strategies import METHODS
from strategies.compatibility import conflict
from strategies.workload import Techniques
from tests.orchestrator.planning.machines import MIDDLE, SMALL, TINY, machine

CARDS = ("RTX 3090", "RTX 3060 12GB", "RTX 4090", "A100 PCIe 80GB", "RTX 2080 Ti", None)
OPEN = {
    "dtypes": ("bfloat16", "float16", "float32"),
    "attentions": ("document", "flash_attention_2", "sdpa", "eager"),
    "packings": (True, False),
    "checkpointings": (False, True),
    "losses": ("nll", "chunked_nll"),
    "optims": ("adamw_torch_fused", "adamw_bnb_8bit"),
}
ROUNDS = 6  # of shares that follow speeds
LIGHT, ALL = 16, 500  # instances


def instance(seed):
    """A random enumeration: two to seven devices, the more of them the fewer switches are open."""
    draw = random.Random(seed)
    count = draw.choices((2, 3, 4, 7), (6, 8, 3, 1))[0]
    nodes = []
    while sum(len(node.gpus) or 1 for node in nodes) < count:
        card, number = draw.choice(CARDS), draw.choice((1, 1, 1, 2))
        nodes.append(machine(f"m{len(nodes)}", *([card] * number if card else []), memory_gib=draw.choice((32, 256))))
    kind = draw.choice(("unknown", "alike", "measured"))
    alike = 10 ** draw.uniform(7, 10)
    links = tuple(
        Link(
            (one.name, other.name), alike if kind == "alike" else 10 ** draw.uniform(7, 10), 10 ** draw.uniform(-4, -3)
        )
        for one, other in itertools.combinations(nodes, 2)
        if kind != "unknown"
    )
    spec = parse_job(
        f"model: {{model_name_or_path: m}}\ndata: {{train: a.jsonl}}\n"
        f"train: {{global_batch_size: {draw.choice((8, 16, 48, 128))}}}\n",
        Path(),
    ).spec
    lengths = [draw.randint(32, 900) for _ in range(400)]
    work, _, _ = describe(spec, draw.choice((TINY, SMALL, MIDDLE)), lengths, sum(lengths) // 2, 1)
    most = {2: 4, 3: 3, 4: 2}.get(count, 1)  # switches of which two values are open
    opened = draw.sample(sorted(OPEN), most)
    values = {
        key: tuple(sorted(draw.sample(OPEN[key], 2 if key in opened else 1), key=OPEN[key].index)) for key in OPEN
    }
    switches = Switches(
        2048, offloads=("none",), zero_stages=draw.choice(((0,), (0, 1), (0, 2), (0, 3), (1,))), **values
    )
    methods = [METHODS[name]() for name in draw.sample(("lora", "qlora", "full"), 1 if count > 3 else 2)]
    cluster = ClusterCapability(tuple(nodes), links)
    return Enumeration(work, offered_slots(spec, cluster), cluster, methods, switches)


class Exhaustive:
    """Looks at everything: what the planner would find if time did not matter."""

    def __init__(self, given):
        self.given, self.known = given, {}

    def best_step_s(self):
        given, found = self.given, [math.inf]
        for method, stage, optim in itertools.product(given.methods, given.switches.zero_stages, given.switches.optims):
            for count in range(2 if stage else 1, len(given.slots) + 1):
                for slots in itertools.combinations(given.slots, count):
                    found.append(self.group_s(slots, method, stage, optim))
        return min(found)

    def group_s(self, slots, method, stage, optim):
        """The fastest step of a group, of all shares on the way to those with which all finish together."""
        count, best = len(slots), math.inf
        shares = [1 / count] * count
        for _ in range(1 if count == 1 or stage > 1 else ROUNDS):
            divisions = self.divisions(slots, method, stage, optim)
            if divisions is None:
                return best
            options = [
                self.plans(slot, share, method, division, optim)
                for slot, share, division in zip(slots, shares, divisions, strict=True)
            ]
            if not all(options):
                return best
            plans = [min(each, key=lambda plan: plan.time.step_s) for each in options]
            placed = [Placed(*part) for part in zip(slots, plans, shares, strict=True)]
            if node_shortage(placed, self.given.workload.shape.num_parameters, method) is None:
                network, _ = network_between(slots, self.given.cluster)
                waits = waiting_s(network, plans) if network else 0.0
                if min(shares) * self.given.workload.global_batch_size >= 1:  # each has a sample
                    best = min(best, max(plan.time.step_s for plan in plans) + waits)
            speeds = [
                share / max(plan.time.step_s - plan.time.update_s, 1e-9)
                for share, plan in zip(shares, plans, strict=True)
            ]
            late = sum(speed * plan.time.update_s for speed, plan in zip(speeds, plans, strict=True))
            end_s = (1 + late) / sum(speeds)
            wanted = [max(0.0, speed * (end_s - plan.time.update_s)) for speed, plan in zip(speeds, plans, strict=True)]
            if min(wanted) <= 0:
                wanted = [speed / sum(speeds) for speed in speeds]
            shares = wanted
        return best

    def divisions(self, slots, method, stage, optim):
        count = len(slots)
        if stage > 1 and len({slot.device.name for slot in slots}) > 1:
            return None
        if stage != 1:
            return [Division(stage, count)] * count
        free = []
        for slot in slots:
            plans = self.plans(slot, 1 / count, method, Division(1, count, 0.0), optim)
            if not plans:
                return None
            smallest = min(plans, key=lambda plan: plan.memory.total_bytes)
            free.append(max(0.0, slot.memory_bytes - needed_bytes(smallest.memory, slot.device.kind)))
        return [Division(1, count, each / sum(free)) for each in free] if sum(free) else None

    def plans(self, slot, share, method, division, optim):
        """Of every setting that fits the slot."""
        key = slot.label, slot.memory_bytes, share, method.name, division, optim
        if key not in self.known:
            given, switches = self.given, self.given.switches
            work = replace(given.workload, share=share)
            whole = max(1, math.ceil(work.global_batch_size * share))
            most = max(1, MICRO_BATCH_TOKENS[slot.device.kind] // switches.max_length)
            rows = sorted(
                {min(whole, most), *(2**power for power in range(whole.bit_length())), *(whole >> i for i in range(8))}
            )
            found = []
            for dtype, attention, packing, checkpointing, loss in itertools.product(
                switches.dtypes, switches.attentions, switches.packings, switches.checkpointings, switches.losses
            ):
                techniques = Techniques(
                    dtype, attention, packing, checkpointing, 1, switches.max_length, optim, loss,
                    zero_stage=division.stage, num_shards=division.num_devices if division.stage else 1,
                    state_share=division.state_share,
                )  # fmt: skip
                if conflict(method, techniques, slot.device, work.shape, division.num_devices):
                    continue
                for count in rows:
                    if 0 < count * switches.max_length <= MICRO_BATCH_TOKENS[slot.device.kind] or count == 1:
                        plan = method.estimate(
                            work, slot.device, slot.node, replace(techniques, per_device_train_batch_size=count)
                        )
                        if device_shortage(plan, slot) is None:
                            found.append(plan)
            self.known[key] = found
        return self.known[key]


def excess(seed):
    """How much slower the planner's fastest way is than the exhaustive one, as a part of it."""
    given = instance(seed)
    best_s = Exhaustive(given).best_step_s()
    found_s = min((candidate.step_s for candidate in given.run().fitting), default=math.inf)
    return 0.0 if best_s == found_s == math.inf else found_s / best_s - 1


def test_the_choice_is_within_two_percent_of_the_exhaustive_one():
    found = {seed: excess(seed) for seed in range(LIGHT)}

    assert {seed: part for seed, part in found.items() if part > 0.02} == {}


@pytest.mark.parametrize(
    ("seed", "what"),
    [
        (307, "a CPU whose first sample takes longer than the step"),
        (473, "shares that follow one straight line do not settle"),
        (823, "settings that fit where a share is one micro-batch, and not where gradients are added up"),
        (1234, "the pair that looks best does not fit, and the next one does"),
        (1296, "an 8-bit state that is small, and without which nothing fits"),
    ],
)
def test_what_was_missed_once_is_found(seed, what):
    assert excess(seed) <= 0.02, what


@pytest.mark.slow
def test_the_choice_is_within_two_percent_of_the_exhaustive_one_on_all_instances():
    found = {seed: excess(seed) for seed in range(ALL)}

    assert len(found) == ALL
    assert {seed: part for seed, part in found.items() if part > 0.02} == {}
