"""What a step need not compute again: beginnings that rows share, and layers that nothing below trains.

tree          start here: which documents share which tokens, and what that spares
attention     attention of a tree's nodes, each seeing itself and what comes before it
lower_layers  what frozen lower layers make of a sample, kept from its first pass
kept_states   where that lies until then: in memory, or on the disk
row           a tree as one row of token ids, with what each document predicts from it
"""
