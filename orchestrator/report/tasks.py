"""Public tasks in a run's report: base and tuned model, and how sure the difference is."""

from __future__ import annotations

from orchestrator.language.catalogue import Translator
from orchestrator.report.blocks import Block, Paragraph, Table
from orchestrator.runs.run_folder import RunFolder
from orchestrator.runs.tasks.task_score import read_tasks
from orchestrator.views.tasks import HEAD, cells, how_judged


def task_blocks(w: Translator, run: RunFolder) -> list[Block]:
    """The table of lm_eval.json; none where nothing was measured."""
    scores = read_tasks(run)
    if not scores:
        return []
    head, rows = tuple(w(name) for name in HEAD), [cells(one, w) for one in scores]
    limits = sorted({one.limit for one in scores if one.limit})
    limited = [Paragraph(w(f"No more than {', '.join(map(str, limits))} rows of a task."))] if limits else []
    return [Table(head, rows), Paragraph(w(how_judged(scores))), *limited]
