"""A policy inside a production vLLM server: ``vllm serve MODEL --scheduler-cls llmsched_hardware.serve.PolicyScheduler``.

``LLMSCHED_POLICY`` names the policy and ``LLMSCHED_POLICY_CONFIG`` a JSON file with its settings
(``llmsched_hardware.live_config.LiveConfig``). Both are read and checked while the engine starts, before the
first request. ``docs/deploy.md`` has an example that was run.

Every call of ``schedule`` brings a mirror of vLLM's queues up to date, asks the policy and carries its
decision out through `GatedScheduler`. As in the simulator (design of an idle step), a decision under
which nothing could be scheduled stays in force until something changes: a request arrives or leaves,
tokens come back, or the guard releases one. A policy that raises is replaced by vLLM's own admission.

Under asynchronous scheduling, vLLM's default on a GPU, the policy decides on an iteration while the one before it runs. It sees
tokens in flight as generated, as vLLM's scheduler does; that one of them was a request's last shows in the next call.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError
from llmsched_env.perf import Batch
from llmsched_hardware import versions
from llmsched_hardware.calibration.batches import BatchFollower
from llmsched_hardware.calibration.iteration_log import IterationLogWriter
from llmsched_hardware.calibration.iteration_watch import IterationWatch
from llmsched_hardware.gated_scheduler import Admission, GatedScheduler
from llmsched_hardware.live_caller import PolicyCaller
from llmsched_hardware.live_config import LiveConfig
from llmsched_hardware.live_gate import Gatekeeper
from llmsched_hardware.live_metrics import PolicyMetrics
from llmsched_hardware.live_prometheus import MULTIPROCESS_FOLDER
from llmsched_hardware.live_start import announcement, start
from llmsched_hardware.live_thread import Overdue
from llmsched_hardware.options import SCHEDULER_CLASS, settings_of
from llmsched_hardware.real_engine import describe_scheduler

logger = logging.getLogger("vllm.llmsched")  # below vLLM's logger: its format, its level

_FIRST_PAUSE = 0.0005
_LONGEST_PAUSE = 0.005
_LONGEST_AGE = 3600.0


class PolicyScheduler(GatedScheduler):
    """vLLM's scheduler with a policy of ``baselines`` or ``agents`` deciding on admissions, holds and boundary queues.

    Attributes:
        live_config: what the operator asked for.
        live: the policy and the setting it was computed for.
        mirror: vLLM's queues in a backend's record.
        gatekeeper: carries decisions out, and the guard.
        policy_metrics: counts, exported and reported.
        monotonic, wall, sleep: clocks; tests replace them.

    Raises:
        ConfigError: a vLLM setting under which gating is wrong or untested, or a refused configuration.
    """

    describes = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_supported(self.vllm_config, self.kv_cache_config)
        self.monotonic: Callable[[], float] = time.monotonic
        self.wall: Callable[[], float] = time.time
        self.sleep: Callable[[float], None] = time.sleep
        self._epoch = self.monotonic()
        self.live_config = LiveConfig.from_environment(os.environ)
        engine = self._engine()
        self.caller = PolicyCaller(functools.partial(start, self.live_config, engine), self.live_config.policy_timeout_seconds)
        self.live, self.mirror = self.caller.live, self.caller.mirror
        self.gatekeeper = Gatekeeper(self.mirror, self.live_config.max_wait_seconds)
        self.policy_metrics = PolicyMetrics(
            self.live.policy.name,
            None if self.live_config.report_path is None else Path(self.live_config.report_path),
            self.live_config.report_interval_seconds,
        )
        if self.live_config.iteration_log is not None:
            of_engine, most = describe_scheduler(self), self.live_config.iteration_log_max_rows
            log = IterationLogWriter(self.live_config.iteration_log, of_engine, max_rows=most)
            self.watch = IterationWatch(log, of_engine, policy=self.live.policy.name)
        self._fallback = False
        self._retry_in = 0
        self._logged = False
        self._stale = False  # iterations have gone past the mirror
        self._changed = True  # since the policy was last asked
        self._idle = False  # the last iteration computed nothing
        self._pause = _FIRST_PAUSE
        self._in_flight: deque[float] = deque()  # when each batch that is not back was scheduled
        self._follower = BatchFollower()
        self._last_back = 0.0
        self._announce()

    def _engine(self) -> EngineConfig:
        """The engine as this server runs it."""
        return EngineConfig.vllm(**settings_of(self), async_scheduling=bool(self.scheduler_config.async_scheduling))

    def _announce(self) -> None:
        for line in announcement(self.live_config, self.live):
            logger.info("policy %s: %s", self.live.policy.name, line)
        mode = "asynchronous" if self.scheduler_config.async_scheduling else "synchronous"
        logger.info("policy %s: %s scheduling, vLLM %s", self.live.policy.name, mode, versions.installed()[1])
        if MULTIPROCESS_FOLDER not in os.environ:
            logger.warning(
                "%s is not set: the policy's metrics cannot reach /metrics, which another process answers; set it to an empty folder",
                MULTIPROCESS_FOLDER,
            )

    # --- what comes in ------------------------------------------------------------------------------

    @property
    def following(self) -> bool:
        """Whether the mirror is kept up to date."""
        return not self._fallback

    def add_request(self, request: Any) -> None:
        known = request.request_id in self.requests
        super().add_request(request)
        if self.following and not known and not self._is_blocked_waiting_status(request.status):
            self._try(self._arrive, request)

    def finish_requests(self, *args: Any, **kwargs: Any) -> Any:
        finished = super().finish_requests(*args, **kwargs)
        if self.following:
            for request in finished:
                self._try(self._leave, request.request_id)
        return finished

    def _arrive(self, request: Any) -> None:
        now = self._now()
        age = min(max(self.wall() - request.arrival_time, 0.0), _LONGEST_AGE)  # arrival is the front end's wall clock
        self.mirror.arrive(request.request_id, request.num_prompt_tokens, now - age, now, self._output_tokens(request))
        self._changed = True

    def _output_tokens(self, request: Any) -> int:
        return int(request.max_tokens) if self.mirror.reveal_output_length else 0

    def _leave(self, request_id: str) -> None:
        self.mirror.leave(request_id)
        self._changed = True
        if not self.requests:
            self.policy_metrics.empty()

    def _now(self) -> float:
        return self.monotonic() - self._epoch

    # --- one iteration --------------------------------------------------------------------------------

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        if self._idle and not self._changed and not self._in_flight:
            self._rest()
        if self.watch is not None:
            self.watch.enter()  # the policy's own time is of the iteration
        start = self._now()
        self.gate = gate = self._next_gate()
        output = super().schedule(*args, **kwargs)
        batch = self._follower.follow(output, self.requests)  # every batch, the policy's or not
        if output.num_scheduled_tokens:
            self._in_flight.append(start)
        if gate.admit is None:
            self._stale = True
            self._idle = False  # vLLM's own admission never leaves work undone
            self.policy_metrics.iteration("vllm")
            self.policy_metrics.present(versions.num_waiting(self), 0, 0)
        else:
            self._try(self._note, output.total_num_scheduled_tokens, batch)
        return output

    def _next_gate(self) -> Admission:
        """What this iteration may do: the policy's decision, or everything."""
        if self._fallback and self._retry_in > 0:
            self._retry_in -= 1
            if self._retry_in == 0:
                self._resume()
        if self._fallback or self.pause_state != PauseState.UNPAUSED:
            return Admission()
        gate: Admission | None = self._try(self._decide)
        return gate or Admission()

    def _decide(self) -> Admission:
        start = time.perf_counter()
        now = self._now()
        self._promote()
        mirror, pool = self.mirror, self.kv_cache_manager.block_pool
        if self._stale:
            mirror.resync(now, self.running, versions.standing(self))
            self._stale, self._changed = False, True
        mirror.refresh(now, self.running, versions.standing(self), pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
        decided: float | None = None
        if self._changed:
            before = time.perf_counter()
            self.policy_metrics.asked(before)
            decision = self.caller.decide(mirror.view)
            decided = time.perf_counter() - before
            mirror.told()
            allowed = self.gatekeeper.allow(decision, now)
            self._changed = False
        else:
            allowed = self.gatekeeper.hold_all(now)
        gate = Admission(admit=allowed.admit, hold=allowed.hold, evict=allowed.evict, token_budget=allowed.token_budget)
        self.policy_metrics.iteration("repeat" if decided is None else "policy")
        self.policy_metrics.took(decided, time.perf_counter() - start - (decided or 0.0))
        return gate

    def _promote(self) -> None:
        """Requests that waited for something else, such as a grammar, join the queue once they can run."""
        for request in versions.unblock(self):
            if request.request_id not in self.mirror:
                self._arrive(request)

    def _note(self, num_tokens: int, batch: Batch | None) -> None:
        gate, mirror, metrics = self.gate, self.mirror, self.policy_metrics
        now = self._now()
        mirror.note(now, gate.evict, gate.admitted, gate.preempted)
        mirror.note_batch(batch)
        if num_tokens or gate.evict or gate.preempted:
            self._changed, self._idle, self._pause = True, False, _FIRST_PAUSE
        else:
            self._idle = True
        metrics.evicted(len(gate.evict))
        metrics.released(self.gatekeeper.releases)
        metrics.present(mirror.record.num_waiting, mirror.record.num_boundary, len(gate.hold))

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        present = [self.requests[name] for name in scheduler_output.num_scheduled_tokens if name in self.requests]
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if scheduler_output.num_scheduled_tokens:
            now = self._now()
            # A batch begins when it was scheduled or, under asynchronous scheduling, when the one before it came back.
            start = max(self._in_flight.popleft() if self._in_flight else now, self._last_back)
            self._last_back = now
            if self.following:
                self._try(self._ended, present, now - start)
        return outputs

    def _ended(self, present: Sequence[Any], seconds: float) -> None:
        self.mirror.finished_iteration(seconds)
        self._changed = True
        for request in present:
            if request.request_id not in self.requests:
                self.mirror.complete(request.request_id, request.num_tokens - request.num_prompt_tokens)
                self._leave(request.request_id)

    def _rest(self) -> None:
        """Sleep while the policy holds everything: vLLM's loop would come back a thousand times a second.

        A request that arrives meanwhile is seen at most ``_LONGEST_PAUSE`` later.
        """
        self.sleep(min(self._pause, self.gatekeeper.next_deadline(self._now())))
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    # --- failure ----------------------------------------------------------------------------------------

    def _try(self, action: Callable[..., Any], *args: Any) -> Any:
        """``action(*args)``; if it raises, vLLM's own admission takes over and None is returned."""
        if self._fallback:
            return None
        try:
            return action(*args)
        except KeyboardInterrupt:  # of a program that holds the engine itself
            raise
        except BaseException as error:  # SystemExit, too: a policy that calls sys.exit() must not end the server
            self._fail(error)
            return None

    def _fail(self, error: BaseException) -> None:
        retry = self.live_config.retry_after_iterations
        self._fallback, self._stale = True, True
        self._retry_in = retry or 0
        overdue = isinstance(error, Overdue)
        self.policy_metrics.error(overdue)
        if not self._logged:
            self._logged = True
            until = "from now on" if retry is None else f"for {retry} iterations (further errors are counted, not logged)"
            what = f"did not decide within {self.live_config.policy_timeout_seconds:g} s" if overdue else "raised"
            trace = None if overdue else error
            with contextlib.suppress(Exception):
                logger.error("policy %s %s; vLLM's own admission is in force %s", self.live.policy.name, what, until, exc_info=trace)

    def _resume(self) -> None:
        self._fallback = False
        if self.caller.lost:
            self._try(self._renew)
        else:
            self._try(self.caller.reset)
        self.policy_metrics.set_fallback(self._fallback)

    def _renew(self) -> None:
        """A new policy in place of one that did not return, whose mirror is left to it; until it is there vLLM's own admission stays."""
        if not self.caller.renew():
            self._fallback, self._retry_in = True, 1
            return
        self.live = self.caller.live
        self.caller.mirror.take_over(self.mirror)
        self.mirror = self.caller.mirror
        releases = self.gatekeeper.releases
        self.gatekeeper = Gatekeeper(self.mirror, self.live_config.max_wait_seconds)
        self.gatekeeper.releases.update(releases)

    def shutdown(self) -> None:
        self.policy_metrics.close()
        if self.watch is not None:
            self.watch.close()
        super().shutdown()


def check_supported(vllm_config: Any, kv_cache_config: Any) -> None:
    """Refuse what would make gating wrong, and what was not tested with it.

    Raises:
        ConfigError: every setting in the way, with the flag that changes it.
    """
    scheduler, parallel, model = vllm_config.scheduler_config, vllm_config.parallel_config, vllm_config.model_config
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    full = len(specs) == 1 and type(specs[0]) in (FullAttentionSpec, MLAAttentionSpec) and not getattr(specs[0], "sliding_window", None)
    refused = [
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism, which keeps several batches in flight (--pipeline-parallel-size 1)"),
        (parallel.data_parallel_size > 1, "data parallelism of one model (--data-parallel-size 1)"),
        (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            "context parallelism (--decode-context-parallel-size 1 --prefill-context-parallel-size 1)",
        ),
        (vllm_config.speculative_config is not None, "speculative decoding (leave --speculative-config out)"),
        (vllm_config.lora_config is not None, "LoRA adapters (leave --enable-lora out)"),
        (vllm_config.kv_transfer_config is not None or vllm_config.ec_transfer_config is not None, "KV and encoder transfer"),
        (scheduler.policy != "fcfs", "priority scheduling (--scheduling-policy fcfs)"),
        (model.runner_type != "generate" or model.is_encoder_decoder or model.is_diffusion, "models that are not decoders of text"),
        (versions.takes_images(model), "multimodal input (--language-model-only serves text alone)"),
        (not full, f"KV caches other than one group of full attention ({', '.join(type(s).__name__ for s in specs) or 'none'})"),
    ]
    found = [text for wrong, text in refused if wrong]
    if found:
        raise ConfigError(f"{SCHEDULER_CLASS} does not support: {'; '.join(found)}")
