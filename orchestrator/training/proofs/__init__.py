"""Two ways to the same answer, tried in a run's own workers through its own loop: what `verify` runs.

work         start here: what each worker does in place of training
sample       which rows are tried, so that all of it takes about two minutes; pure
trials       short trainings of a few steps from the same weights, each in another layout
handed_back  what a short training writes: loaded again, and merged
"""
