"""Files of rows -> tokens with a loss mask -> micro-batches.

Rows:     sources.py (the job's data keys; start here) folders.py files.py readers/ row.py
Meaning:  contract.py (what becomes of each column) formats.py turns.py
Tokens:   chat.py (what the chat template writes, where each answer is) supervision.py (what it lost: pure)
          template.py (a row's samples) samples.py (cut to length, counted) counts.py (what is said of them: pure)
Kept:     prepare.py dataset.py (tokenised once into a memory-mapped Arrow file); survey.py looks and keeps nothing
Steps:    order.py (which samples a step sees) packing.py (rows without padding) batches.py sizes.py (for a rough plan)
"""
