"""What a row is, whatever file it came from.

formats      start here: what a row is
columns      the contract for data
preferences  rows with a better and a worse answer
row          a row of a data file, and the error for a broken one
turns        the turns of a conversation
"""
