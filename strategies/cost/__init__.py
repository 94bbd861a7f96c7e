"""Shared arithmetic of memory and time: a formula a function, its source beside it."""
