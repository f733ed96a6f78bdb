"""`llmsched advise` beside vLLM: its parser takes the command lines, its defaults are the default, its engine can check the advice."""

from __future__ import annotations

import importlib.util
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:  # importing it would read its settings before they have been made
    pytest.skip("vLLM is not installed here (make test-vllm)", allow_module_level=True)

from llmsched_agents.lookup import named_policies
from llmsched_env.bench.advice import Case, Choice, parse_objective
from llmsched_env.bench.advice_check import Run
from llmsched_env.bench.advice_serve import check_server, start_of
from llmsched_env.cli import advise
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError
from llmsched_env.perf import FormulaTime, Provenance, save_calibration
from llmsched_env.row_file import read_rows
from llmsched_env.workload import load_scenario
from llmsched_hardware.options import SCHEDULER_CLASS, SETTINGS
from llmsched_hardware.serve_defaults import serve_limits
from llmsched_hardware.versions import cpu_block_size, installed, prepare_environment

POLICIES = ("vllm", "sarathi", "prefill-threshold", "prefill-cadence", "active-cap", "nested-wait", "generalist", "slo", "reserve")
# About as fast as a CPU runs the tiny model; nothing that is asserted depends on it.
SOURCE = Provenance(name="made-up", gpu="a CPU", num_blocks=2_048 // cpu_block_size(), block_size=cpu_block_size())
MODEL = FormulaTime(2e-3, 5e-6, 2e-3, 5e-6, 3e-7, 0.0, 5e-9, 2e-5, provenance=SOURCE)


def parsed(words: list[str]) -> Any:
    """The words of ``vllm serve`` as its own parser reads them."""
    prepare_environment()
    from vllm.entrypoints.cli.serve import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser()).parse_args(words)


@pytest.mark.parametrize("name", POLICIES)
def test_vllm_reads_the_command_line_of_every_policy(name: str) -> None:
    engine = EngineConfig.vllm(max_num_batched_tokens=1_024, max_num_seqs=64, max_model_len=2_048)
    scenario = replace(load_scenario("lmsys"), engine=engine)
    case = Case(scenario, named_policies("--policies", [name]), 5.0, 100, 1, 2, parse_objective("latency"))
    policy = case.build(Choice(name))
    try:
        check_server(policy, installed()[1])
    except ConfigError as refusal:
        assert "needs vLLM" in str(refusal)
        return
    given = [setting.name for setting in SETTINGS if not setting.since or setting.known()]
    begin = start_of(case, Choice(name), given)
    command = shlex.split(begin.command("my/model"))
    command = command[command.index("vllm") :]
    assert command[:3] == ["vllm", "serve", "my/model"]
    read = parsed(command[3:])
    for setting in SETTINGS:
        value = setting.to_vllm(getattr(policy.engine, setting.name))
        if setting.name in given and value is not None:
            found = getattr(read, setting.argument)
            assert found is value if isinstance(value, bool) else found == pytest.approx(value)
    assert read.scheduler_cls == (SCHEDULER_CLASS if begin.policy else None)


def test_the_parser_refuses_what_is_no_flag() -> None:
    with pytest.raises(SystemExit):
        parsed(["--max-number-of-anything", "3"])


def test_the_default_is_vllms_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """For devices by name and memory as vLLM asks its platform for them, and for this machine without a GPU."""
    prepare_environment()
    from vllm.engine import arg_utils
    from vllm.usage.usage_lib import UsageContext

    def own(**changes: Any) -> tuple[int, int]:
        for name, value in changes.items():
            monkeypatch.setattr(arg_utils.current_platform, name, lambda *_, value=value: value, raising=False)
        tokens, seqs = arg_utils.EngineArgs.get_batch_defaults(1)
        return tokens[UsageContext.OPENAI_API_SERVER], seqs[UsageContext.OPENAI_API_SERVER]

    def ours(device: str) -> tuple[int, int]:
        limits = serve_limits(device)
        return limits.max_num_batched_tokens, limits.max_num_seqs

    assert own() == ours("Intel(R) Xeon(R) Processor")
    gib = 2**30
    large = {"NVIDIA A100-SXM4-80GB": 80, "NVIDIA H100 80GB HBM3": 80, "NVIDIA H200": 141, "NVIDIA B200": 180}
    for device, memory in {**large, "NVIDIA L40S": 48, "NVIDIA L4": 24}.items():
        answers = {"is_cpu": False, "is_tpu": False, "is_device_capability": False}
        assert own(get_device_total_memory=memory * gib, get_device_name=device, **answers) == ours(device), device


def test_an_advice_is_checked_on_an_engine(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "service.toml").write_text(
        "num_requests = 40\n[lengths]\ntypes = { prompt = [60, 20], output = [6, 12], weight = [1.0, 1.0] }\n"
        "[arrivals]\nprocess = 'poisson'\nrate = 60.0\n"
    )
    save_calibration(MODEL, tmp_path / "made-up.json")
    out = tmp_path / "out"
    words = ["--calibration", tmp_path / "made-up.json", "--scenario", tmp_path / "service.toml", "--out", out, "--jobs", 1, "--quiet"]
    words += ["--selection", 2, "--evaluation", 3, "--finalists", 2, "--budget", 60, "--policies", "vllm"]
    words += ["--json", tmp_path / "found.json"]
    words += ["--set", "engine.max_model_len=256", "engine.max_num_seqs=4", "engine.max_num_batched_tokens=64"]
    words += ["--validate", "tiny", "--repeats", 2, "--validate-parts", 1, "--validate-requests", 20]
    given = [str(word) for word in words]
    assert advise.main(given) == 0
    record = json.loads((tmp_path / "found.json").read_text())["found"]
    runs = read_rows(out / "engine.csv", Run)
    counted = [run for run in runs if not run.warm_up]
    assert sorted({(run.backend, run.repeat) for run in counted}) == [("sim", 0), ("vllm", 0), ("vllm", 1)]
    assert len(counted) == 6 and all(run.figures.completed == 20 for run in counted)
    by_metric = {one["metric"]: one for one in record["engine"]}
    measured = by_metric["latency_mean"]["measured"]
    assert measured["seeds"] == 2 and measured["low"] <= measured["value"] <= measured["high"]
    assert "## On the engine" in (out / "report.md").read_text() and "On the engine: mean latency" in capfd.readouterr().out
    assert advise.main([*given, "--resume"]) == 0  # nothing is missing: no engine is started
    assert read_rows(out / "engine.csv", Run) == runs
