"""Which of a user's programs on this machine trains on which GPU: a lock for each GPU, in the user's cache.

An embedded Ray knows nothing of another one: two jobs that were planned at the same time would share a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from clusters.capability import ClusterCapability
from clusters.hardware.waiting import wait_for_gpus
from clusters.safe.cache import cache_folder
from orchestrator.planning.plan import NodePlan, Plan
from orchestrator.runs import locks


def equivalent_gpus(part: NodePlan, cluster: ClusterCapability) -> tuple[str, ...]:
    """UUIDs of the planned GPU and of its equivalents: of the same name, with memory for what was planned.

    Empty where the planned one has none.
    """
    gpus = next((node.gpus for node in cluster.nodes if node.name == part.node), ())
    alike = [gpu for gpu in gpus if gpu.name == part.device and gpu.uuid not in (None, part.uuid)]
    needed = part.memory.total_bytes
    others = [str(gpu.uuid) for gpu in alike if gpu.memory_bytes is None or gpu.memory_bytes >= needed]
    return (part.uuid, *others) if part.uuid else ()


@contextlib.contextmanager
def hold_gpus(
    plan: Plan, cluster: ClusterCapability, say: Callable[[str], None], is_over: Callable[[], bool]
) -> Iterator[Plan | None]:
    """Hold the plan's GPUs, or equivalents, inside the block; yields the plan with those.  See `hold_one_each`."""
    wanted = [equivalent_gpus(part, cluster) for part in plan.nodes if part.uuid]
    with hold_one_each(wanted, say, is_over) as held:
        yield None if held is None else _plan_on(plan, held, say)


def _plan_on(plan: Plan, uuids: Sequence[str], say: Callable[[str], None]) -> Plan:
    left, parts = list(uuids), []
    for part in plan.nodes:
        uuid = left.pop(0) if part.uuid else None
        if uuid != part.uuid:
            say(f"{uuid} trains in place of {part.uuid}, which another job of yours uses: they are alike")
        parts.append(replace(part, uuid=uuid))
    return replace(plan, nodes=tuple(parts))


@contextlib.contextmanager
def hold_one_each(
    wanted: Sequence[Sequence[str]], say: Callable[[str], None], is_over: Callable[[], bool] = lambda: False
) -> Iterator[list[str] | None]:
    """Hold, inside the block, the first free UUID of each list; all or none, waiting for the rest.

    Reports what it waits for, at once and then every minute.  Yields None when `is_over` becomes true first.  Where
    nothing can be locked, it reports that, and nothing keeps other programs of this user from the GPUs.
    """
    with contextlib.ExitStack() as stack:
        yield wait_for_gpus(
            lambda: _try(wanted, stack, say), lambda: f"{_holders(wanted)}. Ctrl-C ends this", say, is_over
        )


def _try(wanted: Sequence[Sequence[str]], stack: contextlib.ExitStack, say: Callable[[str], None]) -> list[str] | None:
    """One UUID for each, held by the stack; None, and nothing held, where one is lacking."""
    with contextlib.ExitStack() as attempt:
        found: list[str] = []
        for uuids in wanted:
            for uuid in uuids:
                if uuid not in found and _try_lock(uuid, attempt, say):
                    found.append(uuid)
                    break
            else:
                return None
        stack.enter_context(attempt.pop_all())
        return found


def _try_lock(uuid: str, attempt: contextlib.ExitStack, say: Callable[[str], None]) -> bool:
    try:
        folder = _folder(uuid)
        folder.mkdir(parents=True, exist_ok=True)
        attempt.enter_context(locks.hold(folder))
    except locks.FolderLocked:
        return False
    except (OSError, RuntimeError) as error:
        say(f"{uuid} cannot be locked ({error}): nothing keeps your other jobs on this machine from it")
    return True


def _holders(wanted: Sequence[Sequence[str]]) -> str:
    uuids = sorted({uuid for uuids in wanted for uuid in uuids if locks.is_held(_folder(uuid))})
    return ", ".join(f"{uuid} ({locks.holder(_folder(uuid))} trains on it)" for uuid in uuids) or "a GPU"


def _folder(uuid: str) -> Path:
    """Raises RuntimeError where there is no home folder."""
    return cache_folder("gpus", "".join(sign for sign in uuid if sign.isalnum() or sign == "-"))
