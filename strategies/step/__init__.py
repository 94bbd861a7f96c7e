"""One training step on real tensors: the loss, the update, attention, memory.

step                start here: one optimizer step, in two halves
activation_offload  saved activations wait in pinned host memory
device_memory       a GPU's allocator: segments that grow, and the limit that the plan was made for
document_attention  attention over documents packed in one row, each seeing only itself
host_memory         keep freed memory in the process instead of returning it to the kernel after every operation
optimizers          build the optimizers that a job names as Hugging Face does
out_of_memory       memory that runs out: free what can be freed, try again with less
passes              micro-batches through the model, one after the other
quantise            quantised weights: made on a GPU for the host's memory, and kept in the layout that trains
side_stream         copies between a GPU and pinned host memory beside the computation
state               gather a training's state for a checkpoint, and put it back
streamed_output     an output matrix on the host, whose slices visit the device
supervised_logits   the loss at supervised positions only
thread_waits        waiting threads spin, or sleep at once while other programs want the cores
weight_stream       frozen weights on the host, which visit the device layer by layer
"""
