"""Adapters that exist already, and what can be made of them without gradients.

store         start here: the bank on disk
adapter       a LoRA adapter as PEFT writes it, read map by map and written whole
algebra       adapters as vectors
card          what is known of an adapter, as its card.json says it
coefficients  distances -> how much of each adapter
distances     how far a data set is from others
evidence      what a bank keeps of a data set
exchange      adapters from one bank to another
folders       one adapter's folder as a bank keeps it
generation    an adapter for a new data set
selection     shares moved on by labelled rows, without gradients
sparse        adapters that are some entries of the weights (SHiRA, arXiv 2406.13175), and their merge (arXiv 2507.0
trial         a model with an adapter's corrections in its weights, and back again, bit by bit
"""
