"""Find the best combination of optimizations: predict all, try few, recommend one.

space.py       which job-file keys may vary, and the points they make
advice.py      what the planner says of every point before anything is tried, and what is not worth trying
sample.py      the part of the data that trials train on
trials.py      the files of a search: what was tried, what came of it
sampling.py    which point is next: the plan's, then Optuna's (the only module that knows Optuna)
tuning.py      Ray Tune runs the trials (the only module that knows it)
recommend.py   trials -> the combination to use, and what the real run will cost with it
study.py       the ready-made list: one factor at a time, and the published defaults
view.py        tables and lines for a person
preparing.py   held-out rows, samples, machines and budget before the first trial
conclusion.py  summary.json and recommended.yaml
running.py     the whole path of a search: start here
"""
