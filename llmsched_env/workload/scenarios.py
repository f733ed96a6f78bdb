"""Named workloads: lengths, arrivals, engine and queue layout that belong together.

======================  ======================================  ============================  =================
name                    lengths                                 arrivals (default)            engine
======================  ======================================  ============================  =================
two-type                (10, 10) and (10, 20), 2 : 1            Poisson 3/s                   paper, C = 3750
nested-two-type         the same, lengths hidden                Poisson 3/s                   paper, C = 5003
p512d20                 (512, 20)                               Poisson 18/s                  vllm
lmsys                   published summary of LMSYS-Chat-1M      Poisson 30/s                  vllm
azure-conv              joint quantiles, Azure 2023 chat        Poisson 5/s                   vllm
azure-conv-40gb         the same                                Poisson 6.5/s                 vllm, 2,816 blocks
azure-conv-40gb-bursts  the same                                MMPP-2, 2/s and 11/s          vllm, 2,816 blocks
azure-code              joint quantiles, Azure 2023 code        Gamma 4/s, measured CV        vllm
sharegpt                joint quantiles, ShareGPT               Poisson 8/s                   vllm
mooncake                joint quantiles, Mooncake conversation  Poisson 0.4/s                 vllm, 32,768 tokens
tenants                 azure-conv, and long requests of one    Poisson 3/s, and MMPP-2 of    vllm, 2,816 blocks
                        tenant of four                          that one, 0.5/s
======================  ======================================  ============================  =================

``vllm`` stands for Llama-2-7B on one A100-80GB, the defaults of ``EngineConfig.vllm()``. The default
rates are round numbers at 0.6 to 0.8 of the fluid stability boundary; ``azure-code`` stays at 0.4 of it, as its bursts queue up long
before, and the two of 40 GB go to 1.2 and 0.9 of theirs.

Default layouts of workloads without types: hidden lengths (``layout``) are one class with four
segments that end at the quartiles of the output length; known lengths (``known_layout``) four classes
with the same quartiles as edges.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import replace

from llmsched_env import checks
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError
from llmsched_env.registry import SCENARIOS
from llmsched_env.types import QueueLayout
from llmsched_env.workload.arrivals import MMPP2, ArrivalProcess, Gamma, Poisson
from llmsched_env.workload.lengths import Lognormal, Types
from llmsched_env.workload.scenario import DEFAULT_MODEL_LEN, Scenario, bucket_edges, bucket_layout, hidden_layout
from llmsched_env.workload.scenario_files import is_scenario_file, read_scenario
from llmsched_env.workload.tables import load_lengths
from llmsched_env.workload.tenants import Tenant, TenantMix

# --- built-in scenarios ---------------------------------------------------------------------------

_PAPER_TYPES = Types((10, 10), (10, 20), (2.0, 1.0))
_PAPER = "arXiv 2504.11320 v4 (types and thresholds), own simulation of its linear model"


def _two_type() -> Scenario:
    return Scenario(
        name="two-type",
        description="Two known types (prompt, output) = (10, 10) at 2/s and (10, 20) at 1/s, d0 = 1 s, d1 = 1 ms/token. "
        "C = 3750 = 1.25 M*, the memory of WAIT (10, 5): it never evicts, greedy FCFS collapses. "
        "Limits are 10 and 2 fluid iteration times (DT* = 4 s).",
        source=_PAPER,
        lengths=_PAPER_TYPES,
        arrivals=Poisson(3.0),
        engine=EngineConfig.paper(3750, d0=1.0, d1=1e-3),
        layout=QueueLayout(segment_ends=(10,)),
        known_layout=QueueLayout(by="type", num_types=2),
        ttft_slo=40.0,
        tpot_slo=8.0,
    )


def _nested_two_type() -> Scenario:
    return replace(
        _two_type(),
        name="nested-two-type",
        description="The types of two-type with hidden lengths: one class, segments (0, 10] and (10, 20]. C = 5003 is M_req of "
        "Nested WAIT (16, 6) for an overflow probability of 0.1 in 20,000 s; M^pi is 4170.",
        engine=EngineConfig.paper(5003, d0=1.0, d1=1e-3),
    )


def _p512d20() -> Scenario:
    return Scenario(
        name="p512d20",
        description="One type, prompt 512 and output 20 tokens: prefill binds.",
        source="arXiv 2504.11320 v4, section 6 (rates 12 to 24 requests/s)",
        lengths=Types((512,), (20,), (1.0,)),
        arrivals=Poisson(18.0),
        engine=EngineConfig.vllm(),
        layout=QueueLayout(),
        known_layout=QueueLayout(by="type"),
    )


def _from_table(name: str, description: str, rate: float, *, bursty: bool = False, max_model_len: int = DEFAULT_MODEL_LEN) -> Scenario:
    lengths = load_lengths(name)
    statistics = lengths.statistics()
    arrivals: ArrivalProcess = Poisson(rate)
    if bursty:
        # Of the requests kept: those left out arrive among them and their gaps do not count.
        arrivals = Gamma(rate, float(lengths.record["arrivals"]["kept"]["gap_cv"]))
    return Scenario(
        name=name,
        description=description,
        source=lengths.source,
        lengths=lengths,
        arrivals=arrivals,
        engine=EngineConfig.vllm(max_model_len=max_model_len),
        layout=hidden_layout(statistics),
        known_layout=bucket_layout(statistics),
    )


def _lmsys() -> Scenario:
    text = "Short chat: mean prompt 58, mean output 148 tokens, both below 500. The cap of 256 sequences binds."
    return _from_table("lmsys", text, 30.0)


def _azure_conv() -> Scenario:
    text = (
        "Azure conversation service, November 2023, requests of at most 4,096 tokens (8.3 % are longer and left out): "
        "mean 878 + 224 tokens. KV memory binds. Arrivals Poisson; the trace has 5.53 requests/s with gap CV 1.09."
    )
    return _from_table("azure-conv", text, 5.0)


def _azure_conv_40gb() -> Scenario:
    base = _azure_conv()
    statistics = base.statistics
    edges = bucket_edges(statistics.prompt, statistics.weight, 4)
    return replace(
        base,
        name="azure-conv-40gb",
        description="azure-conv on a GPU of 40 GB, whose 2,816 blocks hold some forty requests, at 6.5 requests/s, which is more "
        "than they bear: 500 requests queue up within 77 s. Four classes by prompt length, two segments. "
        "The environment of the first evening: whom to let in, and how many, is worth a third of the mean latency and more.",
        arrivals=Poisson(6.5),
        engine=base.engine.replace(num_blocks=2_816),
        num_requests=500,
        layout=QueueLayout("prompt", edges, segment_ends=base.layout.segment_ends[1:2]),
    )


def _azure_conv_40gb_bursts() -> Scenario:
    return replace(
        _azure_conv_40gb(),
        name="azure-conv-40gb-bursts",
        description="azure-conv-40gb with quiet spells and bursts: 2 requests/s for 30 s, then 11 for 15 s, on average; 5 over all.",
        arrivals=MMPP2(2.0, 11.0, 30.0, 15.0),
    )


def _azure_code() -> Scenario:
    text = (
        "Azure code completion, November 2023, requests of at most 4,096 tokens (14.3 % are longer and left out): "
        "mean 1373 + 28 tokens. Prefill binds. Arrivals Gamma with the gap CV of the requests kept, 12.2 (13.2 over the whole "
        "trace, 2.57 requests/s): minutes of silence and bursts. Its dispersion of counts matches the trace from about 30 s "
        "upwards and exceeds it below; the realised rate of n requests scatters by 12/sqrt(n)."
    )
    return _from_table("azure-code", text, 4.0, bursty=True)


def _sharegpt() -> Scenario:
    text = "ShareGPT conversations (Llama-2 tokens): mean 246 + 326 tokens. KV memory binds. Arrivals Poisson, the data has none."
    return _from_table("sharegpt", text, 8.0)


def _mooncake() -> Scenario:
    text = (
        "Mooncake conversation service, requests of at most 32,768 tokens (7.0 % are longer and left out): mean 8628 + 337 tokens. "
        "Long prompts: a dozen requests fill the KV cache. Arrivals Poisson; the trace has 3.4 requests/s on a cluster, stamped in "
        "steps of 3 s. Llama-2-7B has a context of 4,096 tokens: beyond it the iteration times are extrapolated."
    )
    return _from_table("mooncake", text, 0.4, max_model_len=32_768)


def _tenants() -> Scenario:
    base = _azure_conv_40gb()
    long = Lognormal(2_000, 0.3, 400, 0.4, max_prompt=3_000, max_output=1_000, max_total=DEFAULT_MODEL_LEN)
    mix = TenantMix(
        (
            Tenant("chat", share=2.0),
            Tenant("assistant", share=1.0),
            Tenant("premium", weight=2.0, share=1.0, ttft_slo=0.5),
            Tenant("batch", ttft_slo=30.0, tpot_slo=0.2, arrivals=MMPP2(0.0, 3.5, 60.0, 10.0), lengths=long),
        )
    )
    arrivals, lengths = mix.scenario_parts(Poisson(3.0), base.lengths)
    statistics = lengths.statistics()
    return replace(
        base,
        name="tenants",
        description="Four tenants on a GPU of 40 GB. Three send conversations of azure-conv, 3 requests/s together; the fourth, batch, "
        "sends nothing for 60 s and then 3.5 requests/s of about 2,000 + 400 tokens for 10 s, on average: a noisy neighbour, whose bursts "
        "fill the memory for as long as they are served first come, first served. premium is entitled to twice the service of the others.",
        source=f"{base.source}; lengths and arrivals of batch are our own",
        lengths=lengths,
        arrivals=arrivals,
        layout=mix.layout,
        known_layout=bucket_layout(statistics),
        tenants=mix,
    )


_BUILDERS: dict[str, Callable[[], Scenario]] = {
    "two-type": _two_type,
    "nested-two-type": _nested_two_type,
    "p512d20": _p512d20,
    "lmsys": _lmsys,
    "azure-conv": _azure_conv,
    "azure-conv-40gb": _azure_conv_40gb,
    "azure-conv-40gb-bursts": _azure_conv_40gb_bursts,
    "azure-code": _azure_code,
    "sharegpt": _sharegpt,
    "mooncake": _mooncake,
    "tenants": _tenants,
}
SCENARIOS.built_in(_BUILDERS)


def scenario_names() -> list[str]:
    """Names of the scenarios that ship, that this program registered and that installed packages offer."""
    return SCENARIOS.names()


def load_scenario(name: str) -> Scenario:
    """A scenario by its name, or in a TOML file (``llmsched_env/workload/scenario_files.py``).

    Raises:
        ConfigError: unknown name (the nearest one is given), a file that is refused, or a package's scenario that is none.
    """
    if isinstance(name, str) and is_scenario_file(name):
        return read_scenario(name)
    return _built(name, SCENARIOS.find(name, "; or a .toml file, or module:attribute"))


@functools.lru_cache(maxsize=128)  # statistics of a scenario are computed once
def _built(name: str, thing: object) -> Scenario:
    if callable(thing):
        with checks.told(f"scenario: {name!r}"):
            thing = thing()
    if isinstance(thing, str | os.PathLike):
        return read_scenario(thing)
    if not isinstance(thing, Scenario):
        raise ConfigError(f"scenario: {name!r} is {checks.shown(thing)}, must be a Scenario, a function that gives one or a TOML file")
    return thing
