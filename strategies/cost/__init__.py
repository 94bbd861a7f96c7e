"""Arithmetic of memory and time: a formula a function, its source beside it.

kept_layers  of cuts about as fast, the one for which the fewest layers move
kernels    what products, attention and experts cost a GPU beyond their FLOPs
memory     start here: bytes of a training step, by part
micro_batches  how a step falls into micro-batches, and how many of them a stage keeps
network    seconds that workers wait for each other's gradients, by transport
pipeline   seconds of a step of stages: simulation, the best cut of layers, the best order of devices
phases     seconds of a job outside of its steps: start, evaluation, saving
plan       a method's footprint and work on one device -> its StrategyPlan
replicas   pipelines beside each other: which devices make one, how many micro-batches it gets
reserved   what a process holds beside its tensors, and the range of the whole
reuse      what need not be computed again: common beginnings, frozen lower layers
stages     what a stage costs on each device by its layers: lines through few estimates
streaming  weights that stay on the host: what of them is where, and what crosses the bus
time       seconds of a training step, by what is waited for
work       what a method computes: trained weights, adapters, weights to cast or expand
"""
