"""A model in a worker: loaded, checked, handed back.

loading    start here: what a worker reads before it trains
agreement  whether what is handed back is what was trained
devices    the planned GPU in a process that Ray Train did not start
export     what a run hands back
hand_back  the end of a training
kernels    what a model on this machine really supports of the planned attention, packing and loss
tied       merging adapters of a model whose output matrix is its embedding
"""
