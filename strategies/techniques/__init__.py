"""Techniques that work with any method.

technique      start here: what a technique states, and how a verdict follows from the cost model
attention      which kernel computes attention
catalogue      reads catalogue.toml, which holds what each technique states
changes        what a technique changes where switches alone do not say it
checkpointing  gradient checkpointing
embedding_noise  NEFTune: noise on the embeddings of training rows
lora_algebra   a linear map and its low-rank correction as one function
lora_forms     the orders in which those can be multiplied out, and the cheapest
liger          Liger's kernels in a model that is loaded
libraries      optional libraries that a technique needs
precision      the number format of the forward and backward pass
refusals       what a device, its libraries or the model's layers rule out
sharding       which keys of DeepSpeed's configuration the plan decides
"""
