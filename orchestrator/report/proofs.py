"""What was proven of a run: two ways to the same answer, how far apart they were, how far they may be."""

from __future__ import annotations

from orchestrator.language.catalogue import Translator
from orchestrator.report.blocks import Block, Paragraph, Table
from orchestrator.runs.proofs.proof import read_table
from orchestrator.runs.run_folder import RunFolder
from orchestrator.views.proofs import HEAD, about, numbers, outcome


def proof_blocks(w: Translator, run: RunFolder) -> list[Block]:
    """The table of verify.json; none where nothing was compared."""
    proofs = read_table(run)
    if not proofs:
        return []
    head = (*(w(name) for name in HEAD), w("what was compared"))
    rows = [(w(one.title), outcome(one, w), *numbers(one), about(one, w)) for one in proofs]
    more = Paragraph(w("`orchestrator verify RUN` tries the others, on this run's model, rows and machines."))
    tried = {one.check for one in proofs}
    return [Table(head, rows), *([] if "uneven" in tried else [more])]
