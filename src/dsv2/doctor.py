"""``dsv2 doctor``: what this machine offers and what is missing, as plain lines on stdout that can be pasted into a question."""

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dsv2 import __version__
from dsv2.errors import EXTRAS, ConfigError
from dsv2.machine import available_memory, total_memory

_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def run() -> None:
    """Print the report."""
    facts = [
        ("dsv2", __version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        *_torch(),
        *_kernels(),
        *_machine(),
        *_extras(),
        *_environment(),
    ]
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        print(f"{name:<{width}}  {value}")


def _torch() -> Iterator[tuple[str, str]]:
    try:
        import torch
    except ImportError as error:
        yield "torch", f"cannot be imported: {error}"
        return
    yield "torch", f"{torch.__version__}, {torch.get_num_threads()} threads, CPU kernels for {torch.backends.cpu.get_cpu_capability()}"
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    yield "accelerators", ", ".join(devices) or "none"


def _kernels() -> Iterator[tuple[str, str]]:
    """Say which kernels the engine runs on and why; they are compiled now if they never were."""
    try:
        from dsv2.kernels.cpu.build import VARIANTS, Unavailable, cpu_features, plan
        from dsv2.kernels.cpu.library import library
    except ImportError as error:
        yield "kernels", f"none: {error}"
        return
    try:
        build = plan()
        library()
    except ConfigError as reason:
        yield "kernels", f"none: {reason.message}; {reason.hint}"
        return
    except Unavailable as reason:
        yield "kernels", f"torch's: {reason.message}{f'; {reason.hint}' if reason.hint else ''}"
        return
    better = list(VARIANTS)[: list(VARIANTS).index(build.variant)]
    lacking = [f"{name} needs {', '.join(sorted(VARIANTS[name][0] - cpu_features()))}" for name in better]
    why = "DSV2_CPU" if os.environ.get("DSV2_CPU") else "; ".join(["the best for this processor", *lacking])
    yield "kernels", f"native, {build.variant} ({why}), compiled by {build.compiler}: {build.file}"


def _machine() -> Iterator[tuple[str, str]]:
    yield "cpu cores", f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} usable of {os.cpu_count()}"
    yield "memory", _memory()
    disk = shutil.disk_usage(Path.cwd())
    yield "disk", f"{disk.free / 1e9:.1f} GB free of {disk.total / 1e9:.1f} GB where {Path.cwd()} is"


def _memory() -> str:
    available, total = available_memory(), total_memory()
    return "unknown" if available is None or total is None else f"{available / 1e9:.1f} GB available of {total / 1e9:.1f} GB"


def _extras() -> Iterator[tuple[str, str]]:
    for extra, packages in EXTRAS.items():
        missing = [package for package in packages if not _version(package)]
        found = [f"{package} {_version(package)}" for package in packages if _version(package)]
        yield f"extra {extra}", ", ".join(found + ([f"missing: pip install {' '.join(missing)}"] if missing else []))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _environment() -> Iterator[tuple[str, str]]:
    state = _THP.read_text() if _THP.exists() else ""
    chosen = state.partition("[")[2].partition("]")[0] or "unknown"
    wish = os.environ.get("THP_MEM_ALLOC_ENABLE", "")
    # "madvise": the kernel gives huge pages to those who ask, which torch does when the variable is 1
    use = "in use for large tensors" if chosen == "always" or (chosen == "madvise" and wish == "1") else "not in use"
    yield "huge pages", f"kernel: {chosen}, THP_MEM_ALLOC_ENABLE={wish or 'unset'}: {use}"
    data = os.environ.get("DSV2_DATA")
    yield (
        "DSV2_DATA",
        "not set: tests and benchmarks on large corpora skip"
        if not data
        else f"{data}{'' if Path(data).is_dir() else ' (no such folder)'}",
    )
