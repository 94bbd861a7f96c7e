"""Structured pruning while LoRA trains: what is handed back is a smaller plain model (LoRAPrune, arXiv 2305.18403).

method    start here: the registry's method, what it costs and how it sets a model up
groups    what may be removed together: channels of an MLP, key-value groups, whole layers
schedule  how much is removed after which step
masks     masks over a model's groups, as hooks and as what a checkpoint holds
scores    how much the loss depends on each group: by LoRA's gradients, magnitude, learned gates
between   what the method does between steps: scores are averaged, masks move
slicing   the model without what is masked: base and correction, sliced
"""
