"""A vLLM engine in this process: built from plain settings, stepped one iteration at a time, freed.

Nothing of vLLM is imported until an engine is built, so settings can be checked where vLLM is not
installed. The same code runs on the CPU build and on CUDA.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import gc
import os
import platform
import shutil
import subprocess
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError, EngineError, did_you_mean
from llmsched_hardware.options import FIXED, SETTINGS, differing, engine_arguments, setting_names, settings_of
from llmsched_hardware.shapes import is_shape, model_shape, write_shape
from llmsched_hardware.versions import cpu_block_size, installed, prepare_environment, shield_llvmlite

GPU_BLOCK_SIZE = 16
"""vLLM's default for most attention on CUDA."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Settings of a real engine.

    Attributes:
        model: ``tiny`` (a Llama of two layers with seeded random weights, written to a temporary
            folder), another name of ``llmsched_hardware.shapes`` (dummy weights), a Hugging Face id, or a folder.
        load_format: vLLM's; ``dummy`` gives any model's shape without its weights.
        dtype: vLLM's; ``auto`` is float32 for ``tiny`` on a CPU.
        max_model_len: longest prompt + output, tokens.
        max_num_seqs: most residents at once.
        max_num_batched_tokens: token budget of an iteration.
        num_blocks: usable KV blocks; None: as many as vLLM finds room for.
        block_size: tokens per block; None: 16, or on a CPU the fewest that vLLM's attention takes there.
        enable_chunked_prefill, scheduler_reserve_full_isl, watermark, max_num_active_seqs, long_prefill_token_threshold,
            prefill_schedule_interval: as in ``EngineConfig``; the last three need a vLLM that has them (``options.SETTINGS``).
        gpu_memory_utilization: share of the GPU's memory that vLLM may take (CUDA).
        enforce_eager: no CUDA graphs, no compilation; always so on a CPU.
        seed: of vLLM and of the weights of ``tiny``.
        extra: further ``vllm.EngineArgs`` by name.
    """

    model: str = "tiny"
    load_format: str = "auto"
    dtype: str = "auto"
    max_model_len: int = 2_048
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2_048
    num_blocks: int | None = None
    block_size: int | None = None
    enable_chunked_prefill: bool = True
    scheduler_reserve_full_isl: bool = True
    watermark: float = 0.0
    max_num_active_seqs: int | None = None
    long_prefill_token_threshold: int = 0
    prefill_schedule_interval: int = 1
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False
    seed: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise ConfigError(f"model: {self.model!r}, must be 'tiny', a shape's name, a Hugging Face id or a folder")
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "num_blocks"):
            value = getattr(self, name)
            if name in ("num_blocks", "block_size") and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}: {value!r}, must be an integer >= 1")
        block = self.block_size or GPU_BLOCK_SIZE
        if self.num_blocks is not None and self.max_model_len > self.num_blocks * block:
            held = f"{self.num_blocks * block} tokens ({self.num_blocks} blocks of {block})"
            raise ConfigError(f"max_model_len: {self.max_model_len}, must fit the KV cache: <= {held}")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(f"gpu_memory_utilization: {self.gpu_memory_utilization!r}, must be in (0, 1]")
        if not isinstance(self.extra, Mapping):
            raise ConfigError(f"extra: {self.extra!r}, must be a mapping of vllm.EngineArgs by name")
        fixed = sorted(set(self.extra) & _FIXED)
        if fixed:
            raise ConfigError(f"extra.{fixed[0]}: set by llmsched_env, cannot be given here")

    @classmethod
    def of(cls, engine: EngineConfig, **settings: Any) -> EngineOptions:
        """The options under which a real engine schedules as ``engine`` says; ``settings`` are the remaining fields.

        Raises:
            ConfigError: an ``engine`` vLLM has no form for, a setting that is unknown or belongs to ``engine``.
        """
        if engine.preset != "vllm":
            raise ConfigError(f"engine.preset: {engine.preset!r}, must be 'vllm' on a real engine")
        if engine.scheduling_policy != "fcfs":
            raise ConfigError(f"engine.scheduling_policy: {engine.scheduling_policy!r}, must be 'fcfs' on a real engine")
        of_engine = setting_names()
        allowed = [f.name for f in dataclasses.fields(cls) if f.name not in of_engine]
        for name in settings:
            if name in of_engine:
                raise ConfigError(f"backend_config.{name}: belongs to the environment's engine settings, such as engine={{'{name}': ...}}")
            if name not in allowed:
                hint = did_you_mean(name, allowed)
                raise ConfigError(f"backend_config.{name}: unknown{hint} (allowed: {', '.join(allowed)})")
        return cls(**{name: getattr(engine, name) for name in of_engine}, **settings)


# What keeps one step one iteration, and what EngineOptions has a field for.
_FIXED = frozenset(
    {
        *(name for name in EngineOptions.__dataclass_fields__ if name != "extra"),
        *(setting.argument for setting in SETTINGS),
        *FIXED,
        "scheduler_cls",
        "scheduling_policy",
        "speculative_config",
    }
)


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a measurement was taken.

    Attributes:
        device: name of the GPU, or of the CPU.
        driver: version of the GPU's driver; None on a CPU.
        vllm, torch: versions.
        model, dtype: as vLLM resolved them.
        num_blocks: usable KV blocks (vLLM's ``num_gpu_blocks`` counts one null block more).
        block_size: tokens per block.
        date: UTC, ISO 8601.
    """

    device: str
    driver: str | None
    vllm: str
    torch: str
    model: str
    dtype: str
    num_blocks: int
    block_size: int
    date: str


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """Seconds of one iteration, or of many.

    Attributes:
        whole: ``LLMEngine.step()``: schedule, execute, update, and the output processor in front.
        schedule: vLLM's scheduler with our gate.
        execute: forward pass and sampling, until the tokens are on the host.
        update: vLLM's bookkeeping of the tokens.
    """

    whole: float = 0.0
    schedule: float = 0.0
    execute: float = 0.0
    update: float = 0.0

    def __add__(self, other: StepSeconds) -> StepSeconds:
        return StepSeconds(
            self.whole + other.whole, self.schedule + other.schedule, self.execute + other.execute, self.update + other.update
        )


# Engines alive in this process: they share torch's process groups, which only the last one may end.
_live: weakref.WeakSet[Any] = weakref.WeakSet()


def load_vllm() -> type:
    """Import vLLM in an environment that suits it; the scheduler of its engines.

    Raises:
        MissingExtraError, ConfigError: as ``llmsched_hardware.versions.check_version``.
    """
    prepare_environment()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # whatever the user has set: another process's scheduler is out of reach
    from llmsched_hardware.gated_scheduler import GatedScheduler

    shield_llvmlite()
    return GatedScheduler


def build_engine(options: EngineOptions, scheduler_cls: type | None = None) -> Any:
    """A ``vllm.LLMEngine`` whose every ``step()`` is one iteration: schedule, execute, update.

    Args:
        scheduler_cls: default ``GatedScheduler``; a subclass of it.

    Raises:
        MissingExtraError: vLLM is not installed.
        ConfigError: an unsupported vLLM version, or settings that vLLM refuses.
        EngineError: the engine cannot start, for instance for lack of memory.
    """
    gated_scheduler = load_vllm()
    import vllm

    options = with_block_size(options)

    unknown = sorted(set(options.extra) - {f.name for f in dataclasses.fields(vllm.EngineArgs)})
    if unknown:
        hint = did_you_mean(unknown[0], [f.name for f in dataclasses.fields(vllm.EngineArgs)])
        raise ConfigError(f"extra.{unknown[0]}: vllm.EngineArgs has no such field{hint}")
    model, load_format, dtype = _model(options)
    try:
        engine = vllm.LLMEngine.from_engine_args(
            vllm.EngineArgs(
                model=model,
                load_format=load_format,
                dtype=dtype,
                gpu_memory_utilization=options.gpu_memory_utilization,
                enforce_eager=options.enforce_eager or _on_cpu(),
                seed=options.seed,
                scheduler_cls=scheduler_cls or gated_scheduler,
                use_tqdm_on_load=False,
                **engine_arguments(options),
                **options.extra,
            )
        )
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        _release(None)
        raise ConfigError(f"vLLM refuses these engine settings ({options.model}): {_first_lines(error)}") from error
    except Exception as error:
        _release(None)
        raise EngineError(f"the vLLM engine ({options.model}) cannot start: {describe_failure(error)}") from error
    _live.add(engine)
    try:
        _check_agreement(engine, options)
    except ConfigError:
        free_engine(engine)
        raise
    return engine


def least_block_size() -> int:
    """Block sizes of an engine on this machine are multiples of it, tokens. Imports vLLM."""
    return cpu_block_size() if _on_cpu() else GPU_BLOCK_SIZE


def with_block_size(options: EngineOptions) -> EngineOptions:
    """The same options, the block size filled in.

    Raises:
        ConfigError: one was asked for that attention on this machine does not take.
    """
    if options.block_size is None:
        return dataclasses.replace(options, block_size=least_block_size())
    if _on_cpu() and options.block_size % least_block_size():
        raise ConfigError(
            f"engine.block_size: {options.block_size}, must be a multiple of {least_block_size()} for vLLM {installed()[1]} on a CPU; "
            f"with as much memory: engine.block_size={least_block_size()} and a number of blocks to match"
        )
    return options


def check_sampling(options: EngineOptions) -> None:
    """Refuse random sampling where it ends the engine.

    Where a prompt is computed in parts, vLLM turns the random numbers of a request with a seed back after every part but the last
    (``vllm/v1/worker/gpu_model_runner.py``, ``_bookkeeping_sync``, 0.28.0 to 0.33.0), which a CPU's generator cannot do (tried with
    0.28.0 to 0.32.0).

    Raises:
        ConfigError: on a CPU with chunked prefill.
    """
    load_vllm()
    if _on_cpu() and options.enable_chunked_prefill:
        raise ConfigError(
            "backend_config.temperature: must be 0 for vLLM on a CPU with engine.enable_chunked_prefill=True: a seeded request whose "
            "prompt is computed in parts ends its engine; with engine.enable_chunked_prefill=False, or on a GPU, it may be above"
        )


def _check_agreement(engine: Any, options: EngineOptions) -> None:
    """vLLM adjusts settings for some models and platforms; a simulator told otherwise would be wrong.

    Raises:
        ConfigError: naming the setting, what was asked for and what the engine has.
    """
    scheduler = engine_scheduler(engine)
    groups = scheduler.kv_cache_config.kv_cache_groups
    kinds = [type(group.kv_cache_spec).__name__ for group in groups]
    if kinds != ["FullAttentionSpec"] or getattr(groups[0].kv_cache_spec, "sliding_window", None):
        raise ConfigError(f"model: {options.model} keeps its KV cache as {kinds}; only full attention in every layer is supported")
    for setting, wanted, found in differing(options, SimpleNamespace(**settings_of(scheduler))):
        raise ConfigError(f"{setting.name}: asked for {wanted}, but vLLM runs {options.model} with {found}; set it to that")


def free_engine(engine: Any) -> None:
    """Shut an engine down and give its memory back; a second call does nothing."""
    if engine not in _live:
        return
    _live.discard(engine)
    _release(engine)


def _release(engine: Any) -> None:
    # A broken engine may fail in any of this, and the memory matters more than a tidy end.
    if engine is not None:
        core = engine.engine_core.engine_core
        with contextlib.suppress(Exception):
            if _live:  # EngineCore.shutdown would end the process groups under the others
                core.model_executor.shutdown()
                core.scheduler.shutdown()
            else:
                engine.engine_core.shutdown()
        with contextlib.suppress(Exception):
            core.model_executor = core.scheduler = None
            engine.model_executor = None
    elif not _live:
        with contextlib.suppress(Exception):
            from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()
    gc.collect()
    with contextlib.suppress(Exception):
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def engine_scheduler(engine: Any) -> Any:
    """The engine's scheduler object."""
    return engine.engine_core.engine_core.scheduler


def num_usable_blocks(engine: Any) -> int:
    """KV blocks that requests can use: vLLM's number less the null block."""
    return int(engine_scheduler(engine).kv_cache_manager.block_pool.num_gpu_blocks) - 1


def describe_machine(engine: Any) -> Machine:
    """Device, driver, versions and KV blocks of a running engine."""
    import torch
    import vllm

    config = engine.vllm_config
    cuda = not _on_cpu()
    return Machine(
        device=torch.cuda.get_device_name() if cuda else _cpu_name(),
        driver=_driver() if cuda else None,
        vllm=vllm.__version__,
        torch=torch.__version__,
        model=str(config.model_config.model),
        dtype=str(config.model_config.dtype).removeprefix("torch."),
        num_blocks=num_usable_blocks(engine),
        block_size=int(engine_scheduler(engine).block_size),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def describe_scheduler(scheduler: Any, model: str | None = None) -> dict[str, Any]:
    """The engine around a scheduler of vLLM, as the heading of an iteration log says it: plain values by name.

    The GPU is not asked through torch, which would take memory of it where the scheduler stands in a process of its own.

    Args:
        model: default the name it is served under.
    """
    import torch
    from vllm.platforms import current_platform

    config, on_cpu = scheduler.vllm_config, _on_cpu()
    if on_cpu:
        device = _cpu_name()
    elif current_platform.is_unspecified():  # a CUDA build without a GPU
        device = "no device"
    else:
        device = str(current_platform.get_device_name())
    return {
        "device": device,
        "vllm": installed()[1],
        "torch": torch.__version__,
        "model": str(config.model_config.served_model_name) if model is None else model,
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads() if on_cpu else None,
        "enforce_eager": bool(config.model_config.enforce_eager),
        "tensor_parallel_size": int(config.parallel_config.tensor_parallel_size),
        "asynchronous": bool(scheduler.scheduler_config.async_scheduling),
        "prefix_caching": bool(config.cache_config.enable_prefix_caching),
        **settings_of(scheduler),
    }


def prompt_token_ids(seed: int, request: int, length: int, vocabulary: int) -> list[int]:
    """Random token ids of one prompt; the same for the same seed and request. The first ids, which mark begin and end, are left out."""
    low = min(8, vocabulary - 1)
    ids: npt.NDArray[np.int64] = np.random.default_rng((seed, request)).integers(low, vocabulary, length)
    listed: list[int] = ids.tolist()
    return listed


def vocabulary_size(engine: Any) -> int:
    return int(engine.vllm_config.model_config.get_vocab_size())


def add_request(
    engine: Any,
    request_id: str,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    ignore_eos: bool = True,
    stop_token_ids: Sequence[int] = (),
    temperature: float = 0.0,
    seed: int | None = None,
) -> str:
    """Hand one request of token ids to the engine; outputs come once, when it finishes. Returns vLLM's internal id.

    Raises:
        ConfigError: the engine refuses the request.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        max_tokens=max_tokens,
        ignore_eos=ignore_eos,
        stop_token_ids=list(stop_token_ids),
        temperature=temperature,
        seed=seed,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    try:
        internal: str = engine.add_request(request_id, {"prompt_token_ids": list(prompt)}, params)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"request {request_id}: the engine refuses it: {_first_lines(error)}") from error
    return internal


def timed_step(engine: Any) -> tuple[list[Any], StepSeconds]:
    """One iteration. Returns the outputs of the requests that finished, and where the time went.

    Raises:
        EngineError: the engine has died; free it, it cannot go on.
    """
    scheduler = engine_scheduler(engine)
    scheduler.forget_times()
    start = time.perf_counter()
    try:
        outputs = engine.step()
    except Exception as error:
        raise EngineError(f"the vLLM engine died: {describe_failure(error)}") from error
    whole = time.perf_counter() - start
    return outputs, StepSeconds(whole, scheduler.schedule_seconds, scheduler.execute_seconds, scheduler.update_seconds)


def describe_failure(error: BaseException) -> str:
    """The cause in one line, with what to do where memory ran out."""
    text = f"{type(error).__name__}: {_first_lines(error)}"
    if type(error).__name__ in ("OutOfMemoryError", "MemoryError") or "out of memory" in str(error).lower():
        text += " (out of memory: lower gpu_memory_utilization, engine.num_blocks or engine.max_num_batched_tokens)"
    return text


def _first_lines(error: BaseException, limit: int = 600) -> str:
    details = getattr(error, "errors", None)  # pydantic's ValidationError, whose own text ends in a dump of the input
    if callable(details):
        text = "; ".join(f"{'.'.join(map(str, d['loc']))} {d['msg']}, given {str(d['input'])[:60]}".strip() for d in details())
    else:
        text = " ".join(str(error).split())
    return text if len(text) <= limit else text[:limit] + " ..."


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        lines = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout.split()
        return lines[0] if lines else None
    return None


# --- models written here ------------------------------------------------------------------------------
_folders: dict[tuple[Any, ...], Path] = {}


def _model(options: EngineOptions) -> tuple[str, str, str]:
    """vLLM's ``model``, ``load_format`` and ``dtype``."""
    if not is_shape(options.model):
        if options.model.startswith(("/", "./", "../", "~")) and not Path(options.model).expanduser().is_dir():
            raise ConfigError(f"model: {options.model}, no such folder")
        return options.model, options.load_format, options.dtype
    tiny = options.model == "tiny"
    dtype = "float32" if tiny and options.dtype == "auto" and _on_cpu() else options.dtype
    longest = max(model_shape(options.model).max_model_len, options.max_model_len) if tiny else None
    weights = tiny and options.load_format != "dummy"
    key = (options.model, longest, options.seed if weights else None)
    if key not in _folders:
        if tiny:
            folder = _temporary_folder()
            write_tiny_llama(folder, longest or 0, options.seed if weights else None)
        else:
            folder = _shape_folder(options.model)
        _folders[key] = folder
    return str(_folders[key]), "auto" if weights else "dummy", dtype


def _temporary_folder() -> Path:
    """Gone when the program ends."""
    folder = Path(tempfile.mkdtemp(prefix="llmsched-model-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _shape_folder(name: str) -> Path:
    """A shape's folder in the user's cache, the same in every process: graphs that vLLM has compiled are found again by the model's path
    (``config/model.py``, ``ModelConfig.compute_hash``, 0.28.0 to 0.33.0)."""
    with contextlib.suppress(OSError, RuntimeError):  # no home directory is a RuntimeError
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return write_shape(name, Path(cache) / "llmsched-shapes" / name)
    return write_shape(name, _temporary_folder())


def write_tiny_llama(folder: Path, max_model_len: int, seed: int | None = None) -> Path:
    """The tiny Llama as a Hugging Face folder; with a seed, also its random weights (float32).

    The weights are wide (standard deviation 0.35), so that the next token depends on the whole
    context and greedy decoding does not fall into a loop: a wrong KV block would change the text.
    """
    import json

    shape = dataclasses.replace(model_shape("tiny"), max_model_len=max_model_len)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2) + "\n", encoding="utf-8")
    if seed is None:
        return folder
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Any:
        return torch.randn(*size, generator=generator) * 0.35

    hidden, inner = shape.hidden, shape.intermediate
    tensors = {
        "model.embed_tokens.weight": random(shape.vocab, hidden),
        "lm_head.weight": random(shape.vocab, hidden),
        "model.norm.weight": torch.ones(hidden),
    }
    for i in range(shape.layers):
        layer = f"model.layers.{i}."
        tensors |= {
            layer + "self_attn.q_proj.weight": random(shape.heads * shape.head_dim, hidden),
            layer + "self_attn.k_proj.weight": random(shape.kv_heads * shape.head_dim, hidden),
            layer + "self_attn.v_proj.weight": random(shape.kv_heads * shape.head_dim, hidden),
            layer + "self_attn.o_proj.weight": random(hidden, shape.heads * shape.head_dim),
            layer + "mlp.gate_proj.weight": random(inner, hidden),
            layer + "mlp.up_proj.weight": random(inner, hidden),
            layer + "mlp.down_proj.weight": random(hidden, inner),
            layer + "input_layernorm.weight": torch.ones(hidden),
            layer + "post_attention_layernorm.weight": torch.ones(hidden),
        }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
