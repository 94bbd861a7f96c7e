"""Measure machines: what one can do, and how fast two are connected.

node            start here: the capability of this machine, measured once and remembered
gpu_links       measure what the GPUs of this machine exchange, every pair once
link            measure the network between two machines with one plain TCP stream
machine         look at this machine
measure         measure this machine
measure_device  measure one device with PyTorch
"""
