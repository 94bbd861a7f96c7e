"""`verify`: two ways to the same answer, tried on a job's own model, rows and machines.

prove  start here: a job or a run -> its workers, started for a few steps -> the table
"""
