"""Benchmarks: one file per promise, each run beside its reference and printed as a ratio with its bar.

`python -m benchmarks --list` names them. May import everything; nothing in the package may import this folder.
"""
