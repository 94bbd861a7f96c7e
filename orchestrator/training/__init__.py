"""The training itself, in plain PyTorch.

loop           start here: training, from top to bottom
checkpoint     checkpoints that are whole or not there
determinism    the same bits in every run of a plan, also where one was interrupted
evaluate       held-out rows
feed           micro-batches on the device
local_steps    local steps
metrics        scores of generated texts against the wanted ones, each in [0, 1].
out_of_memory  what a worker does when memory runs out after all
parallel       sums over workers
repair         an update that ran out of memory on some workers
shares         who does how much of each step
stops          where a generated answer ends
model          a model in a worker
workers        processes that train, measure or evaluate, and how they are launched
"""
