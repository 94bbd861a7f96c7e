"""A model in a worker: loaded, checked, handed back.

loading     start here: loads samples, tokenizer and model
agreement   checks that the exported model is the trained one
devices     the planned GPU in a process that Ray Train did not start
export      the exported folder: weights, tokenizer, generation settings
hand_back   the end of a training: the best weights, exported and checked
kernels     which of the planned attention, packing and loss a model supports
merged      writes base and adapter as one plain model, tensor by tensor or in memory
references  log-probabilities of all answers under the reference, before the first step
tied        merges adapters of a model whose output matrix is its embedding
"""
