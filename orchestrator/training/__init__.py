"""The training itself, in plain PyTorch.

loop            start here: a training, from its first step to its last
steps           one step: its samples, their gradients, the update
state           what a training is started with, and what its steps change
checkpoint      checkpoints that are complete or not there
determinism     the same bits in every run of a plan, a resumed one included
evaluate        loss and generated answers on held-out rows
feed            micro-batches on the device, the next one made ahead
local_steps     workers train alone for several steps, then average what they changed
memory          memory in use, and ways to run the same samples in less
metrics         scores of generated texts against their references, each in [0, 1]
parallel        sums over the workers
repair          repairs an update that ran out of memory on some workers
shares          how each step is divided among the workers
stops           where a generated answer ends
worker_context  what a process that trains or measures works on
model           the model in a worker: loaded, checked, handed back
together        several runs in one worker, over one base model
proofs          two ways to the same answer, tried in the workers: what `verify` runs
workers         processes that train, measure or evaluate, and how they are launched
"""
