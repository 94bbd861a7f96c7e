"""An error that ended a worker, as it is recorded: in one sentence."""

from __future__ import annotations

import re
import traceback

from orchestrator.errors import OrchestratorError
from orchestrator.runs.events import ErrorReport
from orchestrator.runs.run_folder import RunFolder

# Libraries and objects that carry what workers send each other ...
_NETWORK = re.compile(r"gloo|nccl|rccl|tcpstore|\bc10d\b|\bstore\b|process group", re.IGNORECASE)
# ... and their messages when the other side is gone or silent: gloo's pairs, the store, NCCL's watchdog and its
# ncclRemoteError.  Any other message of theirs is an error of this worker.
_LOST = re.compile(
    r"connection (was )?(closed|reset)( by peer)?|broken pipe|connection refused|timed? ?out\b|wait timeout"
    r"|failed to recv, got 0 bytes|connection was likely closed|remote process exit|ncclRemoteError"
    r"|communicator was aborted|heartbeat",
    re.IGNORECASE,
)


def record_failure(run: RunFolder, error: BaseException, node: str) -> None:
    """Record what ended a worker on a node; to be called where it is handled, for its traceback."""
    if isinstance(error, OrchestratorError):
        run.record(ErrorReport(text=str(error), exit_code=error.exit_code, again=error.again))
    else:
        text = describe(error)
        run.record(ErrorReport(text=text, traceback=traceback.format_exc(), exit_code=5, again=True, node=node))


def describe(error: BaseException) -> str:
    """One sentence for an error that ended a worker: the error as it is, or that another worker was lost.

    A lost worker reports its own error, so the network library's words about it are dropped.
    """
    return "another worker stopped answering" if is_lost_worker(error) else f"{type(error).__name__}: {error}"


def is_lost_worker(error: BaseException) -> bool:
    """Whether an error of a collective says that another worker is gone or silent."""
    kinds = [kind.__name__ for kind in type(error).__mro__]
    from_network = any(kind in ("DistError", "DistNetworkError", "DistStoreError") for kind in kinds)
    text = str(error)
    is_network_error = from_network or (isinstance(error, RuntimeError) and _NETWORK.search(text) is not None)
    return is_network_error and _LOST.search(text) is not None
