"""Find the best combination of optimizations: predict all, try few, recommend one.

run         start here: the whole path of a search
advice      what is predicted of every point before anything is tried
conclusion  the result of a search, written down: summary.json, and the job to submit
prepare     what a search needs before its first trial
recommend   trials -> the combination to use
resident    trials over one base model in one process
sampler     which combination is tried next
session     a search in progress: what it draws, what ended, what is left of its budget
sharing     which trials share a base model, and how many at a time
study       the ready-made study
subset      the part of the data that trials train on
together    the trials that share base models: which train at a time, what becomes of each
trial_run   one trial: set up, trained from rung to rung, reported
tuning      the only door to Ray Tune
"""
