"""``llmsched cluster`` and ``llmsched cluster-scale``: rows, page, picture, resuming, and what is refused before any work."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmsched_env.bench import cluster as bench
from llmsched_env.bench.cluster_rows import ClusterRow, Task
from llmsched_env.bench.cluster_scale import read_scale
from llmsched_env.cli import cluster, cluster_scale, cluster_tune
from llmsched_env.cluster.scenarios import cluster_scenario_names
from llmsched_env.errors import ConfigError
from llmsched_env.row_file import read_rows, write_rows

SMALL = ("--scenarios", "failing", "--routers", "round-robin", "prefix-affinity", "--seeds", 2, "--num-calls", 300, "--jobs", 1)


def run(command: Any, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = command.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def plain(rows: list[ClusterRow]) -> list[ClusterRow]:
    return [dataclasses.replace(row, wall_seconds=0.0) for row in sorted(rows, key=lambda row: (row.router, row.seed))]


def test_rows_tables_page_and_resuming(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("scipy")
    pytest.importorskip("matplotlib")
    file, page = tmp_path / "rows.csv", tmp_path / "page.md"
    code, text, _ = run(cluster, capsys, *SMALL, "--rows", file, "--page", page)
    assert code == 0 and "| prefix-affinity |" in text
    rows = read_rows(file, ClusterRow)
    assert len(rows) == 4 and all(row.completed + row.rejected >= row.requests > 0 for row in rows)
    written = page.read_text(encoding="utf-8")
    assert "## failing" in written and "| round-robin |" in written and "## Bars" not in written  # the router that ships has not run
    kept = file.read_bytes()
    code, _, err = run(cluster, capsys, *SMALL, "--rows", file)
    assert code == 2 and f"--rows: {file} holds finished runs already; use --resume, --overwrite or another place" in err
    assert file.read_bytes() == kept
    code, _, _ = run(cluster, capsys, *SMALL, "--rows", file, "--resume", "--quiet")
    assert code == 0 and read_rows(file, ClusterRow) == rows
    more = [*SMALL[:5], "--seeds", 3, *SMALL[7:]]
    code, _, _ = run(cluster, capsys, *more, "--rows", file, "--resume", "--quiet")
    assert code == 0 and read_rows(file, ClusterRow)[:4] == rows and len(read_rows(file, ClusterRow)) == 6
    code, text, _ = run(cluster, capsys, *SMALL, "--rows", file, "--report-only")
    assert code == 0 and "| prefix-affinity |" in text
    more[6] = 4
    code, _, err = run(cluster, capsys, *more, "--rows", file, "--report-only")
    assert code == 2 and f"--report-only: {file} has no run of round-robin in failing with seed 63" in err
    before, found = file.read_text(), read_rows(file, ClusterRow)[0]
    for name, value, named in (
        ("sources", "0" * 16, "another state of the simulator's sources"),
        ("digest", "1" * 16, "another state of the router 'round-robin'"),
        ("latency_mean", math.nan, "row 1: latency_mean is nan, must be a finite number >= 0"),
        ("ttft_p99", math.inf, "ttft_p99 is inf"),
        ("slo_misses", 1.5, "slo_misses is 1.5, must be a number from 0 to 1"),
        ("completed", -1, "completed is -1, must be a whole number >= 0"),
        ("requests", 10**6, "completed and rejected calls together"),
        ("rerouted", 10**6, "rerouted is 1000000"),
        ("replicas", 0, "replicas is 0"),
        ("seed", 61, "row 2: the same run as row 1"),
    ):
        write_rows(file, ClusterRow, [dataclasses.replace(found, **{name: value}), *read_rows(file, ClusterRow)[1:]])
        spoilt = file.read_bytes()
        code, _, err = run(cluster, capsys, *SMALL, "--rows", file, "--resume", "--quiet")
        assert code == 2 and named in err and file.read_bytes() == spoilt
        assert "--overwrite" in err if name in ("sources", "digest") else f"error: --rows: {file}, row" in err
        file.write_text(before)
    file.write_text(before.replace(f",{found.requests},", ",many,"))
    code, _, err = run(cluster, capsys, *SMALL, "--rows", file, "--resume", "--quiet")
    assert code == 2 and f"error: --rows: {file}, line 2: not a row" in err
    code, _, _ = run(cluster, capsys, *SMALL, "--rows", file, "--overwrite", "--quiet")
    assert code == 0 and plain(read_rows(file, ClusterRow)) == plain(rows)


def test_an_interrupted_run_keeps_what_is_finished(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy")
    ran, file = bench.run_task, tmp_path / "rows.csv"

    def once(task: Task) -> ClusterRow:
        if task.seed != 60:
            raise KeyboardInterrupt
        return ran(task)

    monkeypatch.setattr(bench, "run_task", once)
    code, _, err = run(cluster, capsys, *SMALL, "--rows", file)
    assert code == 130 and "go on with --resume" in err and len(read_rows(file, ClusterRow)) == 1


OWN = """
from llmsched_baselines.routers import Router
from llmsched_env.cluster.routing import RouterRule
from llmsched_env.compiled import compiled


@compiled
def replica_0(cluster, own):
    return 0


@compiled
def beyond(cluster, own):
    return 7


@compiled
def divides(cluster, own):
    return 1 // cluster.call.routed


@compiled
def reads_answers(cluster, own):
    return cluster.calls.output[0]


class First(Router):
    name = "first"

    def __init__(self, door):
        super().__init__(door)
        self.rule = RouterRule(replica_0)


class Beyond(First):
    def __init__(self, door):
        super().__init__(door)
        self.rule = RouterRule(beyond)


class Divides(First):
    def __init__(self, door):
        super().__init__(door)
        self.rule = RouterRule(divides)


class ReadsAnswers(First):
    def __init__(self, door):
        super().__init__(door)
        self.rule = RouterRule(reads_answers)


class Raises(First):
    def __init__(self, door):
        raise KeyError("mine")


class NoRule(Router):
    name = "no-rule"


def takes_nothing():
    return None
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of somebody's routers."""
    path = tmp_path / "own_routers.py"
    path.write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_routers", raising=False)
    return path


@pytest.mark.parametrize(
    ("router", "named"),
    [
        ("nomod:X", "ModuleNotFoundError: No module named 'nomod'"),
        ("own_routers:Frist", "no 'Frist' there; did you mean 'First'?"),
        ("own_routers:Raises", "KeyError: 'mine'"),
        ("own_routers:NoRule", "rule is None, must be a RouterRule"),
        ("own_routers:takes_nothing", "TypeError: "),
        ("own_routers:ReadsAnswers", "cannot be compiled"),
        ("own_routers:OWN:x", "is unknown"),
    ],
)
def test_routers_that_cannot_be_built_are_refused_before_any_work(
    router: str, named: str, own: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("scipy")
    pytest.importorskip("datasketches")
    file = tmp_path / "new" / "rows.csv"
    code, _, err = run(cluster, capsys, *SMALL[:3], "prefix-affinity", router, *SMALL[5:], "--rows", file)
    assert code == 2 and f"error: --routers: {router!r}: " in err and named in err and not file.parent.exists()
    monkeypatch.setattr(cluster_scale, "measure_apart", lambda *a, **b: pytest.fail("a process was started"))
    code, _, err = run(cluster_scale, capsys, "--router", router, "--replicas", 2, "--calls", 5)
    assert code == 2 and f"error: --router: {router!r}: " in err and named in err


def test_a_router_that_fails_while_it_runs_is_named(own: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("scipy")
    words = (*SMALL[:2], "--reference", "round-robin", *SMALL[5:], "--quiet")
    for name, said in (("Beyond", "replica: 7, must be one of"), ("Divides", "ZeroDivisionError: ")):
        code, _, err = run(cluster, capsys, *words, "--routers", "round-robin", f"own_routers:{name}", "--rows", tmp_path / f"{name}.csv")
        assert code == 1 and f"error: router 'own_routers:{name}': {said}" in err
        assert {row.router for row in read_rows(tmp_path / f"{name}.csv", ClusterRow)} == {"round-robin"}


def test_rows_of_a_router_that_has_changed_are_not_gone_on_with(own: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("scipy")
    file = tmp_path / "rows.csv"
    routers = ("--routers", "own_routers:First", "round-robin", "--reference", "round-robin")
    words = ("--scenarios", "equal", *routers, *SMALL[5:], "--rows", file)
    assert run(cluster, capsys, *words, "--quiet")[0] == 0
    digests = {row.router: row.digest for row in read_rows(file, ClusterRow)}
    assert digests["round-robin"] == "" and len(digests["own_routers:First"]) == 16
    assert run(cluster, capsys, *words, "--resume", "--quiet")[0] == 0
    own.write_text(OWN + "\n# changed\n")
    code, _, err = run(cluster, capsys, *words, "--resume", "--quiet")
    assert code == 2 and f"--resume: {file} has rows of another state of the router 'own_routers:First'" in err
    assert run(cluster, capsys, *words, "--report-only", "--quiet")[0] == 0


@pytest.mark.parametrize("command", [cluster, cluster_scale, cluster_tune])
def test_places_are_checked_before_any_work(command: Any, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("scipy")
    pytest.importorskip("datasketches")
    option = "--rows" if command is cluster else "--out"
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    more = ("--resume",) if command is cluster else ()
    for name, named in (("folder", "is a folder"), ("binary/rows", "is a file"), ("binary", "binary")):
        code, _, err = run(command, capsys, option, tmp_path / name, *more)
        assert code == 2 and f"error: {option}: {tmp_path}" in err and named in err
    assert (tmp_path / "binary").read_bytes() == bytes(range(256))


def test_the_help_names_every_scenario(capsys: Any) -> None:
    _, text, _ = run(cluster, capsys, "--help")
    assert all(name in text for name in cluster_scenario_names())


@pytest.mark.slow
def test_the_same_rows_come_from_a_local_ray_cluster(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    assert run(cluster, capsys, *SMALL, "--quiet", "--rows", tmp_path / "here.csv")[0] == 0
    words = [*map(str, SMALL[:-1]), "2", "--backend", "ray", "--quiet", "--rows", str(tmp_path / "ray.csv")]
    # a program of its own: Ray keeps processes and changes joblib's pool for good
    done = subprocess.run([sys.executable, "-m", "llmsched_command", "cluster", *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert plain(read_rows(tmp_path / "here.csv", ClusterRow)) == plain(read_rows(tmp_path / "ray.csv", ClusterRow))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--scenarios", "drift"), "did you mean 'drifting'"),
        (("--routers", "prefix-affinity", "round-robbin"), "did you mean 'round-robin'"),
        (("--seeds", 1), "--seeds: 1"),
        (("--first-seed", -1), "--first-seed: -1"),
        (("--replicas", 0), "--replicas: 0"),
        (("--num-calls", 0), "--num-calls: 0"),
        (("--reference", "cost", "--routers", "sticky"), "--reference: 'cost'"),
        (("--scale", "nowhere.json"), "nowhere.json"),
    ],
)
def test_what_cannot_be_run_is_refused_before_any_work(words: tuple[Any, ...], named: str, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("scipy")
    code, _, err = run(cluster, capsys, *words, "--rows", tmp_path / "rows.csv")
    assert code != 0 and named in err and not (tmp_path / "rows.csv").exists()


def test_scale_is_measured_and_kept(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("datasketches")
    pytest.importorskip("pyarrow")
    out, folder = tmp_path / "scale.json", tmp_path / "calls"
    code, text, _ = run(cluster_scale, capsys, "--replicas", 3, "--calls", 400, "--parquet", folder, "--out", out)
    assert code == 0 and "events/s" in text
    (row,) = read_scale(out)
    assert (row.replicas, row.calls) == (3, 400) and row.events > row.iterations > 0 and row.parquet_mb > 0.0
    for words, named in (
        (("--replicas", 3, "--parquet", folder), "--parquet"),
        (("--replicas", 0), "--replicas"),
        (("--hours", 1, "--calls", 3), "--hours"),
        (("--load", 0), "--load"),
        (("--router", "power-of-too", "--replicas", 1, "--calls", 5), "did you mean 'power-of-two'"),
    ):
        code, _, err = run(cluster_scale, capsys, *words)
        assert code == 2 and named in err
    for spoilt in ({"replicas": 1}, {**dataclasses.asdict(row), "wall_seconds": math.nan}, {**dataclasses.asdict(row), "calls": "many"}):
        out.write_text(json.dumps({"rows": [spoilt]}))
        with pytest.raises(ConfigError, match="no file of measurements"):
            read_scale(out)
        for command, option in ((cluster_scale, "--out"), (cluster, "--scale")):
            code, _, err = run(command, capsys, option, out)
            assert code == 2 and f"error: {option}: {out} is no file of measurements" in err


def test_options_are_searched_and_kept(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "tuned.json"
    words = ("--routers", "sglang", "--scenarios", "failing", "--trials", 2, "--seeds", 1, "--out", out)
    code, text, _ = run(cluster_tune, capsys, *words)
    assert code == 0 and "| failing | sglang |" in text
    kept = out.read_bytes()
    code, _, _ = run(cluster_tune, capsys, *words, "--quiet")
    assert code == 0 and out.read_bytes() == kept
    for wrong, named in (
        (("--routers", "sticky"), "--routers"),
        (("--scenarios", "equall"), "did you mean 'equal'"),
        (("--trials", 0), "--trials"),
    ):
        code, _, err = run(cluster_tune, capsys, *wrong, "--out", tmp_path / "other.json")
        assert code != 0 and named in err and not (tmp_path / "other.json").exists()
