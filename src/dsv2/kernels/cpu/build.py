"""The C++ kernels as a shared library: compiled on first use for this processor, kept in the user's cache.

A cached library is named by the hash of its sources, the compiler's version and the flags, so any change makes a new one. Two processes
that need it at once compile it once: a lock file lets one work and the other wait; the file appears by renaming.
"""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from dsv2.errors import ConfigError, Dsv2Error, did_you_mean

COMPILERS = ("c++", "g++", "clang++")
_COMMON = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread", "-Wno-psabi")
# What a processor must have, as /proc/cpuinfo names it, and the flags that let the compiler use it; the first that fits is taken.
VARIANTS: dict[str, tuple[frozenset[str], tuple[str, ...]]] = {
    "avx512": (
        frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16", "f16c", "fma"}),
        (
            "-mavx512f",
            "-mavx512bw",
            "-mavx512vl",
            "-mavx512dq",
            "-mavx512vnni",
            "-mavx512bf16",
            "-mf16c",
            "-mfma",
            "-mprefer-vector-width=512",
        ),
    ),
    "avx2": (frozenset({"avx2", "fma", "f16c"}), ("-mavx2", "-mfma", "-mf16c")),
    "plain": (frozenset(), ()),
}
_COMPILE_LIMIT_S = 300


class Unavailable(Dsv2Error):
    """The native kernels cannot be used here; the message says why. Callers fall back to torch."""


@dataclass(frozen=True, slots=True)
class Build:
    """How the library is, or would be, compiled.

    Args:
        variant: name in ``VARIANTS``.
        compiler: path of the C++ compiler.
        flags: given to it.
        file: where the library lies once it is compiled.
    """

    variant: str
    compiler: str
    flags: tuple[str, ...]
    file: Path


def plan(variant: str | None = None, extra_flags: Sequence[str] = ()) -> Build:
    """Choose variant, compiler and cache file, without compiling.

    Args:
        variant: None: ``DSV2_CPU`` if it is set, else the best that this processor has.
        extra_flags: such as sanitizers'.

    Raises:
        Unavailable: there is no compiler, or the variant is beyond this processor.
        ConfigError: the variant is unknown.
    """
    wanted = variant or os.environ.get("DSV2_CPU") or None
    features = cpu_features()
    if wanted is not None and wanted not in VARIANTS:
        if wanted == "torch":
            raise Unavailable("DSV2_CPU = torch")
        raise ConfigError(
            f"DSV2_CPU = {wanted!r} is not one of: torch, {', '.join(VARIANTS)}", hint=did_you_mean(wanted, ["torch", *VARIANTS])
        )
    chosen = wanted or next(name for name, (needed, _) in VARIANTS.items() if needed <= features)
    missing = VARIANTS[chosen][0] - features
    if missing:
        raise Unavailable(f"the {chosen} kernels need {', '.join(sorted(missing))}, which this processor lacks")
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise Unavailable("no C++ compiler was found", hint="install g++ or clang++ (apt install g++), or set CXX")
    flags = (*_COMMON, *VARIANTS[chosen][1], *extra_flags)
    digest = hashlib.sha256("\0".join((_version(compiler), *flags)).encode())
    for name, text in sources().items():
        digest.update(f"\0{name}\0{text}".encode())
    return Build(chosen, compiler, flags, cache_folder() / f"dsv2-{chosen}-{digest.hexdigest()[:20]}.so")


def compiled(build: Build) -> Path:
    """Return the library's file, compiled now if it is not there yet.

    Raises:
        Unavailable: the compiler failed, or the cache cannot be written.
    """
    if build.file.exists():
        return build.file
    try:
        build.file.parent.mkdir(parents=True, exist_ok=True)
        with build.file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be compiling the same
            if not build.file.exists():
                _compile(build)
    except OSError as error:
        raise Unavailable(
            f"the kernels cannot be written to {build.file.parent}: {error.strerror}", hint="set XDG_CACHE_HOME to a folder that can"
        ) from error
    return build.file


def _compile(build: Build) -> None:
    with tempfile.TemporaryDirectory(dir=build.file.parent, prefix=".building-") as name:
        folder = Path(name)
        for file, text in sources().items():
            (folder / file).write_text(text)
        command = [build.compiler, *build.flags, "step.cpp", "pack.cpp", "-o", "library.so"]
        try:
            result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_COMPILE_LIMIT_S)
        except subprocess.TimeoutExpired as error:
            raise Unavailable(f"{build.compiler} did not finish within {_COMPILE_LIMIT_S} s") from error
        if result.returncode != 0:
            raise Unavailable(f"{build.compiler} failed: {(result.stderr.strip() or 'no message').splitlines()[0]}")
        os.replace(folder / "library.so", build.file)


def sources() -> dict[str, str]:
    """Return name and text of every C++ file."""
    folder = resources.files("dsv2.kernels.cpu") / "source"
    return {
        file.name: file.read_text() for file in sorted(folder.iterdir(), key=lambda file: file.name) if file.name.endswith((".h", ".cpp"))
    }


def cache_folder() -> Path:
    """Return the folder of compiled libraries: ``$XDG_CACHE_HOME/dsv2`` or ``~/.cache/dsv2``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "dsv2"


@cache
def cpu_features() -> frozenset[str]:
    """Return the features of this processor that the system names; empty where it names none."""
    if platform.machine() not in ("x86_64", "AMD64") or not Path("/proc/cpuinfo").is_file():
        return frozenset()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


@cache
def _version(compiler: str) -> str:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"{compiler} does not run: {error}") from error
