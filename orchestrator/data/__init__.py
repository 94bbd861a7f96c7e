"""Files of rows -> tokens with a loss mask -> micro-batches.

files.py reads rows, formats.py recognises what they are, template.py renders and masks them, dataset.py tokenises
them once into a memory-mapped Arrow file, order.py says which samples a step sees, packing.py lays them into rows
without padding.
"""
