"""From a job file to what the user wants.

paths.py    start here: the one door for paths that a person named: exists, kind, readable
"""
