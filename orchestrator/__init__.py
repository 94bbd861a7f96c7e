"""Reads a job, plans it, launches it on Ray, watches, tracks and reports.  `run.py` tells the whole path."""

__version__ = "0.1.0"
