"""How the native module is obtained: prebuilt, compiled at first use, or replaced by pure PyTorch."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import json
import os
import re
import shlex
import shutil
import stat
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from . import _build

__all__ = ["NativeModuleError", "Obtained", "backend", "load", "obtained"]

INSTALL = "pip install --no-build-isolation --no-deps --force-reinstall"
_JIT_NAME = "batchnorm_ext_jit"
_CHOICES = ("auto", "prebuilt", "jit", "torch")


class NativeModuleError(ImportError):
    """The native module cannot be had in one of the ways; the text says why."""


class Obtained(NamedTuple):
    """The backend in use, how it was obtained, and what kept the preferred ways from working."""

    backend: ModuleType
    how: str
    problems: dict[str, str]


_lock = threading.RLock()
_obtained: Obtained | None = None
_jit_module: ModuleType | None = None


def backend() -> ModuleType:
    """The module with ``forward``, ``backward`` and ``build_info``, obtained at the first call.

    The environment variable ``BATCHNORM_EXT_BACKEND`` chooses: ``auto`` (the prebuilt module if it
    was built for this torch, else the JIT, else pure PyTorch with one message), ``prebuilt``,
    ``jit`` or ``torch`` (pure PyTorch).

    Raises
    ------
    NativeModuleError
        The way that was asked for does not work.
    ValueError
        ``BATCHNORM_EXT_BACKEND`` is none of the above.
    """
    return obtained().backend


def obtained() -> Obtained:
    """`backend` with where it came from."""
    global _obtained
    if _obtained is None:
        with _lock:
            if _obtained is None:
                _obtained = _obtain(os.environ.get("BATCHNORM_EXT_BACKEND", "") or "auto")
    return _obtained


def load(verbose: bool = False) -> ModuleType:
    """Compile csrc with ``torch.utils.cpp_extension``, or take it from the cache, and load it.

    The cache is a private folder below ``BATCHNORM_EXT_BUILD_DIR``, else below torch's own folder
    for extensions, with one entry for each torch, CUDA, architecture list, Python and state of the
    sources. Many processes may call this at once: one compiles, the others wait for it.

    Parameters
    ----------
    verbose : bool
        Show the compiler's output.

    Returns
    -------
    ModuleType
        The native module, the same at each call.

    Raises
    ------
    NativeModuleError
        It cannot be compiled or loaded; the text names the cause and the fix.
    """
    return _load_jit(verbose, because="")


def _obtain(choice: str) -> Obtained:
    if choice not in _CHOICES:
        raise ValueError(
            f"BATCHNORM_EXT_BACKEND must be one of {', '.join(_CHOICES)}, got {choice}"
        )
    problems: dict[str, str] = {}
    if choice in ("auto", "prebuilt"):
        try:
            return Obtained(_load_prebuilt(), "prebuilt", problems)
        except NativeModuleError as error:
            if choice == "prebuilt":
                raise
            problems["prebuilt"] = str(error)
    if choice in ("auto", "jit"):
        # That nothing is installed, as in a checkout, is no problem to report; a misfit is.
        misfit = problems.get("prebuilt", "") if prebuilt_files() else ""
        try:
            return Obtained(_load_jit(verbose=False, because=misfit), "jit", problems)
        except NativeModuleError as error:
            if choice == "jit":
                raise
            problems["jit"] = str(error)
    from . import _reference

    if choice == "auto":
        _tell(
            "no native module, so the slower pure-PyTorch path is used: "
            + "; ".join(problems.values())
            + ". `python -m batchnorm_ext` says how to fix it; BATCHNORM_EXT_BACKEND=torch "
            "accepts it."
        )
    return Obtained(_reference, "torch", problems)


# ---- prebuilt -----------------------------------------------------------------------------------


def prebuilt_files(package: Path | None = None) -> list[Path]:
    """What a package's folder has of a native module: the module, its stamp, both or nothing."""
    names = [f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES] + ["_C.json"]
    files = [(package or _build.PACKAGE) / name for name in names]
    return [file for file in files if file.exists()]


def _load_prebuilt() -> ModuleType:
    if prebuilt_files():
        folder, problem = _build.PACKAGE, _misfit(_build.PACKAGE)
    else:
        # Python run in a checkout finds the checkout, where nothing is built. What is installed
        # serves it as well, as long as it was built from the same sources.
        installed = [Path(entry or ".").resolve() / "batchnorm_ext" for entry in sys.path]
        fitting = [path for path in installed if prebuilt_files(path) and not _misfit(path)]
        if not fitting:
            raise NativeModuleError(f"no native module is installed (fix: {INSTALL} .)")
        folder, problem = fitting[0], None
    if problem is None:
        try:
            return _load_library(f"{__package__}._C", prebuilt_files(folder)[0])
        except ImportError as error:
            problem = f"does not load ({str(error).splitlines()[0]})"
    raise NativeModuleError(f"the installed native module {problem} (fix: {INSTALL} .)")


def _misfit(package: Path) -> str | None:
    """Why the native module in this folder must not be loaded, by its stamp alone, or None."""
    stamp = _build.read_stamp(package / "_C.json")
    if stamp is None:
        return "has no readable stamp"
    cuda = torch.version.cuda or ""
    problem = stamp.mismatch(torch.__version__, cuda, _build.source_hash())
    return problem or _uncovered_gpu(stamp)


def _load_library(name: str, library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, library)
    if spec is None or spec.loader is None:
        raise ImportError(f"{library} is no native module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _uncovered_gpu(stamp: _build.Stamp) -> str | None:
    # Only where CUDA runs already: asking would start it, in processes that never use it as well.
    if stamp.cuda and torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            capability = torch.cuda.get_device_capability(index)
            if not _build.covers(stamp.arch_list, capability):
                name = ".".join(map(str, capability))
                return f"has no code for a GPU of compute capability {name}, only {stamp.arch_list}"
    return None


# ---- compiled at first use ----------------------------------------------------------------------


def _load_jit(verbose: bool, because: str) -> ModuleType:
    global _jit_module
    with _lock:
        if _jit_module is None:
            try:
                toolkit, _ = _build.choose_toolkit()
                build = _build.describe(toolkit)
                directory = cache_directory(build)
            except (_build.CompilerUnavailable, _build.CudaUnavailable, OSError) as error:
                raise NativeModuleError(f"the native module cannot be compiled: {error}") from error
            module = _load_published(directory)
            if module is not None and because:
                _tell(f"{because}; a module compiled earlier is used instead")
            if module is None:
                with _exclusive(directory):
                    module = _load_published(directory)
                    module = module or _compile(build, directory, verbose, because)
            _jit_module = module
        return _jit_module


def cache_directory(build: _build.Build) -> Path:
    """The private folder for this build, made if need be.

    Raises
    ------
    PermissionError
        Others could put a module of their own there.
    """
    root = os.environ.get("BATCHNORM_EXT_BUILD_DIR") or os.environ.get("TORCH_EXTENSIONS_DIR")
    if not root:
        from torch import _appdirs

        root = _appdirs.user_cache_dir(appname="torch_extensions")
    directory = Path(root).expanduser().resolve() / build.key()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for folder in (directory, *directory.parents):
        _refuse_if_others_can_write(folder)
    return directory


def _refuse_if_others_can_write(folder: Path) -> None:
    """Refuse a folder in which another user could create, replace or rename files."""
    status = folder.stat()
    if status.st_uid not in (0, os.geteuid()):
        raise PermissionError(_refusal(folder, "belongs to another user"))
    if status.st_mode & stat.S_ISVTX:  # as in /tmp: only a file's owner may replace it
        return
    if status.st_mode & stat.S_IWOTH:
        raise PermissionError(_refusal(folder, "can be written by everyone"))
    if status.st_mode & stat.S_IWGRP and not _is_own_group(status.st_gid):
        raise PermissionError(_refusal(folder, "can be written by its group"))


def _refusal(folder: Path, fault: str) -> str:
    return (
        f"{folder} {fault}, and a module is only loaded from where nobody else can put one "
        "(fix: set BATCHNORM_EXT_BUILD_DIR to a folder that only you can write, or chmod go-w)"
    )


def _is_own_group(gid: int) -> bool:
    """Whether a group is its user's alone, by the convention that it then has the user's name."""
    import grp
    import pwd

    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


@contextlib.contextmanager
def _exclusive(directory: Path) -> Iterator[None]:
    """Hold the folder's lock, which the operating system releases however its holder ends."""
    import fcntl  # not on Windows, where nothing is compiled

    with open(directory / "build.lock", "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _tell(f"waiting for another process that is compiling in {directory}")
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def _load_published(directory: Path) -> ModuleType | None:
    """Load what an earlier compilation left, or None."""
    try:
        library = directory / json.loads((directory / "module.json").read_text())["library"]
    except (OSError, ValueError, KeyError):
        return None
    if not library.is_file():
        return None
    try:
        return _load_library(library.stem, library)
    except ImportError:  # damaged on disk: compile it again
        return None


def _compile(build: _build.Build, directory: Path, verbose: bool, because: str) -> ModuleType:
    """Compile into a folder of its own below `directory` and publish it there when it is done.

    A folder for each attempt keeps what a killed build left behind (half an object file, torch's
    lock, a compiler that still runs) away from the next one. The caller holds the lock.
    """
    try:
        _build.require_compiler()
    except _build.CompilerUnavailable as error:
        raise NativeModuleError(f"the native module cannot be compiled: {error}") from None
    for left_behind in directory.glob("attempt-*"):
        shutil.rmtree(left_behind, ignore_errors=True)
    attempt = Path(tempfile.mkdtemp(prefix="attempt-", dir=directory))
    build.generate(attempt)
    target = f"CUDA {build.stamp.cuda}, {build.stamp.arch_list}" if build.toolkit else "CPU"
    _tell(
        f"{because}{'; ' if because else ''}compiling for torch {build.stamp.torch} ({target}) "
        f"in {directory}, once"
    )
    macros = [f"-D{name}" if value is None else f"-D{name}={value}" for name, value in build.macros]

    def quote(flags: list[str]) -> list[str]:
        return list(map(shlex.quote, flags))

    with _environment(build.environment):
        tools = _build.torch_extension_tools(build)
        try:
            module = tools.load(
                name=_JIT_NAME,
                sources=[str(source) for source in build.sources],
                extra_cflags=quote([*macros, *build.cxx_flags]),
                extra_cuda_cflags=quote([*macros, *build.nvcc_flags]),
                extra_ldflags=quote([*build.link_flags, f"-L{attempt}"]),
                extra_include_paths=[str(attempt), *map(str, build.include_dirs)],
                build_directory=str(attempt),
                with_cuda=build.toolkit is not None,
                verbose=verbose,
            )
        except (RuntimeError, OSError, ImportError) as error:
            log = directory / "build.log"
            log.write_text(str(error), encoding="utf-8")
            raise NativeModuleError(
                f"the native module could not be compiled: {_first_error(str(error))} "
                f"(all of it: {log})"
            ) from error
    assert module.__file__ is not None
    library = Path(module.__file__)
    for intermediate in attempt.glob("*.o"):
        intermediate.unlink()
    partial = attempt / "module.json"
    partial.write_text(json.dumps({"library": library.relative_to(directory).as_posix()}))
    os.replace(partial, directory / "module.json")
    return module


def _first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"\berror\b|Killed|not found", line)]
    compiler = [line for line in telling if re.search(r":\s*(fatal )?error\b", line)]
    return next(iter(compiler or telling[1:] or telling or lines), "no reason was given")


@contextlib.contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _tell(text: str) -> None:
    print(f"batchnorm_ext: {text}", file=sys.stderr, flush=True)
