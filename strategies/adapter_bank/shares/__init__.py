"""How much of each adapter goes into a new one.

distances     how far a data set is from others
coefficients  start here: distances -> shares
selection     moves shares by labelled rows, without gradients
tuning        tunes the shares of each map on labelled rows, with gradients of the shares alone
generator     learned from a bank: what is known of a data set -> shares of each map
decoder       the same by a small convolutional decoder (arXiv 2506.16406)
"""
