"""How sure a difference between two evaluations is.

gains      start here: what a run gained by each metric, with its interval
intervals  intervals of a share of answers, and of a mean difference
"""
