"""A look at where a step's time goes: torch's profiler over a few steps, as a trace to look at and a table to read."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from dsv2.progress import console

TRACE = "trace.json"
_ROWS = 20


@contextmanager
def profiled(num_steps: int, folder: Path) -> Iterator[Callable[[], None]]:
    """Profile ``num_steps`` steps, the third of this process first, and give the function that tells of each step done.

    The first two are left out: they pay for buffers and compiled kernels. RUN/trace.json is written when the last profiled step is done
    (open it in chrome://tracing or ui.perfetto.dev), and the operations that took most time by themselves are printed.

    Args:
        num_steps: 0: nothing is profiled.
        folder: of the run.
    """
    if num_steps == 0:
        yield lambda: None
        return

    finished: list[bool] = []

    def finish(done: profile) -> None:
        finished.append(True)
        done.export_chrome_trace(str(folder / TRACE))
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        console().print(done.key_averages().table(sort_by=order, row_limit=_ROWS), markup=False, soft_wrap=True)
        console().print(f"trace of {num_steps} steps: {folder / TRACE}", markup=False, soft_wrap=True)

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(
        activities=activities,
        schedule=schedule(wait=1, warmup=1, active=num_steps, repeat=1),
        on_trace_ready=finish,
        acc_events=True,
    ) as profiler:
        yield profiler.step
    if not finished:
        console().print("nothing was profiled: the run had no third step", markup=False)
