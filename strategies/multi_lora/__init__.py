"""Several LoRA jobs over one base model: their packed rows end to end in one row (mLoRA/ASPEN, arXiv 2312.02515).

Each job keeps a model, an optimizer and a loop of its own; only forward and backward passes are shared, and no gradient
of one job meets another's.

passes       start here: one forward and one backward pass for micro-batches of all jobs that wait
joint_model  the base as every job sees it, and the model in which their rows meet
linear       a frozen linear map with the correction of each job for its own tokens
corrections  those of all jobs of a row, added to its outputs at once
memory       bytes that jobs take together
turns        calls in threads of which one runs at a time
"""
