"""Frozen data that passes between the parts: no torch, no I/O, imports nothing of the project."""
