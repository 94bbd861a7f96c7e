"""What a row is, whatever file it came from.

formats  start here: what a row is
columns  the contract for data
row      a row of a data file, and what is said of one that is broken
turns    the turns of a conversation
"""
