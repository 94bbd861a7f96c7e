"""Processes that train, measure or evaluate, and how they are launched.

worker      start here: one training worker, from its start to the result
setup       device and group of a worker, the model with the planned method, data, schedule
pace        how fast each worker computes, and the shares that follow
result      what a training came to: counts, times, energy, result.json
baseline    the baseline helper: evaluates the base model on an idle node while the others train
bench       benchmarks a training step and generation on this machine
connections  whether workers can connect to each other directly, before they train
experiment  one trial of a search: a combination of options on a small part of the data
failures    an error that ended a worker, as it is recorded
finished    evaluates and merges what a finished run handed back
gpu_locks   which of a user's programs on this machine trains on which GPU
launch      starts the workers with Ray Train; the only module that imports it
preflight   what would fail hours into a run, tried first
stand_by    reads a stage's tensors on a node that may have to take it over
quality     held-out loss and answers of a model, before and after training
"""
