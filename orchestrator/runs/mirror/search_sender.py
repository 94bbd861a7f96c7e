"""A search as one MLflow run with a nested run a trial."""

from __future__ import annotations

import time

from clusters.safe.masking import masked
from orchestrator.runs.mirror.store import STATES, Store
from orchestrator.runs.search_folder import Concluded, SearchFolder, Trial, read_trials

_TRIAL_NUMBERS = (
    *("step_s", "predicted_step_s", "tensors_bytes", "predicted_tensors_bytes"),
    *("tokens_per_s", "seconds", "steps"),
)


class SearchSender(Store):
    def send(self) -> None:
        summary = SearchFolder(self.run.path).summary()
        chosen = summary.recommended if summary else None
        parent = self.open({"kind": "search"})
        outcomes = {outcome.trial: outcome for outcome in (summary.outcomes if summary else ())}
        for trial in read_trials(self.run.path / "trials.jsonl"):
            if str(trial.number) not in self.sent.trials:
                self._send_trial(parent, trial, outcomes.get(trial.number))
        for number, run_id in self.sent.trials.items():
            self.client.set_tag(run_id, "best", str(chosen is not None and int(number) == chosen.trial).lower())
        if chosen:
            for key in ("total_s", "peak_bytes", "cost", "eval_loss"):
                if (value := getattr(chosen, key)) is not None:
                    self.client.log_metric(parent, f"recommended/{key}", value)
            self.client.set_tag(parent, "best_trial", self.sent.trials[str(chosen.trial)])
            self.client.set_tag(parent, "best_combination", chosen.name[:5000])
        for file in sorted(self.run.path.iterdir()):
            if file.is_file() and not file.name.startswith(".") and file.name not in ("stop", "tracking.json"):
                self.send_file(parent, file)
        state = self.run.state()
        if state in STATES:
            found_nothing = state == "finished" and not chosen
            self.client.set_terminated(parent, status="FAILED" if found_nothing else STATES[state])
        self.sent.state = state
        self.sent.keep(self.run)

    def _send_trial(self, parent: str, trial: Trial, outcome: Concluded | None) -> None:
        """One nested run, in two calls: each takes a server 30 ms."""
        from mlflow.entities import Metric, Param

        tags = {"mlflow.parentRunId": parent, "status": trial.status, "node": trial.node}
        tags |= {"reason": trial.reason[:5000]} if trial.reason else {}
        now_s = time.time()
        run_id = self.open_run(self.experiment(), trial.name or f"trial-{trial.number}", tags, now_s - trial.seconds)
        numbers = {
            **trial.quality,
            **{key: getattr(trial, key) for key in _TRIAL_NUMBERS},
            **{f"real/{key}": getattr(outcome, key, None) for key in ("total_s", "peak_bytes", "cost")},
        }
        now_ms = int(now_s * 1000)
        metrics = [Metric(key, float(value), now_ms, 0) for key, value in numbers.items() if value is not None]
        metrics += [Metric("eval_loss", loss, now_ms, step) for step, loss in trial.curve]
        params = [Param(key, masked(str(value))[:6000]) for key, value in trial.point.items()]
        self.client.log_batch(run_id, metrics=metrics, params=params)
        self.client.set_terminated(run_id, status="FAILED" if trial.status == "failed" else "FINISHED")
        self.sent.trials[str(trial.number)] = run_id
        self.sent.keep(self.run)
