"""What a model's round weighs under the settings: every parameter, and the whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table

from zps.codec.plan import Plan
from zps.codec.spec import Compression
from zps.config import Settings, variable
from zps.core.layout import Layout, Param

if TYPE_CHECKING:
    import torch

__all__ = ["Row", "Sizes", "Way", "human_bytes", "measure", "render"]


_UNITS = ("KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True, slots=True)
class Row:
    """One parameter on its way to the hub."""

    parameter: str
    shape: tuple[int, ...]
    dtype: str
    codec: str
    nbytes: int
    """As it is, without padding."""
    encoded_nbytes: int
    """Encoded, without padding; where a parameter is cut, the sum of its pieces."""


@dataclass(frozen=True, slots=True)
class Way:
    """What one worker sends, or gets, in a round; padding included."""

    setting: str
    compression: str
    nbytes: int
    encoded_nbytes: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """A model under its settings."""

    rows: tuple[Row, ...]
    push: Way
    pull: Way
    residual_nbytes: int
    """Memory for error feedback, in every worker."""
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The same as plain lists and dicts."""
        return asdict(self)


def measure(model: torch.nn.Module, settings: Settings) -> Sizes:
    """Lay the model's parameters out as zps.Optimizer does, and encode none of them.

    Raises LayoutError for a model that cannot be trained.
    """
    params = [
        Param(name, tuple(p.shape), str(p.dtype).removeprefix("torch."))
        for name, p in model.named_parameters()
    ]
    names = [param.name for param in params]
    # A bucket holds one dtype: the optimizer declares those of one dtype together.
    layout = Layout.build(sorted(params, key=lambda p: p.dtype), bucket_bytes=settings.bucket_bytes)
    push, pull = (
        Plan.build(layout, codecs, settings.compression_min_bytes)
        for codecs in (settings.push_codecs, settings.pull_codecs)
    )
    return Sizes(
        rows=tuple(_row(push, layout.index[name]) for name in names),
        push=_way("compression", settings.push_codecs, push),
        pull=_way("pull_compression", settings.pull_codecs, pull),
        residual_nbytes=8 * push.residual_elements,  # two buffers of float32
        warnings=(
            *_warnings("compression", settings.push_codecs, names),
            *_warnings("pull_compression", settings.pull_codecs, names),
        ),
    )


def render(sizes: Sizes) -> RenderableType:
    """A table of the parameters, and one of a round."""
    table = Table(title="parameters", title_justify="left")
    for name in ("parameter", "shape", "dtype", "codec"):
        table.add_column(name)
    for name in ("bytes", "encoded", "ratio"):
        table.add_column(name, justify="right")
    for row in sizes.rows:
        shape = " × ".join(map(str, row.shape)) or "scalar"
        style = None if row.nbytes == row.encoded_nbytes else "bold"
        figures = _figures(row.nbytes, row.encoded_nbytes)
        table.add_row(row.parameter, shape, row.dtype, row.codec, *figures, style=style)
    total = Table(title="a round of one worker", title_justify="left")
    for name in ("", "codecs"):
        total.add_column(name)
    for name in ("bytes", "encoded", "ratio"):
        total.add_column(name, justify="right")
    for label, way in (("push", sizes.push), ("pull", sizes.pull)):
        total.add_row(label, way.compression, *_figures(way.nbytes, way.encoded_nbytes))
    if sizes.residual_nbytes:
        total.caption = f"error feedback keeps {human_bytes(sizes.residual_nbytes)} in every worker"
        total.caption_justify = "left"
    return Group(table, total)


def human_bytes(nbytes: float) -> str:
    """ "980 B", "4.00 KiB", "12.3 MiB": three digits and a unit."""
    if nbytes < 1024:
        return f"{nbytes:.0f} B"
    power = 1
    while nbytes >= 1024 ** (power + 1) and power < len(_UNITS):
        power += 1
    value = nbytes / 1024**power
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {_UNITS[power - 1]}"


def _row(plan: Plan, index: int) -> Row:
    param = plan.layout.params[index]
    codec = str(plan.codec_of_param(index))
    encoded = plan.param_nbytes(index)
    return Row(param.name, param.shape, param.dtype, codec, param.nbytes, encoded)


def _way(setting: str, codecs: Compression, plan: Plan) -> Way:
    return Way(variable(setting), str(codecs), plan.layout.arena_bytes, plan.total_bytes)


def _warnings(setting: str, codecs: Compression, names: list[str]) -> Iterator[str]:
    for lost in codecs.unmatched(names):
        yield f"{variable(setting)}: {lost}"


def _figures(nbytes: int, encoded: int) -> tuple[str, str, str]:
    ratio = f"{nbytes / encoded:.2f}" if encoded else "1.00"
    return human_bytes(nbytes), human_bytes(encoded), ratio
