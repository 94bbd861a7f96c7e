"""Adapters that were trained already, and what can be made of them without gradients.

adapter.py       a LoRA adapter as PEFT writes it, read and written map by map
algebra.py       sums and merges of adapters in delta space, dW = B A
sparse.py        adapters that are some entries of the weights (SHiRA), and their merge
evidence.py      what a bank keeps of a data set: token counts, a sketch of its embeddings
distances.py     how far two data sets are from each other
coefficients.py  distances -> how much of each adapter
generation.py    an adapter for a new data set, in one pass over the bank
card.py          what is known of an adapter
folders.py       one adapter's folder in a bank: read, checked against its digest, written whole
store.py         the bank on disk: content-addressed folders
exchange.py      adapters from one bank to another, as a tar
"""
