"""Length models: frequencies, limits, statistics, tables, refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmsched_env.errors import ConfigError
from llmsched_env.workload import LengthModel, Lognormal, QuantileTable, TraceLengths, Types, load_lengths
from llmsched_env.workload.lengths import MAX_SUPPORT, grouped_statistics

tokens = st.integers(1, 5000)


@st.composite
def tables(draw: st.DrawFn) -> QuantileTable:
    def levels(most: int) -> list[float]:
        inner = draw(st.sets(st.integers(1, 99), max_size=most))
        return [0.0, *(i / 100 for i in sorted(inner)), 1.0]

    def quantiles(n: int) -> list[float]:
        return sorted(draw(st.lists(st.floats(0.5, 4000.0), min_size=n, max_size=n)))

    a, b, d = levels(10), levels(5), levels(8)
    outputs = [quantiles(len(d)) for _ in range(len(b) - 1)]
    return QuantileTable(a, quantiles(len(a)), b, d, outputs, draw(st.one_of(st.none(), st.integers(2, 5000))))  # type: ignore[arg-type]


models = st.one_of(
    st.lists(st.tuples(tokens, tokens, st.sampled_from([0.0, 0.5, 3.0])), min_size=1, max_size=6)
    .filter(lambda rows: any(w > 0 for *_, w in rows))
    .map(lambda rows: Types(*(tuple(c) for c in zip(*rows, strict=True)))),
    st.builds(
        Lognormal,
        st.floats(0.5, 2000.0),
        st.floats(0.0, 3.0),
        st.floats(0.5, 2000.0),
        st.floats(0.0, 3.0),
        tokens,
        tokens,
        st.floats(-1.0, 1.0),
        st.one_of(st.none(), st.integers(2, 6000)),
    ),
    st.lists(st.tuples(tokens, tokens, st.integers(0, 3)), min_size=1, max_size=30).map(
        lambda rows: TraceLengths(*(np.array(c) for c in zip(*rows, strict=True)))
    ),
    tables(),
)


@given(models, st.integers(0, 200), st.integers(0, 2**32))
@settings(deadline=None)
def test_samples_are_whole_tokens_within_limits(model: LengthModel, n: int, seed: int) -> None:
    prompt, output, type_id = model.sample(np.random.default_rng(seed), n)
    for array, low in ((prompt, 1), (output, 1), (type_id, 0)):
        assert array.dtype == np.int32 and array.shape == (n,) and np.all(array >= low)
    max_total = getattr(model, "max_total", None)
    if max_total is not None:
        assert np.all(prompt.astype(np.int64) + output <= max_total)
    again = model.sample(np.random.default_rng(seed), n)
    assert all(x.tobytes() == y.tobytes() for x, y in zip((prompt, output, type_id), again, strict=True))


@given(models)
@settings(deadline=None, max_examples=50)
def test_statistics_are_small_and_agree_with_a_sample(model: LengthModel) -> None:
    statistics = model.statistics()
    assert statistics.prompt.size <= MAX_SUPPORT and statistics.weight.sum() == pytest.approx(1.0)
    prompt, output, type_id = model.sample(np.random.default_rng(0), 20_000)
    for mean, sample in ((statistics.mean_prompt, prompt), (statistics.mean_output, output)):
        # Whole tokens cost up to one, the ends of a lognormal's grid and of a cell some per cent.
        assert mean == pytest.approx(float(sample.mean()), rel=0.05, abs=1.0 + 6 * float(sample.std()) / math.sqrt(20_000))
    assert set(np.unique(type_id)) <= set(statistics.type_id.tolist())


def test_types_are_drawn_by_weight() -> None:
    model = Types((10, 10, 7), (10, 20, 5), (2.0, 1.0, 0.0))
    prompt, output, type_id = model.sample(np.random.default_rng(1), 90_000)
    counts = np.bincount(type_id, minlength=3) / 90_000
    assert counts[2] == 0 and counts[:2] == pytest.approx([2 / 3, 1 / 3], abs=0.01)
    assert np.array_equal(output, np.array([10, 20, 5])[type_id]) and np.array_equal(prompt, np.array([10, 10, 7])[type_id])
    statistics = model.statistics()
    assert statistics.weight == pytest.approx([2 / 3, 1 / 3, 0]) and statistics.type_id.tolist() == [0, 1, 2]


def test_lognormal_moments_and_correlation() -> None:
    model = Lognormal(100.0, 0.6, 200.0, 0.8, max_prompt=100_000, max_output=100_000, correlation=-0.5)
    prompt, output, _ = model.sample(np.random.default_rng(2), 400_000)
    assert prompt.mean() == pytest.approx(100.0, rel=0.01) and output.mean() == pytest.approx(200.0, rel=0.01)
    assert np.log(prompt).std() == pytest.approx(0.6, rel=0.01) and np.log(output).std() == pytest.approx(0.8, rel=0.01)
    assert np.corrcoef(np.log(prompt), np.log(output))[0, 1] == pytest.approx(-0.5, abs=0.01)
    statistics = model.statistics()
    assert statistics.mean_prompt == pytest.approx(100.0, rel=0.01) and statistics.mean_output == pytest.approx(200.0, rel=0.02)
    cross = float((statistics.prompt * statistics.output) @ statistics.weight)
    assert cross == pytest.approx(float((prompt * output.astype(np.float64)).mean()), rel=0.03)


def test_lognormal_cuts() -> None:
    model = Lognormal(500.0, 1.5, 500.0, 1.5, max_prompt=600, max_output=700, max_total=1000)
    prompt, output, _ = model.sample(np.random.default_rng(3), 20_000)
    assert prompt.max() == 600 and output.max() <= 700 and (prompt + output).max() == 1000


def test_trace_lengths_keep_rows_together() -> None:
    model = TraceLengths(np.array([3, 5]), np.array([30, 50]), np.array([0, 1]))
    prompt, output, type_id = model.sample(np.random.default_rng(4), 10_000)
    assert np.array_equal(output, 10 * prompt) and np.array_equal(type_id, (prompt == 5).astype(int))
    assert type_id.mean() == pytest.approx(0.5, abs=0.02)


@given(st.integers(1, 5000), st.integers(1, 4), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_grouped_statistics_keep_the_means_of_each_type(n: int, num_types: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    prompt, output, types = rng.integers(1, 3000, n), rng.integers(1, 900, n), rng.integers(0, num_types, n)
    statistics = grouped_statistics(prompt, output, types, "test")
    assert statistics.prompt.size <= MAX_SUPPORT
    for t in np.unique(types):
        mine, points = types == t, statistics.type_id == t
        weight = statistics.weight[points]
        assert weight.sum() == pytest.approx(mine.mean())
        assert weight @ statistics.prompt[points] / weight.sum() == pytest.approx(prompt[mine].mean())
        assert weight @ statistics.output[points] / weight.sum() == pytest.approx(output[mine].mean())


def test_grouped_statistics_are_exact_for_few_distinct_rows() -> None:
    statistics = grouped_statistics([5] * 700 + [9] * 300, [2] * 700 + [4] * 300, [0] * 1000, "test")
    assert statistics.prompt.tolist() == [5, 9] and statistics.weight == pytest.approx([0.7, 0.3])


# --- tables ---------------------------------------------------------------------------------------


def test_table_interpolates_and_conditions_on_the_prompt() -> None:
    table = QuantileTable([0, 1], [100, 300], [0, 0.5, 1], [0, 0.5, 1], [[10, 20, 20], [50, 50, 90]])  # type: ignore[arg-type]
    prompt, output, _ = table.sample(np.random.default_rng(5), 200_000)
    assert prompt.min() == 100 and prompt.max() == 300 and prompt.mean() == pytest.approx(200, rel=0.01)
    low, high = prompt < 200, prompt > 200
    assert output[low].max() == 20 and output[high].min() == 50
    assert output[low].mean() == pytest.approx(17.5, rel=0.01) and output[high].mean() == pytest.approx(60.0, rel=0.02)
    statistics = table.statistics()
    assert statistics.prompt == pytest.approx([150, 150, 250, 250]) and statistics.output == pytest.approx([15, 20, 50, 70])


def test_lmsys_summary_reproduces_the_printed_numbers() -> None:
    """The table built from fractions and means gives back the printed quantiles that were not used to build it."""
    table = load_lengths("lmsys")
    prompt, output, _ = table.sample(np.random.default_rng(6), 1_000_000)
    printed = {0.05: 1, 0.1: 4, 0.25: 9, 0.5: 21, 0.75: 63, 0.9: 189, 0.95: 258, 0.99: 415}
    for level, value in printed.items():
        assert np.quantile(prompt, level) == pytest.approx(value, rel=0.01, abs=1)
    for level, value in {0.5: 117, 0.75: 234, 0.9: 339, 0.95: 398, 0.99: 475}.items():
        assert np.quantile(output, level) == pytest.approx(value, rel=0.015)
    # arXiv 2504.11320 v4: means 58.6 and 147.3; outputs of 0 tokens (0.16 %) are not drawn.
    assert prompt.mean() == pytest.approx(58.6, rel=0.01) and output.mean() == pytest.approx(147.3, rel=0.015)
    table_json = json.loads((Path(__file__).parents[1] / "llmsched_env/workload/statistics/lmsys.json").read_text())["table"]
    edges = [0, *table_json["output_edges"]]
    fractions = np.array(table_json["output_fractions"]) / sum(table_json["output_fractions"])
    for low, high, share, mean in zip(edges, edges[1:], fractions, table_json["prompt_mean_by_output"], strict=False):
        inside = (output > low) & (output <= high)
        assert inside.mean() == pytest.approx(share, rel=0.03)
        assert prompt[inside].mean() == pytest.approx(mean, rel=0.05)
    assert np.corrcoef(prompt, output)[0, 1] == pytest.approx(0.037, abs=0.01)


GOOD: dict[str, Any] = {
    "prompt_levels": [0, 0.5, 1],
    "prompt_quantiles": [1, 5, 9],
    "bin_edges": [0, 1],
    "output_levels": [0, 1],
    "output_quantiles": [[1, 9]],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_levels": [0, 0.5, 0.9]}, r"lengths\.prompt_levels: must increase from 0 to 1"),
        ({"prompt_levels": [0, 0.5, 0.5, 1]}, r"lengths\.prompt_levels"),
        ({"bin_edges": [0.1, 1]}, r"lengths\.bin_edges"),
        ({"prompt_quantiles": [1, 5]}, r"lengths\.prompt_quantiles: shape \(2,\), must be \(3,\)"),
        ({"prompt_quantiles": [1, 9, 5]}, r"lengths\.prompt_quantiles: must be finite"),
        ({"prompt_quantiles": [0, 5, 9]}, r"lengths\.prompt_quantiles"),
        ({"prompt_quantiles": [1, math.nan, 9]}, r"lengths\.prompt_quantiles"),
        ({"output_quantiles": [[1, 9], [1, 9]]}, r"lengths\.output_quantiles: shape"),
        ({"max_total": 1}, r"lengths\.max_total: 1"),
    ],
)
def test_bad_tables_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantileTable(**(GOOD | change))
    file = tmp_path / "table.json"
    file.write_text(json.dumps({"form": "joint", "provenance": {"source": "test"}, "table": GOOD | change}))
    with pytest.raises(ConfigError, match=rf"table\.json.*{message}"):
        load_lengths(str(file))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a length table"),
        ("[]", "not a length table"),
        ('{"form": "joint"}', "not a length table .*table"),
        ('{"form": "other", "table": {}}', "not a length table .*other"),
        ('{"form": "joint", "provenance": {"source": ""}, "table": {"levels": []}}', "not a length table"),
    ],
)
def test_damaged_table_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_lengths(str(file))


def test_missing_table_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'no-such'.*cannot be read"):
        load_lengths("no-such")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Types((), (), ()), "0 prompts"),
        (lambda: Types((1, 2), (1,), (1.0, 1.0)), "2 prompts, 1 outputs, 2 weights"),
        (lambda: Types((0,), (1,), (1.0,)), r"lengths\.prompt\[0\]: 0"),
        (lambda: Types((1,), (2.5,), (1.0,)), r"lengths\.output\[0\]: 2\.5"),  # type: ignore[arg-type]
        (lambda: Types((1,), (1,), (-1.0,)), r"lengths\.weight\[0\]: -1\.0"),
        (lambda: Types((1,), (1,), (math.nan,)), r"lengths\.weight\[0\]: nan"),
        (lambda: Types((1,), (1,), (0.0,)), "at least one must be > 0"),
        (lambda: Lognormal(0.0, 1.0, 1.0, 1.0), r"lengths\.prompt_mean: 0\.0"),
        (lambda: Lognormal(1.0, -1.0, 1.0, 1.0), r"lengths\.prompt_sigma: -1\.0"),
        (lambda: Lognormal(1.0, 1.0, 1.0, math.nan), r"lengths\.output_sigma: nan"),
        (lambda: Lognormal(1.0, 1.0, 1.0, 1.0, max_prompt=0), r"lengths\.max_prompt: 0"),
        (lambda: Lognormal(1.0, 1.0, 1.0, 1.0, correlation=1.5), r"lengths\.correlation: 1\.5"),
        (lambda: Lognormal(1.0, 1.0, 1.0, 1.0, max_total=1), r"lengths\.max_total: 1"),
        (lambda: TraceLengths(np.array([]), np.array([])), "not empty"),
        (lambda: TraceLengths(np.array([1, 0]), np.array([1, 1])), r"lengths\.prompt_tokens: row 1 is 0"),
        (lambda: TraceLengths(np.array([1]), np.array([1, 1])), r"lengths\.output_tokens: shape"),
        (lambda: Types((1,), (1,), (1.0,)).sample(np.random.default_rng(0), -1), "n: -1"),
    ],
)
def test_refusals_name_field_and_value(build: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()
