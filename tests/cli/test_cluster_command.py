"""``llmsched cluster`` and ``llmsched cluster-scale``: rows, page, picture, resuming, and what is refused before any work."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmsched_env.bench.cluster import ClusterRow
from llmsched_env.bench.cluster_scale import read_scale
from llmsched_env.cli import cluster, cluster_scale, cluster_tune
from llmsched_env.row_file import read_rows

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
    code, _, _ = run(cluster, capsys, *SMALL, "--rows", file)
    assert code != 0  # it is there already
    code, _, _ = run(cluster, capsys, *SMALL, "--rows", file, "--resume", "--quiet")
    assert code == 0 and read_rows(file, ClusterRow) == rows
    more = [*SMALL[:5], "--seeds", 3, *SMALL[7:]]
    code, _, _ = run(cluster, capsys, *more, "--rows", file, "--resume", "--quiet")
    assert code == 0 and read_rows(file, ClusterRow)[:4] == rows and len(read_rows(file, ClusterRow)) == 6
    changed = tmp_path / "changed.csv"
    changed.write_text(file.read_text().replace(rows[0].sources, "0" * len(rows[0].sources)))
    code, _, err = run(cluster, capsys, *SMALL, "--rows", changed, "--resume", "--quiet")
    assert code != 0 and "sources" in err


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
        assert code != 0 and named in err
    out.write_text(json.dumps({"rows": [{"replicas": 1}]}))
    with pytest.raises(Exception, match="no file of measurements"):
        read_scale(out)


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
