from __future__ import annotations

import resource
from pathlib import Path

import pytest

from zps.config import Settings
from zps.launch import doctor
from zps.launch.doctor import Finding, examine


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a single check, which raises: the others have tests of their own."""

    def broken(_: Settings) -> Finding:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(doctor, "CHECKS", {"broken": (broken, "try again")})


@pytest.mark.usefixtures("only")
def test_a_check_that_raises_has_failed_and_says_what_to_do() -> None:
    settings, broken = examine({})
    assert (settings.name, settings.status) == ("settings", "ok")
    assert (broken.status, broken.detail) == ("fail", "RuntimeError: no such luck")
    assert broken.advice == "try again"


@pytest.mark.usefixtures("only")
def test_a_misspelt_variable_fails_the_settings_and_ends_no_other_check() -> None:
    settings, broken = examine({"ZPS_MODDE": "bsp"})
    assert settings.status == "fail"
    assert "ZPS_MODE" in settings.detail
    assert broken.status == "fail"


def test_memory_here_is_sealed() -> None:
    assert doctor.sealed_memory(Settings()).status == "ok"


def test_the_ipc_directory_must_be_private_and_short(tmp_path: Path) -> None:
    good = tmp_path / "run"
    assert doctor.ipc_directory(Settings(runtime_dir=good)).status == "ok"
    assert list(good.iterdir()) == []

    good.chmod(0o755)
    with pytest.raises(Exception, match="chmod 700"):
        doctor.ipc_directory(Settings(runtime_dir=good))
    with pytest.raises(Exception, match="107"):
        doctor.ipc_directory(Settings(runtime_dir=tmp_path / ("x" * 107)))


def test_a_loopback_port_can_be_bound() -> None:
    assert doctor.loopback_port(Settings()).status == "ok"


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("always within_size [advise] never deny force", "ok"),
        ("always within_size advise [never] deny force", "warn"),
        (None, "warn"),
    ],
)
def test_huge_pages_that_are_off_are_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, status: str
) -> None:
    file = tmp_path / "shmem_enabled"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(doctor, "SHMEM_HUGE_PAGES", file)
    assert doctor.huge_pages(Settings()).status == status


@pytest.mark.parametrize(
    ("limit", "status"), [(resource.RLIM_INFINITY, "ok"), (8 << 20, "ok"), (0, "warn")]
)
def test_only_a_tiny_limit_on_locked_memory_is_worth_a_word(
    monkeypatch: pytest.MonkeyPatch, limit: int, status: str
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    assert doctor.locked_memory(Settings()).status == status


def test_the_whole_examination_finds_nothing_broken_here(tmp_path: Path) -> None:
    report = examine({"ZPS_RUNTIME_DIR": str(tmp_path / "r")})
    assert [check for check in report if check.status == "fail"] == []
    assert [check.name for check in report] == ["settings", *doctor.CHECKS]
    assert all(check.detail for check in report)
