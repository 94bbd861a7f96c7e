"""What a run does with the bank: look for adapters before it plans, add its own at its end.

Most jobs have no bank: what needs numpy is imported only where there is one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.errors import JobError, OrchestratorError
from orchestrator.job import model_files
from orchestrator.lifecycle.hooks import BankHooks
from orchestrator.planning.plan import InBank
from orchestrator.runs.run_folder import RunFolder
from strategies.adapter_bank.adapter import Unusable
from strategies.adapter_bank.card import BankError
from strategies.adapter_bank.folders import base_digest

if TYPE_CHECKING:  # a job's pydantic models wait for a verb that reads a job
    from orchestrator.job.job_file import Job


def find_adapters(job: Job) -> tuple[InBank, ...]:
    """Adapters of the job's bank for its model that were trained on its very data; loads and fetches no model.

    Their bytes are not read here: the plan only names them, and a later use checks them.
    """
    if not (job.path(job.spec.bank.path) / "objects").is_dir():
        return ()
    from orchestrator.bank.library import bank_of, train_digest

    folder, own = model_files.local_folder(job.spec.model.model_name_or_path, job.folder), train_digest(job)
    if folder is None or own is None:
        return ()
    try:
        bank = bank_of(job)
        cards = bank.of_data(base_digest(folder), own)
    except BankError:  # a model without weights here, no bank there
        return ()
    return tuple(InBank(card.name, str(bank.folder(card.digest)), card.held_out_loss) for card in cards)


def add_adapter(run: RunFolder, job: Job) -> str:
    """What `bank.add` asks for at the end of a run, and what came of it.  Raises JobError where it cannot be."""
    from orchestrator.bank.library import add_run, bank_of

    try:
        card = add_run(bank_of(job, create=True), run)
    except (OrchestratorError, BankError, Unusable, OSError) as error:
        raise JobError(f"bank.add: {error}") from error
    return f"bank.add: {card.name} is in {job.spec.bank.path}"


BANK_HOOKS = BankHooks(find_adapters, add_adapter)
