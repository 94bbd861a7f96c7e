"""LSP-Offload: full-rank training on a small GPU through learned sparse projectors (arXiv 2406.10181).

method         start here: the registry's method, what it costs and how it sets a model up
adam           AdamW's direction of one tensor by torch's fused kernel, and stochastic rounding to bfloat16
optimizer      AdamW on d x d images in host memory
projector      learned sparse projectors
remote_update  updating images on another machine
schedule       three lanes beside the computation: device to host, CPU update, host to device
sizing         the largest subspace whose way over the bus and through the CPU hides behind the computation
transport      moves tensors between the device and the host, and counts the bytes
weights        the weights that are projected, and when their projectors are fitted
"""
