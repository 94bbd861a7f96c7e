"""Find the best combination of optimizations: predict all, try few, recommend one.

run         start here: the whole path of a search
advice      what is predicted of every point before anything is tried
conclusion  the result of a search, written down: summary.json, and the job to submit
prepare     what a search needs before its first trial
recommend   trials -> the combination to use
sampler     which combination is tried next
study       the ready-made study
subset      the part of the data that trials train on
tuning      the only door to Ray Tune
"""
