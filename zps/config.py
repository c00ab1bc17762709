"""Every setting of zps: one frozen object, and the only place that reads `ZPS_*` as settings.

A setting comes from, first found wins: a keyword argument, a `ZPS_*` variable, `zps.toml` in the
current folder (or the file that `ZPS_CONFIG` names; /dev/null for none), its default.
`Settings.source` tells which. Everything below this file is handed a `Settings`, or the few values
it needs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ByteSize,
    Field,
    PrivateAttr,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)
from typing_extensions import Self

from zps.codec.spec import Compression
from zps.core import address
from zps.errors import CompressionSyntaxError, ConfigError

__all__ = ["CONFIG_FILE", "CONFIG_VARIABLE", "PREFIX", "Settings", "variable"]

PREFIX = "ZPS_"
CONFIG_FILE = "zps.toml"
CONFIG_VARIABLE = "ZPS_CONFIG"

#: ZPS_ variables that are not settings, so that they are not taken for misspelt ones.
OTHER_VARIABLES = (CONFIG_VARIABLE,)

ARGUMENT = "argument"
DEFAULT = "default"

#: Of both compressions together: a worker tells the hub in a header of at most 4 KiB.
MAX_CODECS_BYTES = 3000

_BYTE_SIZE = TypeAdapter(ByteSize)


def variable(name: str) -> str:
    """The environment variable of the setting `name`: "mode" -> "ZPS_MODE"."""
    return PREFIX + name.upper()


def _bytes(value: object) -> int:
    """A plain number of bytes, or text such as "4MiB", "512 KiB", "1.5MB"."""
    if isinstance(value, bool):
        raise ValueError("must be a number of bytes, or text such as '4MiB'")
    try:
        return int(_BYTE_SIZE.validate_python(value))
    except ValidationError:
        raise ValueError("must be a number of bytes, or text such as '4MiB'") from None


Bytes = Annotated[int, BeforeValidator(_bytes)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _default_runtime_dir() -> Path:
    return Path(f"/tmp/zps-{os.getuid()}")


class Settings(BaseSettings):
    """All settings of one process; frozen, so it can be passed anywhere.

    `Settings.load(...)` looks at arguments, environment and file; `Settings(...)` at its arguments
    alone. Both raise ConfigError naming what is wrong, where it came from, and what is allowed.
    """

    model_config = SettingsConfigDict(frozen=True, extra="forbid")

    # Who and where
    hub: str | None = Field(None, description="hub addresses, comma-separated; none: start one")
    rank: int | None = Field(None, ge=0, description="this worker's number, from 0")
    world_size: int | None = Field(None, ge=1, description="number of workers in the job")
    nodes: int | None = Field(
        None, ge=1, description="machines with world_size / nodes workers each"
    )
    node_rank: int | None = Field(None, ge=0, description="this machine's number, from 0")
    node_hub: bool = Field(
        False, description="workers of this machine share a hub, which is one worker of `hub`"
    )
    job: str = Field("default", min_length=1, max_length=128, description="name of the job")

    # How rounds close
    mode: Literal["bsp", "ssp", "async"] = Field(
        "bsp", description="bsp: in step; ssp: at most `staleness` rounds apart; async: never wait"
    )
    staleness: int = Field(
        1, ge=0, description="ssp: rounds a worker may lead by; policy drop: versions it may lag by"
    )
    quorum: float = Field(
        1.0, gt=0, le=1, description="bsp: share of the members whose gradients close a round"
    )
    staleness_policy: Literal["none", "inverse", "drop", "dc"] = Field(
        "none", description="stale gradients: as they are, smaller lr, dropped, delay-compensated"
    )
    staleness_alpha: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="inverse: lr / (1 + alpha * staleness)"
    )
    dc_lambda: float = Field(
        0.04, ge=0, allow_inf_nan=False, description="dc: strength of the compensation"
    )

    # What travels
    compression: str = Field(
        "none", description="codecs of gradients, such as 'int8; *.bias=none; embed.*=topk'"
    )
    pull_compression: str = Field(
        "none", description="codecs of weights on their way back, written likewise"
    )
    compression_min_bytes: Bytes = Field(
        4096, ge=0, description="tensors smaller than this travel as they are"
    )
    bucket_bytes: Bytes = Field(
        4 * 2**20, ge=4096, multiple_of=64, description="size of a bucket, such as 4MiB"
    )
    pull: Literal["auto", "alias", "copy"] = Field(
        "auto", description="weights on one node: views of the hub's, or copies; auto: by mode"
    )
    link: Literal["auto", "shm", "message"] = Field(
        "auto", description="way to the hub: shared memory or messages; auto: by host"
    )
    hub_buffer_bytes: Bytes = Field(
        64 * 2**20,
        ge=4096,
        description="received gradients that a hub holds at a time, besides a bucket a worker",
    )
    nonfinite: Literal["raise", "skip", "allow"] = Field(
        "raise", description="a gradient with NaN or infinity: error, skip the round, push it"
    )

    # Time, and what happens when somebody dies
    timeout_s: Positive = Field(60.0, description="longest wait for the others, seconds")
    connect_timeout_s: Positive = Field(10.0, description="longest wait for a hub, seconds")
    min_workers: int = Field(1, ge=1, description="fewest live workers that may go on")
    on_death: Literal["shrink", "wait", "abort"] = Field(
        "shrink", description="a worker dies: go on without, wait for a replacement, stop"
    )

    # The hub and the machine
    hub_threads: int | None = Field(
        None, ge=1, description="threads of the hub's kernels; none: one per core"
    )
    optimizers: str | None = Field(
        None, description="optimizer classes the hub may import beyond torch.optim, comma-separated"
    )
    spin_us: int = Field(
        20, ge=0, le=10_000, description="busy wait before a waiter sleeps, microseconds"
    )
    insecure: bool = Field(
        False, description="listen beyond this machine without encryption: anyone may join"
    )
    runtime_dir: Path = Field(
        default_factory=_default_runtime_dir, description="folder of the ipc sockets, mode 0700"
    )
    checkpoint_dir: Path | None = Field(
        None, description="reserved for the hub's checkpoints; must stay unset"
    )
    key_dir: Path | None = Field(None, description="reserved for encryption keys; must stay unset")
    trace: Path | None = Field(
        None, description="where each process writes the spans of its work, such as run.json"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severe message that is logged"
    )

    _sources: dict[str, str] = PrivateAttr(default_factory=dict)

    def __init__(self, *, _sources: Mapping[str, str] | None = None, **values: Any) -> None:
        sources = dict.fromkeys(values, ARGUMENT) | dict(_sources or {})
        _check_names(values, type(self).model_fields, "setting")
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError("\n".join(_explain(error, sources))) from None
        self._sources = sources

    @classmethod
    def load(cls, *, environ: Mapping[str, str] | None = None, **values: Any) -> Self:
        """Settings from `values`, then `environ` (None: the process's own), file and defaults.

        An argument that is None, and a variable that is empty, count as not given.
        Raises ConfigError for a misspelt or invalid name or value, wherever it came from.
        """
        environ = os.environ if environ is None else environ
        _check_names(values, cls.model_fields, "setting")
        arguments = {name: value for name, value in values.items() if value is not None}
        variables = _Environment(cls, environ)()
        origin, file = _read_file(cls, environ)
        merged = file | variables | arguments
        sources = (
            dict.fromkeys(file, origin)
            | {name: variable(name) for name in variables}
            | dict.fromkeys(arguments, ARGUMENT)
        )
        if "runtime_dir" not in merged and (own := _user_runtime_dir(environ)) is not None:
            merged["runtime_dir"] = own
            sources["runtime_dir"] = DEFAULT
        return cls(_sources=sources, **merged)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        *_others: PydanticBaseSettingsSource,
        **_more: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments only: `load` reads the other sources, and remembers which one gave what."""
        return (init_settings,)

    def source(self, name: str) -> str:
        """Where the value of `name` came from: "argument", "ZPS_MODE", "zps.toml", "default"."""
        _check_names([name], type(self).model_fields, "setting")
        return self._sources.get(name, DEFAULT)

    def explicit(self) -> dict[str, Any]:
        """The settings that somebody chose, by name: all whose source is not the default."""
        return {
            name: getattr(self, name)
            for name in type(self).model_fields
            if self.source(name) != DEFAULT
        }

    def to_env(self) -> dict[str, str]:
        """`ZPS_*` variables that give a child process the explicit settings of this one."""
        return {
            variable(name): str(value)
            for name, value in self.explicit().items()
            if value is not None
        }

    def replace(self, **changes: Any) -> Self:
        """A checked copy with some settings changed; `model_copy` would check nothing."""
        kept = {name: value for name, value in self._values() if name not in changes}
        sources = {name: self.source(name) for name in kept}
        return type(self)(_sources=sources, **kept, **changes)

    @property
    def hubs(self) -> tuple[str, ...]:
        """The addresses in `hub`, in order; empty when a hub is still to be started."""
        return address.split(self.hub) if self.hub else ()

    @property
    def ranks_here(self) -> range | None:
        """The ranks of a node hub's own workers; None for a hub of all of them."""
        if not self.node_hub or None in (self.world_size, self.nodes, self.node_rank):
            return None
        assert self.world_size is not None
        assert self.nodes is not None
        assert self.node_rank is not None
        count = self.world_size // self.nodes
        return range(self.node_rank * count, (self.node_rank + 1) * count)

    @property
    def optimizer_classes(self) -> tuple[str, ...]:
        """The import paths in `optimizers`, in order."""
        return tuple(_items(self.optimizers))

    @property
    def push_codecs(self) -> Compression:
        """What `compression` means: the codec of each parameter's gradient."""
        return Compression.parse(self.compression)

    @property
    def pull_codecs(self) -> Compression:
        """What `pull_compression` means: the codec of each parameter's weights."""
        return Compression.parse(self.pull_compression, weights=True)

    @property
    def drop_over(self) -> int | None:
        """Staleness above which a gradient is dropped; None when the policy is another."""
        return self.staleness if self.staleness_policy == "drop" else None

    def _values(self) -> Iterator[tuple[str, Any]]:
        return ((name, getattr(self, name)) for name in type(self).model_fields)

    @field_validator("hub")
    @classmethod
    def _check_hub(cls, value: str | None) -> str | None:
        if value:
            address.split(value)
        return value

    @field_validator("optimizers")
    @classmethod
    def _check_optimizers(cls, value: str | None) -> str | None:
        for path in _items(value):
            if "." not in path or not all(part.isidentifier() for part in path.split(".")):
                raise ValueError(f"{path!r} is no import path; write package.module.Class")
        return value

    @field_validator("compression", "pull_compression")
    @classmethod
    def _check_codecs(cls, value: str, info: ValidationInfo) -> str:
        # Hub and worker compare texts: two that mean the same must be the same.
        return str(Compression.parse(value, weights=info.field_name == "pull_compression"))

    @field_validator("checkpoint_dir", "key_dir")
    @classmethod
    def _check_unused(cls, value: Path | None) -> Path | None:
        if value is not None:  # silence would be taken for a promise
            raise ValueError("is not used by this version yet; leave it unset")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.world_size is not None:
            if self.rank is not None and self.rank >= self.world_size:
                raise ValueError(f"rank={self.rank} must be below world_size={self.world_size}")
            if self.min_workers > self.world_size:
                raise ValueError(
                    f"min_workers={self.min_workers} must not exceed world_size={self.world_size}"
                )
        if self.staleness_policy == "dc" and self.pull == "alias":
            raise ValueError("staleness_policy='dc' needs pull='copy': what a worker computed on")
        codecs_bytes = sum(len(t.encode()) for t in (self.compression, self.pull_compression))
        if codecs_bytes > MAX_CODECS_BYTES:
            raise ValueError(
                f"compression and pull_compression have {codecs_bytes} bytes together, and "
                f"{MAX_CODECS_BYTES} fit into a message; name several parameters with one pattern"
            )
        if self.quorum < 1 and self.mode != "bsp":
            raise ValueError(f"quorum={self.quorum} needs mode='bsp', not {self.mode!r}")
        self._check_nodes()
        return self

    def _check_nodes(self) -> None:
        nodes, world = self.nodes or 1, self.world_size
        if self.node_rank is not None and self.node_rank >= nodes:
            raise ValueError(f"node_rank={self.node_rank} must be below nodes={self.nodes}")
        if world is not None and world % nodes:
            raise ValueError(
                f"world_size={world} must be a multiple of nodes={nodes}: every node has as many "
                "workers"
            )
        if not self.node_hub:
            return
        if self.mode != "bsp" or self.quorum < 1:
            raise ValueError(
                f"node_hub needs mode='bsp' and quorum=1, not mode={self.mode!r} and "
                f"quorum={self.quorum}: it adds up the gradients of a whole round"
            )
        if self.on_death == "wait":
            raise ValueError(
                "node_hub needs on_death='shrink' or 'abort', not 'wait': behind a node hub nobody "
                "can take the place of a worker that has died"
            )


class _Environment(PydanticBaseSettingsSource):
    """`ZPS_*` of a mapping; empty ones count as unset, unknown ones are refused."""

    def __init__(self, settings_cls: type[BaseSettings], environ: Mapping[str, str]) -> None:
        super().__init__(settings_cls)
        self._environ = {
            name: value for name, value in environ.items() if name.startswith(PREFIX) and value
        }

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return self._environ.get(variable(field_name)), field_name, False

    def __call__(self) -> dict[str, Any]:
        fields = self.settings_cls.model_fields
        known = [variable(name) for name in fields]
        _check_names(
            [name for name in self._environ if name not in OTHER_VARIABLES], known, "variable"
        )
        found = {name: self.get_field_value(field, name)[0] for name, field in fields.items()}
        return {name: value for name, value in found.items() if value is not None}


def _read_file(cls: type[Settings], environ: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """(name, contents) of the configuration file; no file is an empty one, unless it was named."""
    named = environ.get(CONFIG_VARIABLE)
    path = Path(named or CONFIG_FILE)
    if named and not path.exists():
        raise ConfigError(f"{CONFIG_VARIABLE}={named!r}: there is no such file")
    try:
        values = TomlConfigSettingsSource(cls, toml_file=path)()
    except ValueError as error:  # bad TOML, or bytes that are not UTF-8
        raise ConfigError(f"{path}: not a TOML file: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    _check_names(values, cls.model_fields, f"setting in {path}")
    return str(path), values


def _user_runtime_dir(environ: Mapping[str, str]) -> Path | None:
    """The user's own runtime folder; variables inherited over `su` may name one that is not."""
    base = environ.get("XDG_RUNTIME_DIR")
    if base and os.path.isabs(base) and os.access(base, os.W_OK):
        return Path(base) / "zps"
    return None


def _items(text: str | None) -> Iterator[str]:
    return (item.strip() for item in (text or "").split(",") if item.strip())


def _check_names(names: Iterable[str], known: Iterable[str], what: str) -> None:
    known = {_core(name): name for name in known}
    for name in names:
        if known.get(_core(name)) != name:
            near = get_close_matches(_core(name), known, n=1)
            hint = f"did you mean {known[near[0]]}?" if near else "`zps config` lists all of them."
            raise ConfigError(f"there is no {what} {name}; {hint}")


def _core(name: str) -> str:
    """A name as it is compared with others: the prefix that all of them share would hide much."""
    return name.removeprefix(PREFIX).replace("-", "_").lower()


def _explain(error: ValidationError, sources: Mapping[str, str]) -> Iterator[str]:
    """One line a mistake: where the value came from, the value, what is allowed."""
    for detail in error.errors(include_url=False):
        text = detail["msg"].removeprefix("Value error, ")
        text = text.replace("Input should", "must").replace("String should", "must")
        if not detail["loc"]:
            yield text
            continue
        name = str(detail["loc"][0])
        source = sources.get(name, DEFAULT)
        given = f"{name}={detail['input']!r}"
        if isinstance(detail.get("ctx", {}).get("error"), CompressionSyntaxError):
            given = name  # the text stands below it, with a caret
        if source == variable(name):
            given = given.replace(name, source, 1)
        elif source != ARGUMENT:
            given = f"{source}: {given}"
        yield f"{given}: {text} ({Settings.model_fields[name].description})"
