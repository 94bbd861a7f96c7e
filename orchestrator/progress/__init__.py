"""How far long work has come, told to whoever shows it: nobody by default.

reached   start here: `report` in the work, `reporting_to` around it
tally     how fast a phase goes, and what is left of it
"""
