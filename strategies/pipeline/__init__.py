"""A model in stages: consecutive decoder layers on each of several machines, one micro-batch behind the other.

stages            start here: makes one stage of a prepared training
passes            a stage's forward and backward passes, generation, the norm over all stages
schedule          the order of a stage's forward and backward passes; pure
cut               load one stage of a model, under the names of the whole
self_check        whether a family's models come out right in stages, before a run trusts it
shortage          memory that runs out on one stage: all stages answer together
sharding          checkpoints of stages are those of the whole
exchange          hidden states and their gradients between neighbours
wire              the form in which they travel
wire_size         their bytes in that form; pure
layer_randomness  random numbers of each layer, whichever process computes it
"""
