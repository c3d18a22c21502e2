"""What the native module is built from and how: one description, used by setup.py and by the JIT.

setup.py loads this file by path, before the package can be imported. So torch is imported inside
functions only, and nothing else of the package is.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parent
VERSION: str = runpy.run_path(str(PACKAGE / "_version.py"))["__version__"]

# Every GPU from Turing on has code of its own or of its major version, later ones the final PTX.
DEFAULT_ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")

# Where an installer puts the toolkit when it is not told otherwise.
USUAL_HOME = Path("/usr/local/cuda")

# Twice what the largest compiler process was seen to need.
GIB_PER_JOB = 2


class CudaUnavailable(RuntimeError):
    """A CUDA build is not possible here; the text says why and what to do."""


class CompilerUnavailable(RuntimeError):
    """No build is possible here; the text says why and what to do."""


class Toolkit(NamedTuple):
    """A CUDA toolkit: the folder that holds ``bin/nvcc``, and its version."""

    home: Path
    version: tuple[int, int]


class Stamp(NamedTuple):
    """What a native module was built for; ``cuda`` and ``arch_list`` are empty in a CPU build."""

    version: str
    torch: str
    cuda: str
    arch_list: str
    source_hash: str
    python: str

    def mismatch(self, torch_version: str, cuda: str, source_hash: str) -> str | None:
        """Why a module with this stamp must not be loaded here, or None."""
        if self.torch != torch_version:
            return f"was built for torch {self.torch}, but this is torch {torch_version}"
        if self.cuda and self.cuda != cuda:
            return f"was built for CUDA {self.cuda}, but this torch has {cuda or 'none'}"
        if self.python != python_tag():
            return f"was built for {self.python}, but this is {python_tag()}"
        if source_hash not in ("", self.source_hash):
            return "is older than the sources in csrc"
        return None


class Build(NamedTuple):
    """Everything a compiler has to be told to build the native module."""

    stamp: Stamp
    toolkit: Toolkit | None
    sources: list[Path]
    include_dirs: list[Path]
    macros: list[tuple[str, str | None]]
    cxx_flags: list[str]
    nvcc_flags: list[str]
    link_flags: list[str]
    environment: dict[str, str]

    def key(self) -> str:
        """A folder name that differs whenever the module would."""
        parts = [*self.stamp, *map(str, self.macros), *self.cxx_flags, *self.nvcc_flags]
        parts += [*self.link_flags, os.environ.get("CXX", ""), str(self.toolkit)]
        parts += [os.environ.get(name, "") for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")]
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
        cuda = f"cu{self.stamp.cuda.replace('.', '')}" if self.stamp.cuda else "cpu"
        return f"batchnorm_ext-{VERSION}-torch{self.stamp.torch}-{cuda}-py{sys.version_info[0]}{sys.version_info[1]}-{digest}"

    def generate(self, directory: Path) -> None:
        """Write into `directory`, an include and library folder, what is known only at build time.

        The stamp is a header of its own, not a set of macros for every file, so that a change of
        one source recompiles that source and the module's, not everything.
        """
        directory.mkdir(parents=True, exist_ok=True)
        lines = ["// What this build is for; written by the build.", "#pragma once"]
        lines += [
            f"#define BATCHNORM_EXT_{name.upper()} {value}"
            for name, value in self.stamp._asdict().items()
        ]
        _write_if_changed(directory / "build_stamp.h", "\n".join(lines) + "\n")
        if self.toolkit and not list(self.toolkit.home.glob("lib*/libcudart.so")):
            _link_cudart(directory)


def source_root() -> Path:
    """The folder csrc: inside an installed package, beside the package in a checkout."""
    inside = PACKAGE / "csrc"
    return inside if inside.is_dir() else PACKAGE.parent / "csrc"


def source_hash() -> str:
    """A short hash of the names and contents of all sources; empty where there are none."""
    root = source_root()
    files = sorted(p for p in root.rglob("*") if p.suffix in {".h", ".cuh", ".cpp", ".cu"})
    if not files:
        return ""
    digest = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def python_tag() -> str:
    """The interpreter's ABI, as in the module's file name."""
    return sysconfig.get_config_var("SOABI") or f"{sys.implementation.cache_tag}-{sys.platform}"


def sources(cuda: bool) -> list[Path]:
    """All files to compile, in a fixed order."""
    root = source_root()
    found = [*root.glob("bindings/*.cpp"), *root.glob("cpu/*.cpp")]
    if cuda:
        found += [*root.glob("cuda/**/*.cpp"), *root.glob("cuda/**/*.cu")]
    if not found:
        raise FileNotFoundError(f"no C++ sources under {root}")
    return sorted(found)


def is_set(name: str) -> bool:
    """Whether an environment variable is set to something other than a no."""
    return os.environ.get(name, "").strip().lower() not in {"", "0", "no", "off", "false"}


def require_compiler() -> None:
    """Name what is missing for any build, before a compiler does so in its own words.

    Raises
    ------
    CompilerUnavailable
        There is no compiler, or no Python.h.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(compiler[0]) is None:
        raise CompilerUnavailable(
            f"there is no C++ compiler {compiler[0]} (fix: install g++ or clang++, or set CXX)"
        )
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        raise CompilerUnavailable(
            "Python's headers are missing "
            "(fix: install python3-dev, or python3-devel, of this Python's version)"
        )


def find_toolkit() -> Toolkit:
    """Find nvcc: in ``CUDA_HOME`` or ``CUDA_PATH``, else on the path, else where it usually is.

    An nvcc on the path may be a wrapper or a link, so it is asked for its own home.

    Raises
    ------
    CudaUnavailable
        There is none.
    """
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            if not (Path(home) / "bin/nvcc").exists():
                raise CudaUnavailable(
                    f"{variable}={home} has no bin/nvcc; set it to a CUDA toolkit, or not"
                )
            return _toolkit_at(Path(home))
    homes = []
    if on_path := shutil.which("nvcc"):
        homes += [_home_by_nvcc(on_path), Path(on_path).resolve().parent.parent]
    homes += [USUAL_HOME, *(folder.parent for folder in _pip_folders("include"))]
    for candidate in homes:
        if candidate and (candidate / "bin/nvcc").exists():
            return _toolkit_at(candidate)
    raise CudaUnavailable(
        "nvcc was not found: install the CUDA toolkit that torch was built with, and put nvcc on "
        "PATH or set CUDA_HOME"
    )


def choose_toolkit() -> tuple[Toolkit | None, str | None]:
    """Decide between a CUDA and a CPU build, never by whether a GPU is visible.

    Returns
    -------
    toolkit, reason
        The toolkit of a CUDA build, or None for a CPU build; then `reason` says why a torch built
        with CUDA gets a CPU build, unless that was asked for.

    Raises
    ------
    CudaUnavailable
        ``FORCE_CUDA`` asks for what cannot be done.
    """
    import torch

    forced = is_set("FORCE_CUDA")
    if is_set("FORCE_ONLY_CPU"):
        if forced:
            raise CudaUnavailable("FORCE_CUDA and FORCE_ONLY_CPU are both set; unset one of them")
        return None, None
    try:
        if torch.version.cuda is None:
            raise CudaUnavailable(
                f"torch {torch.__version__} has no CUDA; install a torch built with CUDA"
            )
        toolkit = find_toolkit()
        if toolkit.version[0] != int(torch.version.cuda.split(".")[0]):
            raise CudaUnavailable(
                f"nvcc in {toolkit.home} is of CUDA {toolkit.version[0]}.{toolkit.version[1]}, but "
                f"torch {torch.__version__} was built with CUDA {torch.version.cuda}; set "
                f"CUDA_HOME to a toolkit of CUDA {torch.version.cuda.split('.')[0]}"
            )
    except CudaUnavailable as error:
        if forced:
            raise CudaUnavailable(f"FORCE_CUDA is set, but {error}") from None
        return None, None if torch.version.cuda is None else str(error)
    return toolkit, None


def choose_architectures(toolkit: Toolkit) -> str:
    """The value of ``TORCH_CUDA_ARCH_LIST``: as set, else the visible GPUs, else a list for all.

    Raises
    ------
    CudaUnavailable
        It is "native" and no GPU is visible.
    """
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if wanted and wanted != "native":
        return ";".join(wanted.replace(";", " ").split())
    supported = _supported_architectures(toolkit)
    visible = _visible_architectures(supported)
    if visible:
        return ";".join(visible) + "+PTX"
    if wanted:
        raise CudaUnavailable(
            "TORCH_CUDA_ARCH_LIST=native, but no GPU is visible; name the architectures, as in 9.0"
        )
    return ";".join(arch for arch in DEFAULT_ARCHITECTURES if arch in supported) + "+PTX"


def covers(arch_list: str, capability: tuple[int, int]) -> bool:
    """Whether a build for `arch_list` runs on a GPU of this compute capability."""
    for name in arch_list.split(";"):
        match = re.fullmatch(r"(\d+)\.(\d)(a|f)?(\+PTX)?", name)
        if match is None:  # a family name such as Hopper
            return True
        built = (int(match[1]), int(match[2]))
        if built == capability or (match[3] is None and _serves(built, capability, bool(match[4]))):
            return True
    return False


def job_count(available_gib: float | None = None) -> int:
    """Compiler processes to run at once: ``MAX_JOBS``, else as many as cores and memory allow."""
    if os.environ.get("MAX_JOBS", "").isdigit():
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = _available_gib() if available_gib is None else available_gib
    return max(1, min(cores or 1, int(memory // GIB_PER_JOB)))


def describe(toolkit: Toolkit | None) -> Build:
    """Describe the CUDA build with this toolkit, or the CPU build where it is None.

    Raises
    ------
    CompilerUnavailable
        On Windows, where torch builds extensions with the one compiler that cannot do it.
    """
    import torch

    if os.name == "nt":
        raise CompilerUnavailable(
            "the kernels are written in the vector types of GCC and Clang, and on Windows torch "
            "builds extensions with neither"
        )

    debug = is_set("DEBUG")
    arch_list = choose_architectures(toolkit) if toolkit else ""
    # Python's own flags may ask for debug information, which doubles the compile time.
    cxx = ["-O0", "-g"] if debug else ["-O3", "-g0"]
    # Contraction would make a result depend on the instruction set: kernels say where they mean a
    # fused multiply-add. Nobody asks for errno or the exception flags, which would keep loops with
    # square roots and choices from becoming vectors.
    cxx += ["-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    link = []
    # at::parallel_for is compiled into its caller, and runs on one thread where OpenMP is off.
    if sys.platform == "darwin":
        # Apple's driver has no -fopenmp; its compiler does, and torch brings header and library.
        # What is undefined in an extension is found in the libraries that torch has loaded.
        if (Path(torch.__file__).parent / "include/omp.h").exists():
            cxx += ["-Xpreprocessor", "-fopenmp"]
    else:
        cxx.append("-fopenmp")
        link.append("-fopenmp")
    nvcc = ["-O0", "-g", "-lineinfo"] if debug else ["-O3"]
    nvcc += ["-Xcompiler=-fvisibility=hidden", *shlex.split(os.environ.get("NVCC_FLAGS", ""))]
    environment = {"MAX_JOBS": str(job_count()), "PATH": path_with_ninja()}
    macros: list[tuple[str, str | None]] = []
    if toolkit:
        macros.append(("BATCHNORM_EXT_WITH_CUDA", None))
        environment |= {"CUDA_HOME": str(toolkit.home), "TORCH_CUDA_ARCH_LIST": arch_list}
        # torch's headers ask for libraries that a minimal toolkit lacks; torch's own wheels bring
        # them. System folders are searched last, so the toolkit's own headers still win.
        if not (toolkit.home / "include" / "cusparse.h").exists():
            system = [
                part for folder in _pip_folders("include") for part in ("-isystem", str(folder))
            ]
            cxx += system
            nvcc += system
    return Build(
        stamp=Stamp(
            version=VERSION,
            torch=torch.__version__,
            cuda=torch.version.cuda or "" if toolkit else "",
            arch_list=arch_list,
            source_hash=source_hash(),
            python=python_tag(),
        ),
        toolkit=toolkit,
        sources=sources(toolkit is not None),
        include_dirs=[source_root()],
        macros=macros,
        cxx_flags=cxx,
        nvcc_flags=nvcc,
        link_flags=link,
        environment=environment,
    )


def torch_extension_tools(build: Build) -> ModuleType:
    """``torch.utils.cpp_extension``, told where the toolkit is (its own guess can be wrong)."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)  # importing it warns that no GPU is visible: none is needed
    from torch.utils import cpp_extension

    logger.setLevel(level)
    if build.toolkit:
        cpp_extension.CUDA_HOME = str(build.toolkit.home)
    return cpp_extension


def read_stamp(path: Path) -> Stamp | None:
    """The stamp in a file that `write_stamp` wrote; None where it is missing or not one."""
    try:
        return Stamp(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError):
        return None


def write_stamp(path: Path, stamp: Stamp) -> None:
    """Write a stamp beside the module it belongs to, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(stamp._asdict(), indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _toolkit_at(home: Path) -> Toolkit:
    nvcc = home / "bin" / "nvcc"
    try:
        text = _output([str(nvcc), "--version"])
    except (OSError, subprocess.CalledProcessError) as error:
        raise CudaUnavailable(f"{nvcc} does not run: {error}") from error
    match = re.search(r"release (\d+)\.(\d+)", text)
    if match is None:
        raise CudaUnavailable(f"{nvcc} --version names no release")
    return Toolkit(home, (int(match[1]), int(match[2])))


def _home_by_nvcc(nvcc: str) -> Path | None:
    try:
        text = _output([nvcc, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull])
    except (OSError, subprocess.CalledProcessError):
        return None
    match = re.search(r"^#\$ TOP=(.+)$", text, re.MULTILINE)
    return Path(match[1].strip()).resolve() if match else None


def _supported_architectures(toolkit: Toolkit) -> list[str]:
    numbers = re.findall(
        r"sm_(\d+)\b", _output([str(toolkit.home / "bin/nvcc"), "--list-gpu-code"])
    )
    return [f"{number[:-1]}.{number[-1]}" for number in numbers]


def _visible_architectures(supported: list[str]) -> list[str]:
    """Compute capabilities of the visible GPUs; for one newer than nvcc, the newest nvcc knows."""
    import torch

    newest = max(_as_pair(arch) for arch in supported)
    try:
        found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    except RuntimeError:  # CUDA cannot start, as in a forked child of a process that uses it
        return []
    return [f"{major}.{minor}" for major, minor in sorted({min(pair, newest) for pair in found})]


def _as_pair(arch: str) -> tuple[int, int]:
    major, minor = arch.split(".")
    return int(major), int(minor)


def _serves(built: tuple[int, int], capability: tuple[int, int], ptx: bool) -> bool:
    same_major = built[0] == capability[0] and built[1] <= capability[1]
    return same_major or (ptx and built <= capability)


def _pip_folders(name: str) -> list[Path]:
    """The folders `name` (include or lib) of the NVIDIA wheels that torch's own wheel requires."""
    import torch

    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in (spec.submodule_search_locations or [])] if spec else []
    major = (torch.version.cuda or "0").split(".")[0]
    together = [root / f"cu{major}" / name for root in roots]
    apart = [folder for root in roots for folder in sorted(root.glob(f"*/{name}"))]
    return [folder for folder in together if folder.is_dir()] or apart


def _link_cudart(directory: Path) -> None:
    """Give the linker the CUDA runtime of torch's wheels, which lacks the name linkers look for."""
    for folder in _pip_folders("lib"):
        for library in sorted(folder.glob("libcudart.so.*")):
            link = directory / "libcudart.so"
            link.unlink(missing_ok=True)
            link.symlink_to(library)
            return


def _available_gib() -> float:
    """Memory that is free now, within the limits of the control group."""
    limits = []
    meminfo = _read_text("/proc/meminfo")
    if match := re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE):
        limits.append(int(match[1]) * 1024)
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        numbers = [_read_text(limit).strip(), _read_text(used).strip()]
        if all(number.isdigit() for number in numbers):
            limits.append(int(numbers[0]) - int(numbers[1]))
    return max(0, min(limits)) / 2**30 if limits else float(GIB_PER_JOB)


def path_with_ninja() -> str:
    """PATH, led by the environment's scripts where only they have ninja (pip put it there)."""
    folders = [os.environ.get("PATH", os.defpath)]
    scripts = sysconfig.get_path("scripts")
    if shutil.which("ninja") is None and shutil.which("ninja", path=scripts):
        folders.insert(0, scripts)
    return os.pathsep.join(folders)


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _output(command: Iterable[str], environment: Mapping[str, str] | None = None) -> str:
    return subprocess.run(
        list(command),
        check=True,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    ).stdout
