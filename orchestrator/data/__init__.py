"""Files of rows -> tokens with a loss mask -> micro-batches.

Start at sources.py: the data keys of a job -> files -> rows.  folders.py says which files of a folder belong to a
split, files.py opens one and readers/ reads it, row.py is what they give.  contract.py says what becomes of each
column, formats.py makes an example of a row, turns.py reads conversations.  template.py renders and masks examples,
dataset.py tokenises them once into a memory-mapped Arrow file, prepare.py does both for a job and sizes.py guesses
their lengths without either.  order.py says which samples a step sees, packing.py lays them into rows without padding,
batches.py makes tensors of them.
"""
