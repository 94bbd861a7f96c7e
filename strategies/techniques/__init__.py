"""Switches that work with any method, one room each."""
