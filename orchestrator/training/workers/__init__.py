"""Processes that train, measure or evaluate, and how they are launched.

worker      start here: one training worker
baseline    what a machine that does not train does meanwhile
bench       runtime benchmarks on this machine, in this process
experiment  one combination of optimizations on a small part of the data
failures    what is told of an error that ended a worker
finished    what can be done with a finished run
gpu_locks   which of a user's programs on this machine trains on which GPU
launch      the only door to Ray Train
preflight   what would fail hours into a run, done first
quality     how good a model is on held-out rows
"""
