"""How a job lives: from its start to its end, and on after a crash.

verification.py    what a run may rely on when it goes on
ending.py          what follows the training, step by step: the card, the bank, the tracking
"""
