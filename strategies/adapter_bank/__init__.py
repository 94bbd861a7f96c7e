"""A bank of trained adapters, and new adapters from old ones without gradients.

store         start here: the bank on disk
adapter       a LoRA adapter as PEFT writes it, read map by map and written whole
algebra       low-rank corrections as vectors: inner products, sums, truncation
card          an adapter's card.json
evidence      what a bank keeps of a data set
exchange      copies adapters from one bank to another
folders       one adapter's folder inside a bank
gguf_adapter  an adapter as GGUF, which llama.cpp adds to its base
generation    the weighted sum of adapters, written as a new one
object_store  copies adapters into a folder of an object store, each once
shares        how much of each adapter: by distances, by labelled rows, or learned from the bank
sparse        adapters of single entries (SHiRA, arXiv 2406.13175), and their merge (arXiv 2507.07140)
trial         adds an adapter's corrections to a model's weights and takes them back, bit by bit
"""
