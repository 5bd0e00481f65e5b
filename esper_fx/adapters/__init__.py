"""Adapters that others have trained: LoRA checkpoints as PEFT writes them, onto low_rank seeds and back.

May import the model's side (morph, growth, blueprints), torch and, when called, safetensors. Nothing else imports it.
"""

from esper_fx.adapters.checkpoint import adapter_modules
from esper_fx.adapters.load import load_adapter
from esper_fx.adapters.save import save_adapter
from esper_fx.adapters.unload import unload_adapter

__all__ = ["adapter_modules", "load_adapter", "save_adapter", "unload_adapter"]
