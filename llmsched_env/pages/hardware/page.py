"""docs/hardware.md: how to measure on one's own hardware, and what calibrations and validations have found; figures come from files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmsched_env.errors import ConfigError
from llmsched_env.markdown import table
from llmsched_env.perf import FormulaTime, load_calibration
from llmsched_env.row_file import read_rows
from llmsched_hardware.shapes import SHAPES
from llmsched_hardware.validation import Run, Schedules, gaps, rankings
from llmsched_hardware.validation_report import (
    DEFINITIONS,
    ITERATION_HEADINGS,
    error_table,
    noise_sentence,
    ranking_sentence,
    ranking_table,
)
from llmsched_hardware.validation_runs import MACHINE_FILE, REPORT_FILE, RUNS_FILE, SCHEDULES_FILE, read_machine

CALIBRATE = """# On your own hardware

The simulator is as good as its iteration times. Two programs measure a vLLM engine on the machine at hand: `calibrate.py engine`
fits iteration times to it, `validate.py` runs the same requests on the simulator and on the engine and says how far apart they are.
Both need vLLM and the extra `cli`, and run on vLLM's CPU build and on CUDA alike.

This page is written by `scripts/hardware_page.py`; every figure comes from the files these programs have left.

## Calibrate

    python scripts/calibrate.py engine --model tiny --out tiny.json --budget-seconds 120

`--model` is a built-in shape (table below; a `config.json` is written here, weights are random, nothing is downloaded), a Hugging
Face id or a folder. The program builds the engine, steps it one iteration at a time and measures batches from coarse to fine:
decodes by number and context length up to a nearly full KV cache, prefill chunks by size and context, chunks behind decodes. Each
shape is run before it is timed, medians are taken, and the plan is gone through several times as long as the time allows. What such a
plan cannot show is logged in traffic at three loads under two policies: prompts that start together, requests that end, numbers of
tokens that were not seen lately. Models are fitted to both (non-negative least squares, rows divided by the predicted time), and a
workload that was not measured before is run on the engine and on the simulator; the form whose simulated latency is closest is named.
What else there is to calibrate from, logs of a server and results of a benchmark, is in [Calibrate your
engine](calibrate-your-engine.md).
"""

FILES = (
    ("`tiny.json`", "the formula of `FormulaTime` with provenance: device, driver, versions, date, KV blocks, range, errors"),
    ("`tiny.npz`", "tables through the measured batches (`TableTime`), the same provenance"),
    ("`tiny.traffic.json`", "the fit to traffic (`TrafficTime`): terms for what changes between iterations, too"),
    ("`tiny.points.jsonl`", "every measured batch: its sums, seconds of the whole step, seconds of execution alone"),
    ("`tiny.iterations.csv`", "every iteration of the traffic, which `calibrate.py from-log` reads"),
)

VALIDATE = """Any of the first three goes wherever a calibration does: `--calibration tiny.json` of every program, or

    gym.make("llmsched_env:LLMSched-v1", engine={"time_model": "tiny.json", "num_blocks": 512, "max_model_len": 1024})

(`--calibration` takes the number of KV blocks from the file; `gym.make` is told.) What is fitted are the seconds of whole engine
steps: scheduling, execution, sampling and bookkeeping, because an engine stepped synchronously pays for all of them. A server that
schedules asynchronously hides part of it; the seconds of execution alone are in the points file.

`--budget-seconds` bounds the program; what it left out is printed and recorded. A run that was interrupted goes on with `--resume`.
`--set engine.FIELD=VALUE` sets any field of `llmsched_hardware.real_engine.EngineOptions` (`engine.max_num_seqs=256`,
`engine.gpu_memory_utilization=0.9`, `engine.enforce_eager=true`).

## Validate

    python scripts/validate.py --calibration tiny.json --model tiny --scenario azure-conv --length-scale 0.25 --max-total-tokens 1024 \\
        --policies vllm sarathi wait nested-wait --loads 0.5 0.8 1.1 --num-requests 150 --out results/tiny

Writes `runs.csv` (a row a run, as each finishes), `sim_to_real.csv` (every metric by policy and rate: simulator, engine, the
engine's range over repeats, error), `iterations.csv` (every iteration of the engine) and `report.md`, which also says how far the
calibration is off on the engine's own batches and what the simulator does with iteration times of the warm-up runs: an error of the
calibration and one of the simulator are told apart. `--alternate` takes the engine's settings in turn, so that all policies meet the
same drift of the machine. `--rates` gives arrival rates, `--loads` gives them as shares of the fluid
stability boundary. `--length-scale` and `--max-total-tokens` fit a scenario's requests to an engine that takes only short ones; they
are recorded. `--quick` is a small form of all this. With `--clock virtual` time comes from the calibration while the engine
computes: every step must then be the same on the simulator, vLLM's scheduler and the engine, and the exit code says so.
"""

GPU = """## On a GPU: one script

    pip install -e ".[vllm,cli]"
    python scripts/gpu_measure.py --model llama-3-8b-shape --budget-seconds 540 --out measure.tar.gz

In nine minutes on one machine: it describes the machine, sweeps batches (`calibrate.py engine`), runs traffic at loads 0.5, 0.8 and
1.1 under several policies and keeps every iteration, fits these (`calibrate.py from-log`), and holds the simulator with the fit
against the engine on requests it has not seen. If there is time left, schedules under the virtual clock and kernels alone
(`calibrate.py kernels`) follow. Each step is a process of its own with a share of the time; one that fails is recorded and the rest
goes on. The archive is written after every step, on Ctrl-C and on SIGTERM, too: `report.md`, `summary.json`, calibrations, iteration
logs, tables of the validations, and what each step printed. With more time, or for this page, the programs one by one:

    for model in llama-2-7b-shape llama-3-8b-shape; do
        python scripts/calibrate.py engine --model $model --max-batch 256 --budget-seconds 900 --out calibrations/$model.json
        python scripts/validate.py --calibration calibrations/$model.json --model $model --scenario azure-conv \\
            --policies vllm sarathi wait nested-wait --loads 0.7 0.9 1.05 --num-requests 300 --repeats 3 --out results/$model
        python scripts/validate.py --calibration calibrations/$model.json --model $model --scenario azure-conv --clock virtual \\
            --policies vllm sarathi wait nested-wait --loads 0.9 --num-requests 300 --out results/$model-virtual
    done
    python scripts/hardware_page.py --calibrations calibrations/*.json --validations results/llama-* --out docs/hardware.md

They produce one calibration and one sim-to-real table a model, and this page with both. The decode grid reaches 256 requests and a
KV cache that is 97 % full; a load of 1.05 keeps it full.
"""

OPEN = """**This part is open.** No GPU was available when this page was written; the script and the commands above have been run on the CPU
build of vLLM with the shapes `tiny` and `small` alone, and nothing is said here about how close the simulator comes to a GPU.
"""


def shape_table() -> str:
    """The shapes that ship."""
    rows = [
        (
            f"`{name}`",
            shape.layers,
            f"{shape.hidden:,}",
            f"{shape.heads} / {shape.kv_heads}",
            f"{shape.parameters / 1e9:.3g} billion",
            f"{shape.kv_bytes_per_token:,}",
            shape.source,
        )
        for name, shape in SHAPES.items()
    ]
    headings = ("shape", "layers", "hidden", "heads / KV heads", "parameters", "KV bytes a token", "source")
    return "\n".join(table(headings, rows, "lrrrrrl"))


def calibration_section(path: Path) -> str:
    """What a calibration and the tables beside it say of themselves."""
    formula = load_calibration(str(path))
    source = formula.provenance
    facts = [("Device", source.gpu), ("Model", source.model), ("Engine", source.engine), ("Source", source.source)]
    facts += [("KV capacity", f"{source.num_blocks:,} blocks of {source.block_size} tokens")] if source.num_blocks else []
    facts += [("Range", source.valid_range), ("Formula", source.fit_error)]
    tables = path.with_suffix(".npz")
    traffic = path.with_suffix(".traffic.json")
    for name, file in (("Tables", tables), ("Traffic", traffic)):
        if file.exists():
            facts.append((name, load_calibration(str(file)).provenance.fit_error))
    facts.append(("Notes", source.notes))
    parts = [f"### `{path.name}`", "\n".join(f"- {name}: {text}" for name, text in facts)]
    if isinstance(formula, FormulaTime):
        parts.append(_coefficients(formula))
    return "\n\n".join(parts)


def _coefficients(model: FormulaTime) -> str:
    line = f"tau = {1e3 * model.a:.3g} ms + {1e6 * model.b:.3g} us a token"
    if model.knee:
        line += f" (above {model.knee:g} tokens: {1e3 * model.s:.3g} ms + {1e6 * model.c:.3g} us)"
    return (
        f"{line} + {1e6 * model.d4:.3g} us a decode + {1e6 * model.d1:.3g} us a KV token of decodes + {1e6 * model.d2:.3g} us a KV token "
        f"over the root of their number + {1e9 * model.d3:.3g} ns a unit of prefill work."
    )


def validation_section(folder: Path) -> str:
    """The table of one validation, recomputed from its rows.

    Raises:
        ConfigError: a folder without a validation.
    """
    report = folder / REPORT_FILE
    if not report.exists():
        raise ConfigError(f"--validations: {folder} holds no {REPORT_FILE}")
    text = report.read_text(encoding="utf-8").splitlines()
    title = text[0].removeprefix("# ")
    facts = "\n".join(line for line in text if line.startswith("- ") and not line.startswith("- Calibration:"))
    if (folder / SCHEDULES_FILE).exists():
        checks = read_rows(folder / SCHEDULES_FILE, Schedules)
        same, steps = sum(c.identical for c in checks), sum(c.steps for c in checks)
        evictions = sum(c.evictions for c in checks)
        sentence = (
            f"**{same} of {len(checks)} episodes identical** on the simulator and on {' and '.join(sorted({c.backend for c in checks}))}: "
            f"{steps:,} steps and {evictions:,} evictions compared, every report of every step and all times of every request."
        )
        return "\n\n".join([f"### {title}: virtual clock ({folder.name})", facts, sentence])
    runs = read_rows(folder / RUNS_FILE, Run)
    found = gaps(runs, list(dict.fromkeys(run.policy for run in runs)))
    ranks = rankings(found)
    parts = [
        f"### {title}: measured clock ({folder.name})",
        facts,
        "Error of the simulator (spread of the engine):",
        error_table(found),
        noise_sentence(found),
    ]
    if ranks:
        parts += [ranking_sentence(ranks), ranking_table(ranks)]
    parts += [f"##{part}" for part in _sections(text) if part.startswith(ITERATION_HEADINGS)]
    return "\n\n".join(parts)


def _sections(lines: Sequence[str]) -> list[str]:
    """Parts of a report that begin with a heading of the second level."""
    found: list[list[str]] = []
    for line in lines:
        if line.startswith("## "):
            found.append([line])
        elif found:
            found[-1].append(line)
    return ["\n".join(part).strip() for part in found]


def page(calibrations: Sequence[Path], validations: Sequence[Path]) -> str:
    """The whole page.

    Raises:
        ConfigError: a file or folder that is not what it should be.
    """
    models = [load_calibration(str(path)) for path in calibrations]
    on_gpu = any(", driver " in model.provenance.gpu for model in models) and any(map(_ran_on_gpu, validations))
    files = "\n".join(table(("file", "what it is"), FILES, "l"))
    parts = [CALIBRATE.strip(), files, VALIDATE.strip(), shape_table(), GPU.strip()]
    if not on_gpu:
        parts.append(OPEN.strip())
    if calibrations:
        parts += ["## Measured: calibrations", *map(calibration_section, calibrations)]
    if validations:
        parts += ["## Measured: simulator against engine", DEFINITIONS, *map(validation_section, validations)]
    return "\n\n".join(parts) + "\n"


def _ran_on_gpu(folder: Path) -> bool:
    if not (folder / MACHINE_FILE).exists():
        raise ConfigError(f"--validations: {folder} holds no {MACHINE_FILE}")
    return read_machine(folder)["driver"] is not None
