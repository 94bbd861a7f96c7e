"""Adapters of finished runs: keep, adapt to new data, merge, continue, evaluate.

library            start here: adapters of runs and folders into the bank
hooks              what a run does with the bank: look for adapters before it plans, add its own at its end
likeness           whether the bank holds anything like a data set
build              `bank build`: an adapter for each data set of a folder
choosing           how much of each adapter: by data, then moved and tuned by labelled rows
adapt              `adapt`: an adapter for a job's data out of the bank, judged on labelled rows
adapter_trial      a base model and the loss of adapters on it, one after the other
continue_training  `adapt --then-train`: a warm start from what the bank made, and the steps that saves
evaluate           `bank evaluate`: how good a bank is at tasks it has not seen
left_out           the losses of such tasks, kept one by one
generator          shares learned from the bank, and the verdict on them
merge              `bank merge`: several adapters as one
"""
