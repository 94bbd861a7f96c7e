"""MLflow as a mirror of run folders.

tracking  start here: MLflow as a mirror of the run folder
state     how far MLflow mirrors a run, kept in the run's tracking.json, and where the mirror stands
"""
