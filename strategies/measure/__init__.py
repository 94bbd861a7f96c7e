"""Measure and trace real training steps: memory, time by part, techniques against each other.

trace       start here: a step's memory, traced on tensors that have sizes and no content
dissect     where the time of a training step goes
techniques  a technique's measured effect on this machine
timeline    two steps as a timeline
"""
