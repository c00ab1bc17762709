"""Imported by the process that workers are forked from, and by nothing else: it gets ready here."""

from __future__ import annotations

import torch._dynamo
import torch.distributed  # noqa: F401

import zps  # noqa: F401

from . import team  # noqa: F401
from .processes import end_with_parent

# Its children would keep it, and it them.
end_with_parent()
