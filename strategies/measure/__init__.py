"""Measure and trace real training steps: memory, time by part, techniques against each other.

trace       start here: memory of a training step by running it on tensors that have sizes and no content
dissect     where the time of a training step goes
techniques  what a technique really does on this machine
timeline    two steps as a timeline
"""
