"""What a row is, whatever file it came from.

formats      start here: what a row is
columns      the contract for data
guess        which column of a file is what, from its first rows
likeness     which texts say the same, or nearly so
mapping      a row's columns under our names
preferences  rows with a better and a worse answer
row          a row of a data file, and the error for a broken one
turns        the turns of a conversation
"""
