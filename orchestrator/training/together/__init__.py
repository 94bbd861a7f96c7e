"""Several runs in one worker, over one base model.

worker  start here: one worker for several runs, a thread each, of which one runs at a time
seat    a run's place among them: its copy of the base, its passes, its part of the time
"""
