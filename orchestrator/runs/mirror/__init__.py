"""Trackers as mirrors of run folders; the only room that knows MLflow.

tracking        start here: a run's trackers while it trains, and MLflow brought up to date later
local_trackers  TensorBoard and Weights & Biases, written beside the run
logged_model    what a run handed back as an MLflow model
numbers         events as the numbers that a tracker draws
run_sender      a run's parameters, data, numbers, model and files, sent to MLflow
search_sender   a search as one MLflow run with a nested run a trial
served_model    what `mlflow models serve` runs
state           how far MLflow mirrors a run, kept in the run's tracking.json, and where the mirror stands
store           the place of a run folder in an MLflow store
"""
