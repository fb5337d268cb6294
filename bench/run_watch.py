"""What one run of train_lora.py does, seen from outside: its steps, compilation, CUDA graphs, memory, idle GPU."""

import resource
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

LONG_GAP_US = 20.0  # between two kernels of a CUDA graph there is a microsecond or two; more is waiting for the host


class Watch:
    """One run of train_lora.py seen from outside, by hooks around the engine, the compiler and the CUDA graphs.

    Args:
        total: optimizer steps of the run.
        profiled: so many last steps run under torch.profiler (device activity alone), on a GPU.
    """

    def __init__(self, total: int, profiled: int) -> None:
        import torch

        self.cuda = torch.cuda.is_available()
        self.profiled = profiled if self.cuda else 0
        self.total = total
        self.began = time.perf_counter()
        self.first_step_after: float | None = None
        self.engine: Any = None
        self.plan: Any = None
        self.profiler: Any = None
        self.tokens = 0
        self.compile_seconds = self.capture_seconds = 0.0
        self.captures = 0
        self.ends: list[Any] = []  # of the steps: CUDA events, on the CPU seconds
        self.steps: list[dict[str, Any]] = []
        self._compile_began = 0.0

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, train_lora.main is watched."""
        import torch._dynamo.callback as dynamo

        import train.engine.deepspeed_engine
        import train.fit.fit_step
        from train.step.cuda_graphs import StepGraphs

        initialize, plan, capture = (
            train.engine.deepspeed_engine.initialize,
            train.fit.fit_step.plan_checkpointing,
            StepGraphs.capture,
        )

        def watched_initialize(*arguments: Any) -> Any:
            self.engine = initialize(*arguments)
            self.engine.forward = self._forward(self.engine.forward)
            self.engine.step = self._step(self.engine.step)
            return self.engine

        def watched_plan(*arguments: Any, **named: Any) -> Any:
            self.plan = plan(*arguments, **named)
            return self.plan

        def watched_capture(graphs: Any, *arguments: Any) -> Any:
            start, compiling = time.perf_counter(), self.compile_seconds
            pair = capture(graphs, *arguments)
            self.captures += 1
            self.capture_seconds += time.perf_counter() - start - (self.compile_seconds - compiling)
            return pair

        dynamo.on_compile_start(self._compile_starts)
        dynamo.on_compile_end(self._compile_ends)
        try:
            with (
                patch.object(train.engine.deepspeed_engine, "initialize", watched_initialize),
                patch.object(train.fit.fit_step, "plan_checkpointing", watched_plan),
                patch.object(StepGraphs, "capture", watched_capture),
            ):
                yield
        finally:
            dynamo.callback_handler.remove_start_callback(self._compile_starts)
            dynamo.callback_handler.remove_end_callback(self._compile_ends)

    def _compile_starts(self, *_: Any) -> None:
        self._compile_began = time.perf_counter()

    def _compile_ends(self, *_: Any) -> None:
        self.compile_seconds += time.perf_counter() - self._compile_began

    def _forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def watched_forward(latents: Any, noise: Any, sigma: Any, prompt: Any, *more: Any) -> Any:
            if self.first_step_after is None:
                self.first_step_after = time.perf_counter() - self.began
            batch, rows, columns = latents.shape[0], latents.shape[-2] // 2, latents.shape[-1] // 2
            self.tokens = batch * (rows * columns + prompt.embeds.shape[1])
            return forward(latents, noise, sigma, prompt, *more)

        return watched_forward

    def _step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        import torch

        before = [0.0, 0]

        def watched_step(*arguments: Any, **named: Any) -> Any:
            result = step(*arguments, **named)
            if self.cuda:
                end = torch.cuda.Event(enable_timing=True)
                end.record()
            self.ends.append(end if self.cuda else time.perf_counter())
            self.steps.append(
                {
                    "tokens": self.tokens,
                    "compile_seconds": self.compile_seconds - before[0],
                    "captures": self.captures - before[1],
                    "profiled": self.profiler is not None,
                }
            )
            before[:] = self.compile_seconds, self.captures
            done = len(self.steps)
            if self.profiled and done == self.total - self.profiled:
                torch.cuda.synchronize()
                self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
                self.profiler.start()
            if self.profiler is not None and done == self.total:
                torch.cuda.synchronize()
                self.profiler.stop()
            return result

        return watched_step

    def result(self) -> dict[str, Any]:
        """What was seen, for JSON. Each step's seconds are from the end of the step before: the first has none."""
        import torch

        seconds: list[float | None] = [None]
        if self.cuda:
            torch.cuda.synchronize()
            seconds += [a.elapsed_time(b) / 1000 for a, b in zip(self.ends, self.ends[1:], strict=False)]
        else:
            seconds += [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]
        result: dict[str, Any] = {
            "steps": [step | {"seconds": s} for step, s in zip(self.steps, seconds, strict=False)],
            "first_step_after": self.first_step_after,
            "compilations": int(torch._dynamo.utils.counters["stats"]["unique_graphs"]),
            "compile_seconds": self.compile_seconds,
            "captures": self.captures,
            "capture_seconds": self.capture_seconds,
            "host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
        if self.plan is not None:
            predicted = self.plan.predicted
            result["recomputed"], result["blocks"] = self.plan.checkpointed_blocks, self.plan.blocks
            result["predicted_gib"] = None if predicted is None else predicted / 2**30
        if self.cuda:
            free, total = torch.cuda.mem_get_info()
            result["gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
            result["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
            result["outside_gib"] = (total - free - torch.cuda.memory_reserved()) / 2**30  # context, graphs, libraries
        if self.profiler is not None:
            result["profile"] = device_profile(self.profiler.events(), self.profiled)
        return result

    def release(self) -> None:
        """Free what the run holds, whoever still refers to it."""
        if self.engine is None:
            return
        module = self.engine.module
        module.graphs = None
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = tensor.data.new_empty(0)
        self.engine.destroy()
        self.engine = self.profiler = self.plan = None


def device_profile(events: Iterable[Any], steps: int) -> dict[str, float]:
    """A step's share of what the device did, from a profile that began and ended with an idle device.

    The first of the `steps` doesn't count: the profiler starts in it, and no step before it keeps the device busy. All
    have as many kernels.

    collectives: seconds with an NCCL kernel at work, which waits for other ranks in it;
    busy: seconds with at least one kernel at work (copies from and to the host, on a stream of their own, don't count);
    wall: from its end to the last kernel; long_gaps: seconds of gaps above LONG_GAP_US.
    """
    import torch

    events = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if not event.name.startswith(("Memcpy HtoD", "Memcpy DtoH"))
    )
    first = -(-len(spans) // steps)
    if first == len(spans):
        return {}
    busy = gaps = 0.0
    began = reached = max(end for _, end in spans[:first])
    nccl = sorted((e.time_range.start, e.time_range.end) for e in events if "nccl" in e.name.lower())
    for start, end in spans[first:]:
        gap = start - reached
        gaps += gap if gap > LONG_GAP_US else 0.0
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    scale = 1e-6 / (steps - 1)
    return {
        "kernels": len(spans[first:]) / (steps - 1),
        "busy": busy * scale,
        "collectives": covered(nccl, began, reached) * scale,
        "wall": (reached - began) * scale,
        "long_gaps": gaps * scale,
    }


def covered(spans: Iterable[tuple[float, float]], began: float, ended: float) -> float:
    """How much of [began, ended] lies in at least one of the `spans`, which are sorted by their start."""
    total, reached = 0.0, began
    for start, end in spans:
        total += max(0.0, min(end, ended) - max(start, reached))
        reached = max(reached, end)
    return total
