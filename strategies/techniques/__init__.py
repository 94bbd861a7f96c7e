"""Switches that work with any method, one file each.

technique      start here: what every technique says of itself, and how a verdict comes out of the cost model
attention      which kernel computes attention
batching       how many samples go through the model together
checkpointing  gradient checkpointing
compiling      torch.compile
data_shape     what is fed
libraries      optional libraries that a technique needs
loss           the loss without all logits at once
offload        keeping in the host's memory what a GPU has no room for (Ren et al., arXiv 2101.06840)
optimizers     smaller optimizer states
precision      the number format of the forward and backward pass
sharding       ZeRO
"""
