"""LSP-Offload: full-rank training on a small GPU through learned sparse projectors (arXiv 2406.10181).

method         start here: the method of the registry
adam           AdamW's direction of one tensor, by torch's fused kernel
optimizer      AdamW on d x d images in host memory
projector      learned sparse projectors
remote_update  the CPU side on another machine
schedule       three lanes beside the computation, all at work at the same time
sizing         how large a subspace may be before its way over the bus and through the CPU no longer hides behind th
transport      what carries tensors between the device that computes and the host that updates, and counts the bytes
"""
