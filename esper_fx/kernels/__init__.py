"""Triton kernels, one file per operator, forward and backward side by side. They know tensors only.

May import torch and triton. A file with kernels is imported when its operator first runs on a GPU, so that esper_fx works
without triton; ``launch`` and ``rows`` do without it, as does what plans and reports how kernels are compiled ahead of time.
"""
