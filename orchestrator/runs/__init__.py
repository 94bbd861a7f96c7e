"""What a run, a search or a bank leaves on disk, and what of it may be trusted.

recorded.py     start here: recorded.json, what a folder was begun with, so that a changed file is known and named
folder.py       a folder whose deciding files are recorded: read as they were written, or refused by name
locks.py        who holds a folder; asking takes nothing
gpu_locks.py    which job of a user has which card of this machine
events.py       the lines of events.jsonl, their types checked
files.py        plan.json, data.json, result.json ...: each parsed once, or refused by name
checkpoints.py  which checkpoints are whole, and which of them is handed back
digests.py      SHA-256 of model files and of what is handed back
mirror_state.py how far MLflow mirrors a run, and the address of the store
condition.py    whether a run is whole and finished, and what is wrong with it
"""
