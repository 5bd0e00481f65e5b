"""Checkpoints of a morphed model: what they hold besides tensors, verified and restored before PyTorch copies any."""
