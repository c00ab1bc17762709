"""Every codec by its name."""

from __future__ import annotations

from zps.codec.base import Codec
from zps.codec.bf16 import Bf16
from zps.codec.fp8 import Fp8
from zps.codec.fp16 import Fp16
from zps.codec.int4 import Int4
from zps.codec.int8 import Int8
from zps.codec.none import Plain
from zps.codec.onebit import OneBit
from zps.codec.randk import RandK
from zps.codec.ternary import Ternary
from zps.codec.topk import TopK
from zps.errors import ConfigError

CODECS: dict[str, type[Codec]] = {
    codec.name: codec
    for codec in (Plain, Fp16, Bf16, Fp8, Int8, Int4, OneBit, Ternary, TopK, RandK)
}


def codec(name: str) -> type[Codec]:
    """The codec of this name. Raises ConfigError, listing the names, if there is none."""
    if name not in CODECS:
        raise ConfigError(f"there is no codec {name!r}; the codecs are {', '.join(CODECS)}")
    return CODECS[name]
