"""What a kernel profile lacks, derived from what it holds, and the error of each rule where the answer was measured.

* A GEMM off the grid: along k where n is on the grid, else along n or in n k, whichever errs less on the GPU (``gemm_errors``).
* Head counts that were not measured (``heads_of``): linear in the heads between two measured counts with the same key and
  value heads, or with the same group; else the call of a fraction of the heads with as many times the requests, which is
  the same work for the GPU piece by piece (``heads_errors``, ``decode_errors``).
* Decode attention of more tokens than were measured: each row goes on linearly (``corner_errors``).
* A chunk over a context: the difference of two full prefills, at least one tile's walk over the context.
* Several prompts in one call (``several_prompts``): their measured time beyond that of one prompt with the same attention
  work (``prompts_errors``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from llmsched_env.errors import ConfigError
from llmsched_env.perf.base import FloatArray
from llmsched_hardware.calibration.importers.aiconfigurator_profile import AttentionRows, Profile

LEAST_SIDE = 1024  # GEMMs with a shorter side say nothing about those of a model of billions of parameters
WIDE = 8192  # outputs of the GEMMs on which rules for wide ones are compared
Heads = tuple[int, int]


@dataclass(frozen=True, slots=True)
class RuleError:
    """Error of a rule over known cells: relative, as fractions; ``rule`` and ``where`` say which."""

    rule: str
    where: str
    cells: int
    mape: float
    bias: float
    p95: float


def rule_error(rule: str, where: str, relative: FloatArray) -> RuleError:
    """Mean absolute, mean and 95th percentile of relative errors, NaN left out."""
    known = relative[~np.isnan(relative)]
    if known.size == 0:
        return RuleError(rule, where, 0, np.nan, np.nan, np.nan)
    size = np.abs(known)
    return RuleError(rule, where, known.size, float(size.mean()), float(known.mean()), float(np.quantile(size, 0.95)))


# ---------------------------------------------------------------------------------------------------- GEMMs


def _between(x: FloatArray, rows: FloatArray, at: float) -> FloatArray:
    """Linear in x between the two nearest rows; beyond the ends the line through the last two goes on."""
    j = int(np.clip(np.searchsorted(x, at), 1, x.size - 1))
    w = (at - x[j - 1]) / (x[j] - x[j - 1])
    return np.asarray(rows[j - 1] + w * (rows[j] - rows[j - 1]), dtype=np.float64)


def gemm_along_k(profile: Profile, n: int, k: int, without: tuple[int, int] | None = None) -> FloatArray | None:
    """(M,) seconds by linear interpolation along k at this n; None where n is not on the grid.

    At fixed n the output tiles, and so the waves they run in, stay the same.
    """
    known = sorted(pair[1] for pair in profile.gemm if pair[0] == n and pair[1] >= LEAST_SIDE and pair != without)
    if len(known) < 2:
        return None
    return _between(np.array(known, dtype=np.float64), np.array([profile.gemm[n, x] for x in known]), float(k))


def gemm_along_n(profile: Profile, n: int, k: int, without: tuple[int, int] | None = None) -> FloatArray | None:
    """(M,) seconds by linear interpolation along n at this k; None where k is not on the grid."""
    known = sorted(pair[0] for pair in profile.gemm if pair[1] == k and pair[0] >= LEAST_SIDE and pair != without)
    if len(known) < 2:
        return None
    return _between(np.array(known, dtype=np.float64), np.array([profile.gemm[x, k] for x in known]), float(n))


def gemm_by_product(profile: Profile, n: int, k: int, without: tuple[int, int] | None = None) -> FloatArray:
    """(M,) seconds by linear interpolation in n k over all measured pairs (the mean of those of equal n k)."""
    products: dict[int, list[FloatArray]] = {}
    for pair, seconds in profile.gemm.items():
        if min(pair) >= LEAST_SIDE and pair != without:
            products.setdefault(pair[0] * pair[1], []).append(seconds)
    known = sorted(products)
    rows = np.array([np.mean(products[x], axis=0) for x in known])
    return _between(np.array(known, dtype=np.float64), rows, float(n * k))


def gemm_seconds(profile: Profile, n: int, k: int) -> FloatArray:
    """(M,) seconds of the GEMM with n outputs and k inputs at ``profile.tokens``.

    Where n is not on the grid and k is, along n or in n k: whichever errs less on this GPU's wide GEMMs.
    """
    if (n, k) in profile.gemm:
        return profile.gemm[n, k]
    along = gemm_along_k(profile, n, k)
    if along is None and wide_gemms_go_along_n(profile):
        along = gemm_along_n(profile, n, k)
    return gemm_by_product(profile, n, k) if along is None else along


def _wide_errors(profile: Profile) -> tuple[FloatArray, FloatArray]:
    """Leave-one-out errors (pairs, M) along n and in n k of GEMMs with 8192 outputs and more, the widest left out."""
    most = max(pair[0] for pair in profile.gemm)
    pairs = [pair for pair in profile.gemm if WIDE <= pair[0] < most and 2048 <= pair[1] <= 8192]
    along = [(pair, gemm_along_n(profile, *pair, without=pair)) for pair in pairs]
    known = [(pair, seconds) for pair, seconds in along if seconds is not None]
    if not known:
        return np.empty((0, profile.tokens.size)), np.empty((0, profile.tokens.size))
    return (
        np.array([seconds / profile.gemm[pair] - 1 for pair, seconds in known]),
        np.array([gemm_by_product(profile, *pair, without=pair) / profile.gemm[pair] - 1 for pair, _ in known]),
    )


def wide_gemms_go_along_n(profile: Profile) -> bool:
    """Whether interpolation along n errs less than in n k on this GPU's wide GEMMs, over all numbers of tokens."""
    along, product = _wide_errors(profile)
    return bool(along.size and np.abs(along).mean() < np.abs(product).mean())


def gemm_errors(profile: Profile) -> list[RuleError]:
    """Leave-one-out errors of the GEMM rules by number of tokens.

    Along k and in n k over every pair with both sides 2048 to 16384, along n and in n k over wide ones (``WIDE``).
    """
    pairs = [pair for pair in profile.gemm if min(pair) >= 2048 and max(pair) <= 16384]
    inner = [pair for pair in pairs if 2048 < pair[1] < 16384]
    along = np.array([np.asarray(gemm_along_k(profile, *p, without=p)) / profile.gemm[p] - 1 for p in inner])
    product = np.array([gemm_by_product(profile, *p, without=p) / profile.gemm[p] - 1 for p in pairs])
    errors = []
    wide_along, wide_product = _wide_errors(profile)
    for rule, relative in (
        ("along k at the same n", along),
        ("in n k", product),
        ("along n at the same k, wide", wide_along),
        ("in n k, wide", wide_product),
    ):
        for low, high in ((1, 64), (80, 512), (768, 8192)):
            chosen = (profile.tokens >= low) & (profile.tokens <= high)
            errors.append(rule_error(rule, f"{low} to {high} tokens", relative[:, chosen]))
    return errors


# ---------------------------------------------------------------------------------------------------- head counts


@dataclass(frozen=True, slots=True)
class HeadRule:
    """How attention of head counts comes from measured ones, and its rows.

    Attributes:
        rows: seconds of one layer's call.
        rule: in words; empty where these head counts were measured.
    """

    rows: AttentionRows
    rule: str = ""


def _mixed_rows(low: AttentionRows, high: AttentionRows, weight: float) -> AttentionRows:
    """Between two measured head counts, on the points that both hold."""
    batch, length = np.intersect1d(low.batch, high.batch), np.intersect1d(low.length, high.length)

    def on(rows: AttentionRows) -> FloatArray:
        return rows.seconds[np.ix_(np.isin(rows.batch, batch), np.isin(rows.length, length))]

    return AttentionRows(batch, length, np.asarray(on(low) + weight * (on(high) - on(low)), dtype=np.float64))


def _between_heads(table: Mapping[Heads, AttentionRows], heads: int, kv_heads: int) -> HeadRule | None:
    """Linear in the query heads between the nearest measured counts of the same family.

    A family is, in this order: the same key and value heads; the same number of query heads to each of them.
    """
    for family, word in (
        ({pair for pair in table if pair[1] == kv_heads and pair[0] > pair[1]}, "at the same key and value heads"),
        ({pair for pair in table if pair[0] * kv_heads == heads * pair[1]}, "at the same group"),
    ):
        if heads == kv_heads and word == "at the same key and value heads":
            continue  # without groups another kernel runs
        below = [pair for pair in family if pair[0] < heads]
        above = [pair for pair in family if pair[0] > heads]
        if below and above:
            low, high = max(below), min(above)
            weight = (heads - low[0]) / (high[0] - low[0])
            rule = f"{low[0]}/{low[1]} to {high[0]}/{high[1]} heads, linear in the heads {word}"
            return HeadRule(_mixed_rows(table[low], table[high], weight), rule)
    return None


def _same_blocks(table: Mapping[Heads, AttentionRows], heads: int, kv_heads: int) -> HeadRule | None:
    """The call of heads/f, kv heads/f with f times the requests at the same length.

    The kernels run one block per request and key and value head, or per request and query head, whatever the others
    do: n requests of f g heads are the blocks of f n requests of g heads, of the same length and the same bytes.
    """
    for times in range(2, kv_heads + 1):
        if heads % times or kv_heads % times:
            continue
        same = table.get((heads // times, kv_heads // times))
        if same is None:
            continue
        if same.batch[0] > times or same.batch[-1] < times:  # not even one request is known
            continue
        exact = same.batch[same.batch % times == 0] / times
        batch = exact if 1 in exact else np.union1d([1.0], same.batch[same.batch * times <= same.batch[-1]])
        seconds = np.array([_between_batches(same, times * n) for n in batch])
        return HeadRule(AttentionRows(batch, same.length, seconds), f"{heads // times}/{kv_heads // times} heads with {times} n requests")
    return None


def _between_batches(rows: AttentionRows, batch: float) -> FloatArray:
    """(S,) seconds of a number of requests: as measured, or linear between the two nearest."""
    j = int(np.searchsorted(rows.batch, batch))
    if rows.batch[j] == batch:
        return np.asarray(rows.seconds[j], dtype=np.float64)
    weight = (batch - rows.batch[j - 1]) / (rows.batch[j] - rows.batch[j - 1])
    return np.asarray(rows.seconds[j - 1] + weight * (rows.seconds[j] - rows.seconds[j - 1]), dtype=np.float64)


def heads_of(table: Mapping[Heads, AttentionRows], heads: int, kv_heads: int, what: str) -> HeadRule:
    """Attention of these head counts: as measured, or by the first rule that applies.

    Raises:
        ConfigError: no rule does; ``what`` says which attention.
    """
    measured = table.get((heads, kv_heads))
    if measured is not None:
        return HeadRule(measured)
    rules = (_same_blocks, _between_heads) if heads == kv_heads and what == "decode" else (_between_heads, _same_blocks)
    for rule in rules:
        found = rule(table, heads, kv_heads)
        if found is not None:
            return found
    has = ", ".join(f"{h}/{kv}" for h, kv in sorted(table))
    raise ConfigError(f"profile: no {what} attention of {heads}/{kv_heads} heads, nor of counts from which it follows (has {has})")


def heads_errors(table: Mapping[Heads, AttentionRows], what: str) -> list[RuleError]:
    """Error of attention between two head counts, on every measured count with measured neighbours, by number of requests."""
    errors = []
    for where, low, high in (("1 to 8 requests", 1, 8), ("16 requests and more", 16, 2**30)):
        relative: list[float] = []
        for (heads, kv_heads), truth in table.items():
            others = {pair: rows for pair, rows in table.items() if pair != (heads, kv_heads)}
            found = _between_heads(others, heads, kv_heads)
            if found is None or heads < 8:
                continue
            rows = found.rows
            at = np.ix_(np.isin(truth.batch, rows.batch), np.isin(truth.length, rows.length))
            chosen = (rows.batch >= low) & (rows.batch <= high)
            relative += list((rows.seconds / truth.seconds[at] - 1)[chosen].ravel())
        errors.append(rule_error(f"{what} attention between two head counts", where, np.array(relative)))
    return errors


# ---------------------------------------------------------------------------------------------------- attention


def _line_on(x: FloatArray, y: FloatArray, at: FloatArray) -> FloatArray:
    """The line through the last two points, at ``at``."""
    return np.asarray(y[-1] + (at - x[-1]) * (y[-1] - y[-2]) / (x[-1] - x[-2]), dtype=np.float64)


def continued(rows: AttentionRows) -> FloatArray:
    """The rows with every missing long context on the line through the row's last two measurements."""
    table = rows.seconds.copy()
    for row in table:
        known = ~np.isnan(row)
        row[:] = np.interp(rows.length, rows.length[known], row[known])
        beyond = rows.length > rows.length[known][-1]
        row[beyond] = np.maximum(_line_on(rows.length[known], row[known], rows.length[beyond]), row[known][-1])
    return table


def measured_reach(rows: AttentionRows) -> FloatArray:
    """(B,) longest measured context of each row."""
    return np.array([float(rows.length[~np.isnan(row)][-1]) for row in rows.seconds])


def decode_errors(profile: Profile) -> list[RuleError]:
    """Error of two stand-ins for decode attention without grouped heads, on 8/8 heads, which are measured.

    ``same blocks``: 2/2 heads with four times the requests at the same context. ``same bytes``: 8/2
    grouped heads with the same requests at four times the context.
    """
    truth = profile.decode.get((8, 8))
    if truth is None:
        return []
    errors = []
    for where, low, high in (("1 to 8 requests", 1, 8), ("16 to 512 requests", 16, 512)):
        for rule, heads, times_batch, times_length in (
            ("same blocks: 2/2 heads, 4 n requests", (2, 2), 4, 1),
            ("same bytes: 8/2 heads, context 4 k", (8, 2), 1, 4),
        ):
            other = profile.decode.get(heads)
            if other is None:
                continue
            cell = {(b, s): other.seconds[i, j] for i, b in enumerate(other.batch) for j, s in enumerate(other.length)}
            relative = [
                cell.get((b * times_batch, s * times_length), np.nan) / truth.seconds[i, j] - 1
                for i, b in enumerate(truth.batch)
                for j, s in enumerate(truth.length)
                if low <= b <= high and 128 <= s <= 4096
            ]
            errors.append(rule_error(rule, where, np.array(relative)))
    return errors


def corner_errors(rows: AttentionRows) -> RuleError:
    """Error of the longest measured context of each row, continued from the two before it."""
    relative = []
    for row in rows.seconds:
        known = np.flatnonzero(~np.isnan(row))
        x, y = rows.length[known], row[known]
        relative.append(float(_line_on(x[:-1], y[:-1], x[-1:])[0] / y[-1] - 1))
    return rule_error("row continued to twice its context", "decode attention", np.array(relative))


def full_prefill(rows: AttentionRows, tokens: FloatArray) -> FloatArray:
    """Seconds of one prompt of ``tokens`` without context, linear in tokens squared between measurements."""
    one = rows.seconds[rows.batch == 1][0]
    known = ~np.isnan(one)
    return np.asarray(np.interp(np.asarray(tokens) ** 2, rows.length[known] ** 2, one[known]), dtype=np.float64)


def one_tile_walk(rows: AttentionRows, tokens: FloatArray) -> FloatArray:
    """Seconds that one tile of queries takes to pass over ``tokens`` keys.

    That is the time of a single head: all its tiles run at once, the last one passes over everything.
    Above 4096 tokens, where its tiles no longer fit the GPU at once, the line goes on.
    """
    one = rows.seconds[rows.batch == 1][0]
    known = ~np.isnan(one) & (rows.length <= 4096)
    at = np.asarray(tokens, dtype=np.float64)
    x, y = rows.length[known], one[known]
    slope = (y[-1] - y[0]) / (x[-1] - x[0])
    return np.asarray(np.where(at <= 4096, np.interp(at, x, y), y[-1] + slope * (at - x[-1])), dtype=np.float64)


def chunk_seconds(full: AttentionRows, head: AttentionRows, context: float, chunk: FloatArray) -> FloatArray:
    """Prefill attention of chunks over a context, one layer.

    The causal area that a chunk adds is the difference of two full prefills. However small it is, its
    last tile passes over the whole context, and the call has its fixed time.
    """
    end = context + chunk
    added = full_prefill(full, end)
    if context > 0:
        added = added - full_prefill(full, np.array([context])) + full_prefill(full, np.array([1.0]))
    return np.asarray(np.maximum(added, one_tile_walk(head, end)), dtype=np.float64)


# ---------------------------------------------------------------------------------------------------- several prompts


@dataclass(frozen=True, slots=True)
class SeveralPrompts:
    """Seconds that (count) prompts of (length) tokens take in one call beyond one prompt with the same attention work, one layer."""

    count: FloatArray
    length: FloatArray
    seconds: FloatArray


def several_prompts(full: AttentionRows) -> SeveralPrompts:
    """What one prompt of sqrt(sum c^2) tokens leaves out of prompts of c tokens each; 0 for one prompt.

    Short prompts run with the efficiency of short ones. A call of more tokens than were measured goes on in proportion
    to the prompts beyond the first. Empty where no two prompts were measured together.
    """
    length = full.length
    if full.batch.size < 2:
        return SeveralPrompts(np.empty(0), np.empty(0), np.empty((0, 0)))
    extra = np.zeros((full.batch.size, length.size))
    for i, n in enumerate(full.batch):
        if n > 1:
            extra[i] = np.maximum(full.seconds[i] - full_prefill(full, np.sqrt(n) * length), 0.0)
    for column in extra.T:
        known = np.flatnonzero(~np.isnan(column))
        last = known[-1]
        beyond = np.arange(column.size) > last
        if last > 0:
            column[beyond] = column[last] * (full.batch[beyond] - 1) / (full.batch[last] - 1)
        else:
            column[beyond] = 0.0  # as long as no two of them were measured in one call
    return SeveralPrompts(full.batch, length, np.asarray(extra, dtype=np.float64))


def prompts_errors(full: AttentionRows, layers: int, tokens: FloatArray, linear: FloatArray) -> list[RuleError]:
    """Errors of prefill attention of several prompts as a share of the iteration they make.

    Read as one prompt of the same work, and with ``several_prompts`` interpolated: each measured number of prompts
    predicted from half and twice as many.
    """
    several = several_prompts(full)
    plain: list[float] = []
    left_out: list[float] = []
    for i, count in enumerate(full.batch):
        for j, length in enumerate(full.length):
            measured = float(full.seconds[i, j])
            if count == 1 or length < 16 or count * length > tokens[-1] or np.isnan(measured):
                continue
            iteration = float(np.interp(count * length, tokens, linear)) + layers * measured
            one = float(full_prefill(full, np.array([np.sqrt(count) * length]))[0])
            plain.append(layers * (one - measured) / iteration)
            if 0 < i < full.batch.size - 1 and not np.isnan(full.seconds[i + 1, j]):
                low, high = several.count[i - 1], several.count[i + 1]
                weight = (count - low) / (high - low)
                extra = several.seconds[i - 1, j] + weight * (several.seconds[i + 1, j] - several.seconds[i - 1, j])
                left_out.append(layers * (one + extra - measured) / iteration)
    where = f"2 to {full.batch[-1]:.0f} prompts"
    return [
        rule_error("prompts read as one of the same work, share of the iteration", where, np.array(plain)),
        rule_error(
            "prompts with their measured extra time, from half and twice as many, share of the iteration", where, np.array(left_out)
        ),
    ]
