"""`bench RUN --serve`: how fast servers of ours answer, measured as their clients see it.

benchmark  start here: engines side by side; base, adapter and the two merged; adapters mixed and grouped
load       clients that send requests and time the answers
options    what is to be measured
prompts    a run's held-out prompts, or random tokens
result     what was found, as its file holds it
"""
