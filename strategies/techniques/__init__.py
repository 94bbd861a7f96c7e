"""Techniques that work with any method, one file each.

technique      start here: what a technique states, and how a verdict follows from the cost model
attention      which kernel computes attention
batching       micro-batch, accumulation, grouping by length
checkpointing  gradient checkpointing
compiling      torch.compile
data_shape     packing, and a limit on length
libraries      optional libraries that a technique needs
loss           the loss without all logits at once
offload        weights, optimizer or activations in the host's memory (Ren et al., arXiv 2101.06840)
optimizers     smaller optimizer states
precision      the number format of the forward and backward pass
sharding       ZeRO
"""
