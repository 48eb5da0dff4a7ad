"""Compiling `products.c` with the system's C compiler, once for each processor and version."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from sdsopt.errors import NativeBuildError

_SOURCE = Path(__file__).with_name("products.c")
_FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fPIC", "-shared")
# Tried in turn: Clang of macOS has no OpenMP, and then one thread does the work.
_OPTIONAL = (("-fopenmp", "-mprefer-vector-width=512"), ("-fopenmp",), ())


def build() -> Path:
    """Returns the compiled library, from the cache where it is there already.

    Raises:
        NativeBuildError: There is no C compiler, or it failed.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise NativeBuildError("there is no C compiler (cc, gcc or clang); install one, or name it in CC")
    key = hashlib.sha256("\0".join((_SOURCE.read_text(encoding="utf8"), compiler, *_FLAGS, _processor())).encode())
    library = _cache() / f"products-{key.hexdigest()[:16]}.so"
    if not library.exists():
        _compile(compiler, library)
    return library


def _compile(compiler: str, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    message = ""
    for optional in _OPTIONAL:
        # Under a name of its own, so that another process never loads a half-written file.
        descriptor, name = tempfile.mkstemp(suffix=".so", dir=library.parent)
        os.close(descriptor)
        command = [*compiler.split(), *_FLAGS, *optional, str(_SOURCE), "-o", name]
        try:
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode == 0:
                Path(name).replace(library)
                return
            message = run.stderr.strip()
        except OSError as error:  # there is no such compiler, or it is no program
            message = str(error)
        finally:
            Path(name).unlink(missing_ok=True)
    raise NativeBuildError(f"{compiler} could not compile sdsopt's products: {message[-500:]}")


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdsopt"


def _processor() -> str:
    """What the code is compiled for: a home directory may be shared by different machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf8").splitlines() if info.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}"
