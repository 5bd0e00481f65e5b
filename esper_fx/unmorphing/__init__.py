"""How unmorph makes a model plain again: plain modules, and bodies folded into weights."""
