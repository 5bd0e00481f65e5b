"""What PyTorch calls things: classes, modules and attributes without a public name."""

from __future__ import annotations

import torch
from torch import nn
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

__all__ = [
    "CHANNEL_FIRST_LAYERS",
    "CPU_ATTENTION",
    "FUNCTION_HOLDERS",
    "HOOKS",
    "PRESERVED_ATTRIBUTES",
    "SET_GRAD_ENABLED",
    "DataDependentOutputException",
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "OpOverload",
    "OpOverloadPacket",
    "TorchDispatchMode",
    "WeakIdKeyDictionary",
    "pytree",
]


#: What a graph holds where the grad mode is switched.
SET_GRAD_ENABLED = torch._C._set_grad_enabled


#: The fused attention that CPU tensors take.
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


#: Modules that hold PyTorch's functions, the public ones first.
FUNCTION_HOLDERS = (
    "torch.nn.functional",
    "torch",
    "torch.linalg",
    "torch.fft",
    "torch.special",
    "torch.nn.init",
    "torch._C._nn",
    "torch._C._fft",
    "torch._C._linalg",
    "torch._C._special",
    "torch._C",
    "operator",
    "math",
)


#: Layers whose output has its features in dimension 1.
CHANNEL_FIRST_LAYERS: tuple[type[nn.Module], ...] = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
)


HOOKS: frozenset[str] = frozenset(name for name in vars(nn.Module()) if "hooks" in name)
"""The attributes in which modules keep hooks; code that runs in a forward leaves them alone."""


#: Where a GraphModule's `meta` names the plain attributes that a deep copy keeps.
PRESERVED_ATTRIBUTES = "_user_preserved_attributes"
