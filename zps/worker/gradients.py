"""One gradient on its way into its slot: what it may look like, and the pass that copies it."""

from __future__ import annotations

import torch

from zps import native
from zps.core.layout import Param
from zps.errors import NonFiniteGradient, TensorMismatch

_DTYPE_NAME = {getattr(torch, name): name for name in native.DTYPE}
_DTYPE_ID = {getattr(torch, name): number for name, number in native.DTYPE.items()}


def copy(source: torch.Tensor, slot: torch.Tensor) -> bool:
    """Copy a contiguous gradient into its slot in one pass; whether it is finite."""
    if slot.numel() == 0:
        return True
    _, finite = native.encode(source.data_ptr(), slot.data_ptr(), slot.numel(), dtype_id(slot))
    return finite


def inspect(slot: torch.Tensor) -> bool:
    """Whether a gradient that was written in place is finite."""
    n = slot.numel()
    return n == 0 or native.inspect(slot.data_ptr(), n, dtype_id(slot))[1]


def check_like(param: Param, tensor: torch.Tensor, rank: int) -> None:
    """Raise TensorMismatch unless `tensor` can be the gradient of what was declared."""
    same = tuple(tensor.shape) == param.shape and dtype_name(tensor) == param.dtype
    if not same or tensor.layout != torch.strided:
        raise TensorMismatch(
            f"the gradient of {param.name!r} on rank {rank} is {_describe(tensor)}, "
            f"but {param.dtype} {param.shape} was declared"
        )


def nonfinite(name: str, rank: int) -> NonFiniteGradient:
    """The error for a gradient with NaN or infinity."""
    return NonFiniteGradient(
        f"the gradient of {name!r} on rank {rank} holds NaN or infinity and was not sent. Lower "
        "the learning rate or clip, or set ZPS_NONFINITE=skip to skip such rounds everywhere"
    )


def dtype_id(tensor: torch.Tensor) -> int:
    return _DTYPE_ID[tensor.dtype]


def dtype_name(tensor: torch.Tensor) -> str:
    return _DTYPE_NAME.get(tensor.dtype) or str(tensor.dtype).removeprefix("torch.")


def _describe(tensor: torch.Tensor) -> str:
    sparse = "" if tensor.layout == torch.strided else f" ({tensor.layout})"
    return f"{dtype_name(tensor)} {tuple(tensor.shape)}{sparse}"
