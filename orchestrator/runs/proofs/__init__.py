"""Proofs that two ways to the same answer agree, on a run's own model, rows and machines, as its record holds them.

proof  start here: one comparison with its difference and tolerance, and the table of a run
"""
