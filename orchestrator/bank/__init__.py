"""Adapters of finished runs: kept, adapted to new data, merged, continued, evaluated.

library            start here: between runs and the bank
adapt              `adapt`
adapter_trial      a base model on which adapters are tried, one after the other, by their loss on labelled rows
continue_training  training on from what the bank made, and how many steps that saves
evaluate           how good a bank is at tasks it has not seen
merge              `bank merge`
"""
