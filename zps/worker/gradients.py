"""One gradient on its way into its slot: what it may look like, and the pass that copies it."""

from __future__ import annotations

import torch

from zps import native
from zps.errors import NonFiniteGradient, TensorMismatch

_DTYPE_ID = {getattr(torch, name): number for name, number in native.DTYPE.items()}


def encode(gradient: torch.Tensor, slot: torch.Tensor) -> bool:
    """Copy a gradient into its slot in one pass, from wherever it is; whether it is finite."""
    if slot.numel() == 0:
        return True
    source = gradient.detach().cpu().contiguous()
    _, finite = native.encode(source.data_ptr(), slot.data_ptr(), slot.numel(), dtype_id(slot))
    return finite


def inspect(slot: torch.Tensor) -> bool:
    """Whether a gradient that was written in place is finite."""
    n = slot.numel()
    return n == 0 or native.inspect(slot.data_ptr(), n, dtype_id(slot))[1]


def check_like(name: str, slot: torch.Tensor, tensor: torch.Tensor, rank: int) -> None:
    """Raise TensorMismatch unless `tensor` can be the gradient of what was declared as `name`."""
    if tensor.shape != slot.shape or tensor.dtype != slot.dtype or tensor.layout != torch.strided:
        raise TensorMismatch(
            f"the gradient of {name!r} on rank {rank} is {_describe(tensor)}, "
            f"but {_describe(slot)} was declared"
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
    return str(tensor.dtype).removeprefix("torch.")


def _describe(tensor: torch.Tensor) -> str:
    sparse = "" if tensor.layout == torch.strided else f" ({tensor.layout})"
    return f"{dtype_name(tensor)} {tuple(tensor.shape)}{sparse}"
