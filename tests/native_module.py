"""A copy of the package around a native module that compiles in a second, and processes that use it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

TINY_MODULE = r"""// A native module that says what it was built for.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "build_stamp.h"

#define QUOTE_TOKENS(...) #__VA_ARGS__
#define QUOTE(...) QUOTE_TOKENS(__VA_ARGS__)
#define CONCATENATE_TOKENS(a, b) a##b
#define CONCATENATE(a, b) CONCATENATE_TOKENS(a, b)

static PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{ssssssssssssss}", "version", QUOTE(BATCHNORM_EXT_VERSION), "torch", QUOTE(BATCHNORM_EXT_TORCH),
                       "cuda", QUOTE(BATCHNORM_EXT_CUDA), "arch_list", QUOTE(BATCHNORM_EXT_ARCH_LIST),
                       "instruction_set", "none", "compiler", __VERSION__, "source_hash",
                       QUOTE(BATCHNORM_EXT_SOURCE_HASH));
}

static PyMethodDef methods[] = {{"build_info", build_info, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "tiny", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC CONCATENATE(PyInit_, TORCH_EXTENSION_NAME)() { return PyModule_Create(&definition); }
"""

# Prints what `obtained` came to, as the last line of stdout.
OBTAIN = """
    import json
    from batchnorm_ext import _extension
    found = _extension.obtained()
    print(json.dumps({
        "how": found.how, "problems": found.problems, "file": found.backend.__file__,
        "info": found.backend.build_info(),
    }))
"""


def copy_sources(folder: Path) -> Path:
    """Copy all that setup.py needs into `folder`, with a tiny csrc, and return `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (
        "setup.py",
        "pyproject.toml",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
    ):
        shutil.copy(ROOT / name, folder)
    (folder / "batchnorm_ext").mkdir()
    for pattern in ("*.py", "*.pyi", "py.typed"):
        for path in (ROOT / "batchnorm_ext").glob(pattern):
            shutil.copy(path, folder / "batchnorm_ext")
    for room in ("bindings", "core", "cuda/kernels"):
        (folder / "csrc" / room).mkdir(parents=True)
    (folder / "csrc/bindings/module.cpp").write_text(TINY_MODULE)
    (folder / "csrc/core/empty.h").write_text("// A header.\n")
    return folder


class Package:
    """The package in a folder of its own, used from processes of their own."""

    def __init__(self, folder: Path) -> None:
        self.root = copy_sources(folder / "source")
        self.cache = folder / "cache"
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("BATCHNORM_EXT_", "FORCE_", "TORCH_", "CXX", "CUDA_"))
        } | {
            "PYTHONPATH": str(self.root),
            "PYTHONDONTWRITEBYTECODE": "1",
            "BATCHNORM_EXT_BUILD_DIR": str(self.cache),
            "FORCE_ONLY_CPU": "1",
        }

    def start(self, code: str = OBTAIN, **environment: str) -> subprocess.Popen[str]:
        """Start a process in a session of its own; `environment` adds to the package's."""
        return subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)],
            env=self.environment | environment,
            cwd=self.root.parent,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, code: str = OBTAIN, **environment: str) -> tuple[str, str]:
        """Run a process to its end, which must be a good one; return its stdout and stderr."""
        process = self.start(code, **environment)
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        return output, errors

    def entries(self) -> list[Path]:
        """The folders of the cache, one for each kind of build."""
        return sorted(self.cache.glob("batchnorm_ext-*"))
