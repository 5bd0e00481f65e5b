"""How morph makes a model one that can grow: copies, scopes, drafts, and what was changed, so that it can be taken back."""
