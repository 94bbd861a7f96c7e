"""One training step on real tensors: the loss, the update, attention, where memory lies.

step                 start here: one optimizer step, in two halves
activations_on_host  what the backward pass needs waits in pinned host memory
device_memory        a GPU's memory as one process may use it
document_attention   attention over documents laid end to end in one row, each seeing only itself
host_memory          keep freed memory in the process instead of giving it back to the kernel after every operation
optimizers           the optimizers a method may ask for by their Hugging Face names
side_stream          copies between a GPU and pinned host memory beside the computation
state                what a training has come to
supervised_logits    the loss at supervised positions only
thread_waits         let a thread that waits sleep soon
"""
