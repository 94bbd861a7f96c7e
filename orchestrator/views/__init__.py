"""What a terminal shows.

screen    start here: the two consoles that everything is printed on
bank      what a bank holds and what `adapt` and `bank merge` made, for a person
bench     benchmarks as a person reads them, one or two beside each other
machines  machines as a person reads them
plan      a plan as a person reads it
samples   rows as the model sees them
result    results and runs as a person reads them
search    a search as a person reads it
"""
