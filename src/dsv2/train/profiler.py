"""A look at where a step's time goes: torch's profiler over a few steps, as a trace to look at and a table to read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile, schedule

from dsv2.files import atomic_file
from dsv2.progress import console

TRACE = "trace.json"
_ROWS = 20
_SKIPPED = 2  # steps, which pay for buffers and compiled kernels


class StepProfiler:
    """What the loop tells of its steps; without a profile it does nothing."""

    def __init__(self, running: profile | None = None) -> None:
        self._running = running

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Say that a step is done, and leave out what the block does: validation, samples and checkpoints."""
        if self._running is None:
            yield
            return
        recording = self._running.current_action in (ProfilerAction.RECORD, ProfilerAction.RECORD_AND_SAVE)
        if recording:
            self._running.toggle_collection_dynamic(False, self._running.activities)
        yield
        if recording:
            self._running.toggle_collection_dynamic(True, self._running.activities)
        self._running.step()


@contextmanager
def profiled(num_steps: int, steps_left: int, folder: Path) -> Iterator[StepProfiler]:
    """Profile ``num_steps`` steps, the third of this process first.

    RUN/trace.json is written when the last profiled step is done (open it in chrome://tracing or ui.perfetto.dev), and the operations that
    took most time by themselves are printed.

    Args:
        num_steps: 0: nothing is profiled.
        steps_left: of the run; no more than these can be profiled.
        folder: of the run.
    """
    possible = min(num_steps, steps_left - _SKIPPED)
    if possible <= 0:
        if num_steps:
            console().print("nothing was profiled: the run had no third step", markup=False)
        yield StepProfiler()
        return

    def finish(done: profile) -> None:
        with atomic_file(folder / TRACE) as new:
            done.export_chrome_trace(str(new))
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        console().print(done.key_averages().table(sort_by=order, row_limit=_ROWS), markup=False, soft_wrap=True)
        console().print(f"trace of {possible} steps: {folder / TRACE}", markup=False, soft_wrap=True)

    with profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])],
        schedule=schedule(wait=_SKIPPED - 1, warmup=1, active=possible, repeat=1),
        on_trace_ready=finish,
        acc_events=True,
    ) as profiler:
        yield StepProfiler(profiler)
