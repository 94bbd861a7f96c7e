"""A memory of rows beside an MLP: rows on the host, router on the device (MEFT, arXiv 2406.04984).

method     start here: the method of the registry
costs      rows, bytes and seconds of a step, before anything runs
folder     what training hands back: written, and put onto the base again
layer      a memory beside an MLP: which rows each token reads, and what they add
observers  what looks at tokens before training: routers are calibrated, a background is counted
optimizer  AdamW on rows in host memory: they come for a pass, their gradients go back
product    what chosen rows add to each token, and its gradients
router     product keys: which rows a token reads
row_adam   AdamW of single rows, each with its own number of steps
slots      the rows that are specific to new data: how often they are read here, how rarely elsewhere
"""
