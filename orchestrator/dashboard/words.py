"""The page's texts in the reader's language."""

from __future__ import annotations

from orchestrator.language.catalogue import Translator


def words_in(w: Translator) -> dict[str, str]:
    """Text by the name that the page's script knows it by; `{0}` is filled in there."""
    return _of_table(w) | _of_run(w)


def _of_table(w: Translator) -> dict[str, str]:
    return {
        "title": w("Runs"),
        "all": w("All runs"),
        "filter": w("Search by name, model or method"),
        "any": w("every state"),
        "none": w("There is no run in {0} yet. `orchestrator submit quickstart` makes one."),
        "no_match": w("No run matches."),
        "run": w("run"),
        "state": w("state"),
        "model": w("model"),
        "method": w("method"),
        "progress": w("progress"),
        "loss": w("loss"),
        "held_out": w("held-out loss"),
        "training_loss": w("training loss"),
        "smoothed": w("smoothed"),
        "time_left": w("time left"),
        "about": w("about {0}"),
        "started": w("started"),
        "step": w("step"),
        "state_running": w("running"),
        "state_finished": w("finished"),
        "state_failed": w("failed"),
        "state_stopped": w("stopped"),
        "state_interrupted": w("interrupted"),
        "state_replanning": w("replanning"),
        "state_damaged": w("damaged"),
        "state_sent": w("on a cluster"),
        "doing_start": w("starting"),
        "doing_training": w("training"),
        "doing_evaluation": w("evaluating"),
        "doing_answers": w("generating answers"),
        "doing_saving": w("saving"),
    }


def _of_run(w: Translator) -> dict[str, str]:
    return {
        "machines": w("Machines"),
        "cluster": w("Machines of the cluster"),
        "asking": w("asking the cluster ..."),
        "stages": w("Stages"),
        "node": w("node"),
        "device": w("device"),
        "share": w("share"),
        "tokens_per_s": w("tokens/s"),
        "busy": w("busy"),
        "busy_part": w("busy {0} of a step, waiting the rest"),
        "computes": w("computes"),
        "waits": w("waits"),
        "memory": w("memory"),
        "sent": w("sent a step"),
        "layers": w("layers"),
        "stage": w("stage"),
        "predicted": w("predicted"),
        "measured": w("measured"),
        "slowest": w("slowest"),
        "slots": w("slots"),
        "does": w("does"),
        "cores": w("cores"),
        "plan": w("What was chosen, and why"),
        "setting": w("setting"),
        "value": w("value"),
        "why": w("why"),
        "ways": w("Other ways"),
        "way": w("way"),
        "time": w("time"),
        "left_out": w("Not used"),
        "phases": w("Phases"),
        "phase": w("phase"),
        "events": w("Events"),
        "logs": w("Log files of the workers"),
        "report": w("Report"),
        "curve": w("Loss"),
        "of_every": w("The lowest and the highest loss of every {0} steps."),
        "no_step": w("No step has been trained yet."),
        "live": w("live"),
        "lost": w("The connection is lost; trying again ..."),
        "trials": w("{0} trials"),
        "sent_to": w("sent to {0}; `orchestrator status {1}` asks there"),
        "gone": w("This run is not there (any more)."),
        "folder": w("folder"),
    }
