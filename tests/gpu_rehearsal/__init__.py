"""GPU code rehearsed without a GPU: what is stood in for is the hardware and its drivers' tools, never our own code.

cards.py         what nvidia-smi and rocm-smi print on real machines
fake_cuda.py     builds two small libraries (stubs/) and starts a Python whose torch takes fake cuda tensors
fake_device.py   in there: two pretended cards, and a watch that sees what waits for a card and what leaves it
cases.py         combinations of method, technique, number format, attention and card, every possible pair once
inputs.py        the model, the samples and the batches of a case
rehearsal.py     runs the product's set-up, preflight, loop, checkpoint and resume of each case; pieces.py other parts
"""
