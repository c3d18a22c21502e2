"""`python -m batchnorm_ext`: what was built, with what, what is in use, and how to fix what is not."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys

import torch

from . import _build, _extension


def main() -> int:
    """Print the report; return 0 when every backend that this machine could use is in use."""
    fixes: list[str] = []
    report = {
        "batchnorm_ext": f"{_build.VERSION} in {_build.PACKAGE}",
        "python": f"{platform.python_version()} ({sys.executable})",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        "gpu": _gpus(),
        "c++": _version_of([os.environ.get("CXX", "c++"), "--version"]),
        "ninja": _version_of(["ninja", "--version"]),
        "nvcc": _nvcc(),
    }
    try:
        found = _extension.obtained()
    except (_extension.NativeModuleError, ValueError) as error:
        report["module"] = f"none: {error}"
        fixes.append(str(error))
    else:
        report |= _describe(found, fixes)
    for name, value in report.items():
        print(f"{name:<16}{value}")
    for fix in fixes:
        print(f"to do: {fix}")
    return 1 if fixes else 0


def _describe(found: _extension.Obtained, fixes: list[str]) -> dict[str, str]:
    info = found.backend.build_info()
    if found.how == "torch":
        fixes.extend(found.problems.values())
        return {"module": "none: pure PyTorch on the CPU and on GPUs"}
    if "prebuilt" in found.problems and _extension.prebuilt_files():
        fixes.append(found.problems["prebuilt"])
    return {
        "module": f"{found.how}, {found.backend.__file__}",
        "built for": f"torch {info['torch']}, CUDA {info['cuda'] or 'none'}, by {info['compiler']}",
        "sources": str(info["source_hash"]),
        "cpu": f"native, {info['instruction_set']}",
        "cuda": _cuda(info, fixes),
    }


def _cuda(info: dict, fixes: list[str]) -> str:
    if torch.version.cuda is None:
        return "none: this torch has no CUDA"
    if not info["cuda"]:
        toolkit, reason = _build.choose_toolkit()
        if reason:
            fixes.append(f"for a module with CUDA: {reason}; then {_extension.INSTALL} .")
        elif toolkit:
            fixes.append(f"for a module with CUDA: {_extension.INSTALL} .")
        return "not built" if toolkit or reason else "not built, as FORCE_ONLY_CPU asks"
    text = f"native, built for {info['arch_list']}"
    if not torch.cuda.is_available():
        return f"{text}; no GPU is visible"
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if not _build.covers(info["arch_list"], capability):
            name = ".".join(map(str, capability))
            fixes.append(
                f"GPU {index} needs code for {name}: "
                f"TORCH_CUDA_ARCH_LIST={name} {_extension.INSTALL} ."
            )
    return text


def _gpus() -> str:
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join(names) or "none visible"


def _nvcc() -> str:
    try:
        toolkit = _build.find_toolkit()
    except _build.CudaUnavailable as error:
        return f"none: {error}"
    return f"{toolkit.version[0]}.{toolkit.version[1]} in {toolkit.home}"


def _version_of(command: list[str]) -> str:
    path = shutil.which(command[0], path=_build.path_with_ninja())
    if path is None:
        return "not found"
    run = subprocess.run([path, *command[1:]], capture_output=True, text=True, check=False)
    return (run.stdout.splitlines() or ["does not run"])[0]


if __name__ == "__main__":
    sys.exit(main())
