"""One program, two policies, three backends: ``llmsched swap-backends``."""

from __future__ import annotations

import importlib.util
import re

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here (make test-vllm)", allow_module_level=True)

from llmsched_env.cli import swap_backends
from llmsched_hardware.swap import Swap

ARGUMENTS = ["--requests", "8", "--num-blocks", "300"]


def test_the_same_policies_on_three_backends(capfd: pytest.CaptureFixture[str]) -> None:
    assert swap_backends.main(ARGUMENTS) == 0
    output = capfd.readouterr().out
    for policy in ("nested-wait", "torch (random weights)"):
        assert policy in output
    rows = re.findall(r"^  (sim|vllm-scheduler|vllm)  +(.+)$", output, flags=re.MULTILINE)
    assert [name for name, _ in rows] == list(swap_backends.BACKENDS) * 2
    assert len({figures for _, figures in rows[:3]}) == len({figures for _, figures in rows[3:]}) == 1
    assert len(re.findall(r"steps, identical on sim, vllm-scheduler, vllm: requests, tokens, preemptions and times", output)) == 2


def test_a_difference_is_found(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A backend with other settings must not pass as identical."""
    original = Swap.backend_config

    def other_clock(self: Swap, backend: str) -> dict[str, object]:
        config = original(self, backend)
        return {**config, "clock": "measured"} if backend == "vllm" else config

    monkeypatch.setattr(Swap, "backend_config", other_clock)
    assert swap_backends.main([*ARGUMENTS, "--backends", "sim", "vllm", "--requests", "4"]) == 1
    assert "sim and vllm did not schedule the same" in capfd.readouterr().err
