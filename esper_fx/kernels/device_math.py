"""Device functions that kernels share: products, activations and their derivatives."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, EXACT: tl.constexpr):
    """``acc + a @ b``, accumulated in float32; EXACT keeps float32 operands whole instead of rounding them to TF32."""
    if EXACT:
        return tl.dot(a, b, acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """identity, relu, gelu (by erf) or silu of float32."""
    if ACTIVATION == 1:
        return tl.where(x > 0, x, 0.0)
    elif ACTIVATION == 2:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == 3:
        return x / (1.0 + tl.exp(-x))
    else:
        return x


@triton.jit
def activate_grad(x, ACTIVATION: tl.constexpr):
    """Derivative of ``activate`` at x, float32."""
    if ACTIVATION == 1:
        return tl.where(x > 0, 1.0, 0.0)
    elif ACTIVATION == 2:
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    elif ACTIVATION == 3:
        sigmoid = 1.0 / (1.0 + tl.exp(-x))
        return sigmoid * (1.0 + x * (1.0 - sigmoid))
    else:
        return tl.where(x > 0, 1.0, 1.0)  # in the layout of x, which Gluon's tl.full would have to be told
