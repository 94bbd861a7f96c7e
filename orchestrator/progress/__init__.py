"""How far long work has come, reported to a listener; by default there is none.

updates   start here: `report` in the work, `reporting_to` around it
tally     how fast a phase goes, and what is left of it
"""
