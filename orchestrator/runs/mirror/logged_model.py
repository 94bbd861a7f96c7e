"""What a run handed back as an MLflow model, so that its registry and `mlflow models serve` work with it."""

from __future__ import annotations

import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from clusters.safe.masking import masked
from orchestrator.job import model_files
from orchestrator.job.job_file import Job
from orchestrator.runs.condition import export_of
from orchestrator.runs.mirror.store import dataset_name_of, paths_of
from orchestrator.runs.run_folder import RunFolder
from orchestrator.runs.summary.facts import model_name_of

if TYPE_CHECKING:
    from mlflow.models import Model
    from mlflow.tracking import MlflowClient

_CODE = Path(__file__).with_name("served_model.py")
_LIBRARIES = ("mlflow", "torch", "transformers", "peft", "safetensors")
_WEIGHTS = ".safetensors"


def log_model(client: MlflowClient, experiment_id: str, run_id: str, run: RunFolder, job: Job) -> str | None:
    """Send it as `adapter` or `model` of the run; its id, None where PEFT and transformers cannot answer with it.

    Weights are sent from where they lie; they are large and are not copied before.
    """
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    folder = run.exported()
    export = export_of(run)
    writes_text = run.plan().build_objective().writes_text  # what MLflow serves answers prompts
    if folder is None or not writes_text or ("peft" if export.is_adapter else "transformers") in export.cannot:
        return None
    options = {"base": model_name_of(run), **run.plan().method}
    params = {key: str(value) for key, value in options.items() if value is not None}
    logged = client.create_logged_model(
        experiment_id, name=folder.name, source_run_id=run_id, params=params, model_type="causal-lm"
    )
    with tempfile.TemporaryDirectory() as temporary:
        _save(Path(temporary), folder, run, job, Model(run_id=run_id, model_id=logged.model_id))
        client.log_model_artifacts(logged.model_id, str(Path(temporary) / "model"))
    for file in sorted(folder.rglob(f"*{_WEIGHTS}")):
        place = Path("artifacts/export") / file.relative_to(folder).parent
        client.log_model_artifact(logged.model_id, str(file), place.as_posix())
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=run.last_step())])
    _log_scores(client, run_id, logged.model_id, run, job)
    return logged.model_id


def _log_scores(client: MlflowClient, run_id: str, model_id: str, run: RunFolder, job: Job) -> None:
    """What the model came to on the held-out rows, at the model itself and at those rows."""
    result, digest = run.result(), run.data().eval_digest
    paths = paths_of(job.spec.data.eval)
    rows, digest = (dataset_name_of(paths), digest[:36]) if paths and digest else (None, None)
    scores = result.after.scores if result and result.after else {}
    for name, value in scores.items():
        client.log_metric(
            run_id, f"after/{name}", value, step=0, dataset_name=rows, dataset_digest=digest, model_id=model_id
        )


def _save(temporary: Path, folder: Path, run: RunFolder, job: Job, description: Model) -> None:
    """Write MLflow's description and everything but the weights into `temporary`/model, texts without passwords."""
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    copied = temporary / "export"
    shutil.copytree(folder, copied, ignore=shutil.ignore_patterns(f"*{_WEIGHTS}", ".*"))
    for file in copied.rglob("*"):
        _mask(file)
    config = {
        "base": _base(run, job, folder) if export_of(run).is_adapter else "",
        "dtype": run.plan().techniques.dtype,
    }
    prompts, answers = Schema([ColSpec(DataType.string, "prompt")]), Schema([ColSpec(DataType.string)])
    limit = ParamSpec("max_new_tokens", DataType.long, 256)
    mlflow.pyfunc.save_model(
        str(temporary / "model"),
        python_model=str(_CODE),
        artifacts={"export": str(copied)},
        signature=ModelSignature(prompts, answers, ParamSchema([limit])),
        input_example=({"prompt": ["What can you do?"]}, {"max_new_tokens": 64}),
        pip_requirements=[f"{name}=={metadata.version(name).partition('+')[0]}" for name in _LIBRARIES],
        model_config=config,
        mlflow_model=description,
    )


def _base(run: RunFolder, job: Job, folder: Path) -> str:
    """The base's name on the hub, or where it lies here: what it was made from may be a package or a folder."""
    located = Path(run.data().model)
    base = model_files.name_for_others(job, located, folder)
    return str(located.absolute()) if base.is_folder or base.name in model_files.PACKAGED else base.name


def _mask(file: Path) -> None:
    try:
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
    except UnicodeDecodeError:
        return
    if (shown := masked(text)) != text:
        file.write_text(shown, encoding="utf-8")
