"""The torch.compile backend: programs, plans, regions, variants and the swap.

May import passes, cache, ops and settings; of the models it sees only what growth hands it.
"""
