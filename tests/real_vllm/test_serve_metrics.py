"""The metrics of a live policy as another process reads them, and what a full, missing or removed folder does to the server: nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("prometheus_client") is None:
    pytest.skip("prometheus_client comes with vLLM (make test-vllm)", allow_module_level=True)

from small_disk import Disk, fill, small_disk

SECONDS = [1e-5, 3e-5, 3e-5, 2e-4, 0.07, 0.5, 2.0]

COUNT = """
    import json, logging, sys
    from llmsched_hardware.live_metrics import PolicyMetrics
    logging.basicConfig(stream=sys.stderr)
    BEFORE
    metrics = PolicyMetrics("mine")
    for i, seconds in enumerate(json.loads(sys.argv[1])):
        metrics.asked(0.0)
        metrics.iteration("policy")
        metrics.took(seconds, 2 * seconds)
        if i % 3 == 0:
            metrics._push()
    metrics.iteration("repeat")
    metrics.took(None, 1e-3)
    metrics.error(overdue=True)
    metrics.evicted(4)
    metrics.released({"outside": 3, "boundary": 2, "held": 1})
    metrics.present(5, 6, 7)
    BETWEEN
    metrics.close()
    print(json.dumps({"exported": metrics.exported, "failures": metrics._export.failures, "summary": metrics.summary()}))
"""


def run(folder: Path | None, before: str = "", between: str = "") -> tuple[dict[str, Any], str]:
    """What a process that counts says of itself, and what it logs; a process that dies is an error."""
    env = {k: v for k, v in os.environ.items() if k != "PROMETHEUS_MULTIPROC_DIR"}
    if folder is not None:
        env["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
    code = textwrap.dedent(COUNT).replace("BETWEEN", between).replace("BEFORE", before)
    ended = subprocess.run([sys.executable, "-c", code, json.dumps(SECONDS)], env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout), ended.stderr


def exposed(folder: Path) -> dict[str, float]:
    """Every sample, as the process that answers ``/metrics`` collects them."""
    from prometheus_client import CollectorRegistry
    from prometheus_client.multiprocess import MultiProcessCollector

    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(folder))
    return {
        s.name + "".join(f" {v}" for k, v in sorted(s.labels.items()) if k not in ("policy", "pid")): s.value
        for family in registry.collect()
        for s in family.samples
    }


def own_disk(disk: Disk) -> Path:
    if not disk.mounted:
        pytest.skip("no disk can be mounted here")
    return disk.folder


def test_another_process_reads_what_was_counted(tmp_path: Path) -> None:
    said, log = run(tmp_path)
    assert said["exported"] and said["failures"] == 0 and log == ""
    found = exposed(tmp_path)
    assert found["llmsched:iterations_total policy"] == len(SECONDS) and found["llmsched:iterations_total repeat"] == 1
    assert found["llmsched:policy_errors_total"] == found["llmsched:policy_overdue_total"] == found["llmsched:fallback"] == 1
    assert found["llmsched:policy_stuck"] == 0 and found["llmsched:policy_evictions_total"] == 4
    assert [found[f"llmsched:guard_releases_total {kind}"] for kind in ("outside", "boundary", "held")] == [3, 2, 1]
    assert [found[f"llmsched:requests {where}"] for where in ("outside", "boundary", "held")] == [5, 6, 7]
    # A histogram as ``observe`` would have made it.
    assert found["llmsched:policy_seconds_count"] == len(SECONDS) and found["llmsched:policy_seconds_sum"] == pytest.approx(sum(SECONDS))
    for bound in ("1e-05", "2e-05", "5e-05", "0.0002", "0.1", "1.0", "+Inf"):
        assert found[f"llmsched:policy_seconds_bucket {bound}"] == sum(s <= float(bound) for s in SECONDS)
    assert found["llmsched:gate_seconds_count"] == len(SECONDS) + 1


def test_without_a_folder_the_counts_are_there_all_the_same() -> None:
    said, log = run(None)
    assert said["exported"] and said["summary"]["iterations"]["policy"] == len(SECONDS) and log == ""


def test_a_folder_that_is_not_there_costs_the_metrics_and_nothing_else(tmp_path: Path) -> None:
    said, log = run(tmp_path / "missing")
    assert not said["exported"] and "PROMETHEUS_MULTIPROC_DIR cannot be used" in log and "No such file" in log


def test_a_file_that_holds_nonsense_costs_the_metrics_and_nothing_else(tmp_path: Path) -> None:
    """As an older process of the same number may have left one: the folder was to be empty."""
    path = f"pathlib.Path({str(tmp_path)!r}, f'counter_{{os.getpid()}}.db')"
    said, log = run(tmp_path, before=f"import os, pathlib; {path}.write_bytes(bytes([77] * 9000))")
    assert not said["exported"] and "PROMETHEUS_MULTIPROC_DIR cannot be used" in log


def test_a_full_disk_at_the_start_costs_the_metrics_and_nothing_else(tmp_path: Path) -> None:
    """The files are mapped into memory: without room taken beforehand the process would end with SIGBUS."""
    with small_disk(tmp_path / "disk", 256) as disk:
        folder = own_disk(disk)
        fill(folder)
        said, log = run(folder)
        assert not said["exported"] and "No space left" in log and "give it a disk with room" in log
        assert said["summary"]["policy_seconds"]["count"] == len(SECONDS)


def test_a_disk_that_fills_up_later_costs_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 512) as disk:
        folder = own_disk(disk)
        here = str(Path(__file__).parent)
        filling = f"import sys; sys.path.insert(0, {here!r}); import pathlib, small_disk; small_disk.fill(pathlib.Path({str(folder)!r}))"
        said, log = run(folder, between=filling)
        assert said["exported"] and said["failures"] == 0 and log == ""
        assert (folder / "filling").stat().st_size > 0 and exposed(folder)["llmsched:requests held"] == 7


def test_a_folder_that_is_removed_costs_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "metrics"
    folder.mkdir()
    said, log = run(folder, between=f"import shutil; shutil.rmtree({str(folder)!r})")
    assert said["exported"] and said["failures"] == 0 and log == "" and not folder.exists()
