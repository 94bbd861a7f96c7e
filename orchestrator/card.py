"""The model card that goes with what a run hands back."""

from __future__ import annotations

from orchestrator.jobfile import Job
from orchestrator.rundir import RunFolder


def write_card(run: RunFolder, job: Job) -> None:
    """Write README.md into the exported folder: base, data, method, and the measured quality."""
    folder, result = run.exported(), run.result()
    if folder is None or result is None:
        return
    planned = run.plan().method
    method = ", ".join(f"{key}={value}" for key, value in planned.items() if value is not None)
    lines = [
        "---",
        f"base_model: {job.spec.model.model_name_or_path}",
        f"library_name: {'peft' if folder.name == 'adapter' else 'transformers'}",
        "---",
        f"# {job.spec.name}",
        "",
        f"Tuned from `{job.spec.model.model_name_or_path}` by run `{run.run_id}`.",
        "",
        f"- Method: {method}",
        f"- Data digest: `{result['data_digest']}`",
        f"- Steps: {result['steps']}, supervised tokens: {result['supervised_tokens']}, plan `{result['plan_hash']}`",
        "",
    ]
    handed = result.get("handed_back") or {}
    if handed.get("reason"):
        lines[-1:] = [
            f"- Weights: of step {handed['step']}, the next best; {handed['instead_of']}, which had the lowest held-out"
            f" loss, could not be used ({handed['reason']})",
            "",
        ]
    before, after = result.get("before") or {}, result.get("after") or {}
    if after:
        lines += ["| held-out rows | before | after |", "|---|---|---|"]
        for key, value in after.items():
            if isinstance(value, float) and key != "seconds":
                old = f"{before[key]:.4f}" if key in before else "not measured"
                lines.append(f"| {key} | {old} | {value:.4f} |")
        lines.append("")
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
