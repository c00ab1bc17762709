from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zps.codec.spec import Compression
from zps.config import MAX_CODECS_BYTES, Settings, variable
from zps.errors import ConfigError
from zps.wire.messages import SHARED_SETTINGS, Hello, encode


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(environ: dict[str, str] | None = None, **values: object) -> Settings:
    return Settings.load(environ=environ or {}, **values)


def message(environ: dict[str, str] | None = None, **values: object) -> str:
    with pytest.raises(ConfigError) as error:
        load(environ, **values)
    return str(error.value)


# Sources


def test_arguments_win_over_variables_over_file_over_defaults(tmp_path: Path) -> None:
    (tmp_path / "zps.toml").write_text('mode = "async"\nstaleness = 5\nquorum = 1.0\nspin_us = 1\n')
    settings = load({"ZPS_MODE": "ssp", "ZPS_STALENESS": "7"}, mode="bsp")

    assert (settings.mode, settings.staleness, settings.spin_us) == ("bsp", 7, 1)
    assert settings.source("mode") == "argument"
    assert settings.source("staleness") == "ZPS_STALENESS"
    assert settings.source("spin_us") == "zps.toml"
    assert settings.source("timeout_s") == "default"
    assert settings.explicit() == {"mode": "bsp", "staleness": 7, "quorum": 1.0, "spin_us": 1}


def test_the_process_environment_is_read_when_none_is_passed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ZPS_JOB", "from-the-shell")
    assert Settings.load().job == "from-the-shell"


def test_plain_construction_reads_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZPS_MODE", "ssp")
    monkeypatch.setenv("MODE", "ssp")
    assert Settings().mode == "bsp"


def test_an_empty_variable_and_a_none_argument_count_as_not_given() -> None:
    settings = load({"ZPS_MODE": "", "ZPS_CONFIG": ""}, job=None)
    assert (settings.mode, settings.job) == ("bsp", "default")
    assert settings.explicit() == {}


def test_zps_config_names_another_file(tmp_path: Path) -> None:
    (tmp_path / "zps.toml").write_text('mode = "async"\n')
    other = tmp_path / "other.toml"
    other.write_text("staleness = 3\n")
    settings = load({"ZPS_CONFIG": str(other)})
    assert (settings.mode, settings.staleness) == ("bsp", 3)
    assert settings.source("staleness") == str(other)


def test_no_file_is_read_when_the_null_device_is_named(tmp_path: Path) -> None:
    (tmp_path / "zps.toml").write_text('mode = "async"\n')
    assert load({"ZPS_CONFIG": os.devnull}).mode == "bsp"


def test_a_named_file_that_is_not_there_is_an_error() -> None:
    assert "ZPS_CONFIG='missing.toml'" in message({"ZPS_CONFIG": "missing.toml"})


@pytest.mark.parametrize("content", [b"mode = ", b"\xff\xfe", b'mode = "bsp"\nmode = "ssp"\n'])
def test_a_broken_file_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "zps.toml").write_bytes(content)
    assert message().startswith("zps.toml: not a TOML file")


# Mistakes


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("ZPS_MODDE", "ZPS_MODE"),
        ("ZPS_BUCKETBYTES", "ZPS_BUCKET_BYTES"),
        ("ZPS_bucket_bytes", "ZPS_BUCKET_BYTES"),
        ("ZPS_WORLDSIZE", "ZPS_WORLD_SIZE"),
        ("ZPS_TIMEOUT", "ZPS_TIMEOUT_S"),
    ],
)
def test_a_misspelt_variable_is_an_error_that_names_the_nearest(given: str, meant: str) -> None:
    assert message({given: "1"}) == f"there is no variable {given}; did you mean {meant}?"


def test_an_unlike_variable_gets_no_far_fetched_suggestion() -> None:
    assert message({"ZPS_XQJ": "1"}).endswith("`zps config` lists all of them.")


def test_a_misspelt_argument_or_file_entry_is_an_error_too(tmp_path: Path) -> None:
    assert "did you mean quorum?" in message(quorom=1)
    with pytest.raises(ConfigError, match="did you mean mode"):
        Settings(mod="bsp")
    (tmp_path / "zps.toml").write_text("bucket-bytes = 4096\n")
    assert message() == ("there is no setting in zps.toml bucket-bytes; did you mean bucket_bytes?")


def test_variables_without_the_prefix_are_no_concern() -> None:
    assert load({"MODE": "ssp", "XZPS_MODE": "ssp", "zps_mode": "ssp"}).mode == "bsp"


def test_an_invalid_value_names_its_source_the_value_and_what_is_allowed(tmp_path: Path) -> None:
    assert message({"ZPS_MODE": "bps"}).startswith(
        "ZPS_MODE='bps': must be 'bsp', 'ssp' or 'async'"
    )
    assert message(mode="bps").startswith("mode='bps': must be")
    (tmp_path / "zps.toml").write_text('mode = "bps"\n')
    assert message().startswith("zps.toml: mode='bps': must be")


def test_all_invalid_values_are_named_at_once() -> None:
    text = message({"ZPS_MODE": "x", "ZPS_QUORUM": "2"})
    assert "ZPS_MODE='x'" in text
    assert "ZPS_QUORUM='2'" in text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("quorum", 0),
        ("quorum", 1.01),
        ("quorum", float("nan")),
        ("staleness", -1),
        ("timeout_s", 0),
        ("timeout_s", float("inf")),
        ("connect_timeout_s", -1),
        ("rank", -1),
        ("rank", "one"),
        ("world_size", 0),
        ("min_workers", 0),
        ("hub_threads", 0),
        ("spin_us", -1),
        ("job", ""),
        ("hub", "localhost"),
        ("hub", "tcp://a:1,nonsense"),
        ("hub", "tcp://a:1,,tcp://b:2"),
        ("hub", "tcp://a"),
        ("hub", "tcp://a:65536"),
        ("hub", "tcp://:1"),
        ("hub", "tcp://a: 1"),
        ("hub", "ipc:///" + "x" * 107),
        ("optimizers", "Lamb"),
        ("optimizers", "pkg.Lamb, os.system('x')"),
        ("pull", "sometimes"),
        ("nonfinite", "ignore"),
        ("on_death", "panic"),
        ("log_level", "loud"),
        ("bucket_bytes", 4095),
        ("bucket_bytes", 4096 + 32),
        ("bucket_bytes", "-4MiB"),
        ("bucket_bytes", "4 potatoes"),
        ("bucket_bytes", True),
        ("compression_min_bytes", -1),
        ("compression", 8),
    ],
)
def test_a_value_out_of_range_is_refused(name: str, value: object) -> None:
    assert message(**{name: value}).startswith(f"{name}={value!r}: ")


@pytest.mark.parametrize("name", ["compression", "pull_compression"])
def test_a_mistake_in_a_codec_is_shown_with_a_caret_and_its_source(
    name: str, tmp_path: Path
) -> None:
    shown = (
        ": int8 has no option 'blok'; did you mean 'block'?\n"
        "    a=int8:blok=64; b=none\n"
        "           ^\n"
        "expected an option of int8: block, ef, rounding ("
    )
    text = "a=int8:blok=64; b=none"
    assert message({variable(name): text}).startswith(variable(name) + shown)
    assert message(**{name: text}).startswith(name + shown)
    (tmp_path / "zps.toml").write_text(f'{name} = "{text}"\n')
    assert message().startswith(f"zps.toml: {name}{shown}")


@pytest.mark.parametrize("codec", ["onebit", "ternary", "topk", "randk"])
def test_weights_are_not_compressed_with_what_does_not_suit_them(codec: str) -> None:
    assert load(compression=codec).compression == codec
    text = message({"ZPS_PULL_COMPRESSION": f"bf16; w={codec}"})
    assert text.startswith(f"ZPS_PULL_COMPRESSION: {codec} is not for weights: ")
    assert "expected a codec: none, fp16, bf16, fp8, int8, int4 (" in text


def test_compressions_that_do_not_fit_a_message_are_refused() -> None:
    longest = "none; " + "x" * (MAX_CODECS_BYTES - 15) + "=int8"
    settings = load(compression=longest, job="j" * 128)
    shared = {name: getattr(settings, name) for name in SHARED_SETTINGS}
    name = "n" * 64
    hello = Hello(
        protocol=1, job=settings.job, rank=0, world_size=2**16, incarnation=name, host=name * 2,
        pid=2**31 - 1, settings=shared,
    )  # fmt: skip
    assert len(encode(hello)) <= 4096
    assert "fit into a message" in message(compression=longest, pull_compression="int8:ef=false")
    wide = "none; " + "é" * 1500 + "=int8"
    assert "fit into a message" in message(compression=wide)


def test_settings_that_contradict_each_other_are_refused() -> None:
    assert "rank=2 must be below world_size=2" in message(rank=2, world_size=2)
    assert "min_workers=3 must not exceed world_size=2" in message(min_workers=3, world_size=2)
    assert "needs mode='bsp'" in message(quorum=0.5, mode="async")


# Values


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("4MiB", 4 * 2**20),
        ("512 KiB", 512 * 2**10),
        ("0.5MiB", 2**19),
        ("1gib", 2**30),
        ("64kB", 64_000),
    ],
)
def test_byte_sizes_are_written_as_people_write_them(text: str, size: int) -> None:
    value = load({"ZPS_BUCKET_BYTES": text}).bucket_bytes
    assert value == size
    assert type(value) is int


def test_hub_addresses_are_a_comma_separated_list() -> None:
    assert load().hubs == ()
    assert load(hub="tcp://a:1, ipc:///run/x").hubs == ("tcp://a:1", "ipc:///run/x")


def test_a_hub_address_that_cannot_be_read_is_an_error_at_once_with_its_source() -> None:
    text = message({"ZPS_HUB": "tcp://a:1,tcp://b"})
    assert text.startswith("ZPS_HUB='tcp://a:1,tcp://b': ")
    assert "'tcp://b' cannot be read: it has no port; write ipc:" in text


def test_optimizer_classes_are_import_paths() -> None:
    assert load().optimizer_classes == ()
    assert load({"ZPS_OPTIMIZERS": "pkg.Lamb, other.mod.Sam"}).optimizer_classes == (
        "pkg.Lamb",
        "other.mod.Sam",
    )


def test_compression_is_kept_as_canonical_text_and_parsed_on_demand() -> None:
    settings = load(
        {"ZPS_COMPRESSION": " int8 : block=256,ef=true;*.bias = none "}, pull_compression="bf16"
    )
    assert settings.compression == "int8; *.bias=none"
    assert settings.push_codecs == Compression.parse("int8; *.bias=none")
    assert settings.pull_codecs == Compression.parse("bf16")
    assert load().push_codecs == load().pull_codecs == Compression()
    assert load(settings.to_env()).compression == settings.compression


def test_small_tensors_are_measured_in_bytes() -> None:
    assert load().compression_min_bytes == 4096
    assert load({"ZPS_COMPRESSION_MIN_BYTES": "64KiB"}).compression_min_bytes == 65536
    assert load(compression_min_bytes=0).compression_min_bytes == 0


def test_only_the_drop_policy_has_a_limit_to_drop_over() -> None:
    assert load(staleness=4).drop_over is None
    assert load(staleness=4, staleness_policy="drop", mode="ssp").drop_over == 4


def test_the_runtime_folder_is_the_users_own(tmp_path: Path) -> None:
    assert load({"XDG_RUNTIME_DIR": str(tmp_path)}).runtime_dir == tmp_path / "zps"
    assert load({"XDG_RUNTIME_DIR": str(tmp_path)}).source("runtime_dir") == "default"
    fallback = Path(f"/tmp/zps-{os.getuid()}")
    assert load({"XDG_RUNTIME_DIR": str(tmp_path / "missing")}).runtime_dir == fallback
    assert load({}).runtime_dir == fallback
    assert load({"ZPS_RUNTIME_DIR": "/somewhere"}).runtime_dir == Path("/somewhere")


def test_settings_are_frozen_and_survive_pickling() -> None:
    settings = load(mode="ssp")
    with pytest.raises(ValueError, match="frozen"):
        settings.mode = "bsp"  # type: ignore[misc]
    again = pickle.loads(pickle.dumps(settings))
    assert again == settings
    assert again.source("mode") == "argument"


def test_replace_checks_what_it_changes_and_keeps_the_sources() -> None:
    settings = load({"ZPS_MODE": "ssp"}, world_size=2).replace(rank=1)
    assert (settings.rank, settings.mode) == (1, "ssp")
    assert settings.source("mode") == "ZPS_MODE"
    assert settings.source("staleness") == "default"
    with pytest.raises(ConfigError, match="rank=2 must be below"):
        settings.replace(rank=2)


@given(
    mode=st.sampled_from(["bsp", "ssp", "async"]),
    alpha=st.floats(0, 1e9, allow_nan=False),
    buckets=st.integers(64, 2**20),
    job=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30),
    threads=st.none() | st.integers(1, 64),
)
def test_a_child_process_gets_the_same_settings_through_its_environment(
    mode: str, alpha: float, buckets: int, job: str, threads: int | None
) -> None:
    settings = load(
        mode=mode,
        staleness_alpha=alpha,
        bucket_bytes=buckets * 64,
        job=job,
        hub_threads=threads,
        runtime_dir=Path("/a b/c"),
    )
    child = load(settings.to_env())
    assert child.model_dump() == settings.model_dump()
    assert child.explicit().keys() == settings.explicit().keys()


def test_only_explicit_settings_reach_a_child(tmp_path: Path) -> None:
    assert load({"XDG_RUNTIME_DIR": str(tmp_path)}).to_env() == {}
    assert load(mode="ssp").to_env() == {"ZPS_MODE": "ssp"}


def test_every_setting_has_a_variable_and_a_description() -> None:
    assert variable("bucket_bytes") == "ZPS_BUCKET_BYTES"
    for name, field in Settings.model_fields.items():
        assert field.description, name


@pytest.mark.parametrize("name", ["checkpoint_dir", "key_dir"])
def test_a_setting_without_effect_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="not used by this version"):
        load({variable(name): "/somewhere"})


def test_compensation_for_delays_needs_copies() -> None:
    with pytest.raises(ConfigError, match="needs pull='copy'"):
        load(mode="async", staleness_policy="dc", pull="alias")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"nodes": 2, "node_rank": 2}, "node_rank=2 must be below nodes=2"),
        ({"nodes": 2, "world_size": 5}, "world_size=5 must be a multiple of nodes=2"),
        ({"node_hub": True, "mode": "ssp"}, "node_hub needs mode='bsp' and quorum=1"),
        ({"node_hub": True, "quorum": 0.5}, "quorum=0.5"),
        ({"node_hub": True, "on_death": "wait"}, "not 'wait'"),
    ],
)
def test_nodes_that_do_not_fit_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        load(**settings)


def test_a_node_hub_knows_the_ranks_of_its_node() -> None:
    place = {"nodes": 3, "node_rank": 1, "world_size": 12}
    assert load(node_hub=True, **place).ranks_here == range(4, 8)
    assert load(**place).ranks_here is None
    assert load(node_hub=True).ranks_here is None
