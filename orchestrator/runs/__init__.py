"""What is on disk of a run.

mirror_state.py    how far MLflow mirrors a run, and the address of the store
"""
