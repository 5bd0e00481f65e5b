"""Graph passes: each takes a torch.fx graph and gives one back, one small file per pass.

May import torch.fx, networkx, esper_fx.ops, esper_fx.errors and esper_fx.site; never the engine, the cache or telemetry.
"""
