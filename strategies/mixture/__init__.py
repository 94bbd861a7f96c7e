"""Experts of LoRA behind a router (MixLoRA, arXiv 2404.15159): pairs of A and B beside the maps of each MLP.

method   start here: the method of the registry
experts  an MLP whose tokens choose some of its pairs, and corrections of attention's maps
balance  the loss that keeps experts in use, and how they are used
folder   what training hands back: written, and put onto the base again
"""
