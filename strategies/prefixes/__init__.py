"""Rows that begin alike, computed once: a tree of token ids and attention over it.

tree        start here: which documents share which tokens, and what that spares
attention   attention of a tree's nodes, each seeing itself and what comes before it
row         a tree as one row of token ids, with what each document predicts from it
"""
