"""A run's parameters, data, numbers, model and files, sent to MLflow as far as they are not there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from clusters.safe.masking import masked
from orchestrator.job.job_file import flat
from orchestrator.planning.plan import settings_of
from orchestrator.runs.mirror.logged_model import log_model
from orchestrator.runs.mirror.numbers import numbers_of
from orchestrator.runs.mirror.store import STATES, Store, dataset_name_of, paths_of
from strategies.export import EXPORT_FOLDERS

_A_CALL = 500  # numbers
_LONGEST = 6000  # characters of a parameter
_COLUMNS = [{"name": "input_ids", "type": "list<int32>"}, {"name": "supervised", "type": "list<bool>"}]


class RunSender(Store):
    def send(self, state: str) -> None:
        """Everything that is new; a run in an end state also with its model and its files."""
        run_id = self.open({})
        if not self.sent.has_params:
            self._send_params(run_id)
            self._send_data(run_id)
        ended = self._send_numbers(run_id)
        if state in STATES:
            self._send_model(run_id)
            self._send_files(run_id)
            self.client.set_terminated(run_id, status=STATES[state], end_time=ended)
        elif self.sent.state != state:  # it ended before, and was resumed
            self.client.update_run(run_id, status="RUNNING")
        self.sent.state = state
        self.sent.keep(self.run)

    def _send_params(self, run_id: str) -> None:
        """What the job states, and what the plan decided; the other keys have their defaults."""
        from mlflow.entities import Param

        plan = self.run.plan()
        params = flat(self.job.spec.model_dump(exclude_unset=True))
        params |= {f"plan.{key}": value for key, value in settings_of(plan).items()} | {"plan.hash": plan.hash}
        entities = [Param(key, masked(str(value))[:_LONGEST]) for key, value in params.items()]
        for start in range(0, len(entities), 100):
            self.client.log_batch(run_id, params=entities[start : start + 100])
        self.sent.has_params = True

    def _send_data(self, run_id: str) -> None:
        """The tokenised rows as inputs: name, digest, columns, counts."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        if not (self.run.path / "data.json").exists():
            return
        data, spec = self.run.data(), self.job.spec.data
        schema = json.dumps({"mlflow_colspec": [column | {"required": True} for column in _COLUMNS]})
        sources = [("training", spec.train, data.train_digest), ("evaluation", spec.eval, data.eval_digest)]
        inputs = []
        for context, stated, digest in sources:
            if not (paths := paths_of(stated)) or not digest:
                continue
            text = masked(", ".join(paths))
            profile = json.dumps(data.statistics) if context == "training" and data.statistics else None
            where = json.dumps({"uri": text})
            dataset = Dataset(dataset_name_of(paths), digest[:36], "local", where, schema=schema, profile=profile)
            inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))
        if inputs:
            self.client.log_inputs(run_id, inputs)

    def _send_numbers(self, run_id: str) -> int | None:
        """Numbers that are not there yet; when the last event was recorded, in ms since the epoch."""
        from mlflow.entities import Metric

        events, offset = self.run.events(self.sent.offset)
        numbers = numbers_of(events, self.run.plan, self.sent.members)
        metrics = [Metric(one.name, one.value, int(1000 * one.time), one.step) for one in numbers]
        for start in range(0, len(metrics), _A_CALL):
            self.client.log_batch(run_id, metrics=metrics[start : start + _A_CALL])
        self.sent.offset = offset
        self.sent.keep(self.run)
        return int(1000 * events[-1].time) if events and events[-1].time else None

    def _send_model(self, run_id: str) -> None:
        """What was handed back as a model of the registry's kind, once.  A server before MLflow 3 knows none."""
        from mlflow.exceptions import MlflowException

        handed = self.run.result() and self.run.exported()
        if not handed or self.sent.model_id:
            return
        try:
            self.sent.model_id = log_model(self.client, self.experiment(), run_id, self.run, self.job)
        except MlflowException as error:
            if error.error_code != "ENDPOINT_NOT_FOUND":
                raise
        self.sent.keep(self.run)

    def _send_files(self, run_id: str) -> None:
        """The run folder without checkpoints, caches, lock files, and a model that was sent as one."""
        for file in self._files():
            relative = file.relative_to(self.run.path)
            folder = relative.parent.as_posix() if len(relative.parts) > 1 else None
            self.send_file(run_id, file, folder)

    def _files(self) -> Iterator[Path]:
        excluded = ("checkpoints", "stop", "tensorboard", "wandb", *(EXPORT_FOLDERS if self.sent.model_id else ()))
        for file in sorted(self.run.path.rglob("*")):
            parts = file.relative_to(self.run.path).parts
            if file.is_file() and parts[0] not in excluded and not any(part.startswith(".") for part in parts):
                yield file
