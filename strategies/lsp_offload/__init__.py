"""LSP-Offload: full-rank training on a small GPU through learned sparse projectors (arXiv 2406.10181).

projector.py   the maths of a subspace         schedule.py    lanes beside the computation
optimizer.py   AdamW on images in host memory  transport.py   the bus, emulated
"""
