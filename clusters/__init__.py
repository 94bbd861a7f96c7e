"""Facts about machines: what they can do, and how work is started on them.

Imports neither `strategies` nor `orchestrator`.
"""
