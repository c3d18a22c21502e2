"""Builds the native module around the emulated CUDA kernels, and runs Python tests on it: they take it for the CPU's.

python tests/native/cuda_module.py tests/test_batch_norm.py ...
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# A folder for the module search path, after the checkout, where the package looks for what is installed.
INSTALLED = ROOT / "build" / "emulated"

sys.path.insert(0, str(ROOT))
from batchnorm_ext import _build  # noqa: E402


def build(folder: Path) -> None:
    """Build the module, or what of it has changed, with its stamp beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    description = _build.describe(None)
    description.generate(folder)
    csrc = _build.source_root()
    sources = [HERE / "cuda_emulation.cpp", HERE / "cuda_as_cpu.cpp", *csrc.glob("bindings/*.cpp")]
    sources += [*csrc.glob("cuda/launch/*.cpp"), *csrc.glob("cuda/launch/*.cu")]
    os.environ.update(description.environment)
    _build.torch_extension_tools(description).load(
        name="_C",
        sources=sorted(map(str, sources)),
        # The CUDA sources are C++ to the emulation.
        extra_cflags=[*description.cxx_flags, "-O1", "-x", "c++"],
        extra_ldflags=description.link_flags,
        extra_include_paths=[str(path) for path in (folder, csrc, HERE, HERE / "emulation")],
        build_directory=str(folder),
        with_cuda=False,
    )
    _build.write_stamp(folder / "_C.json", description.stamp)


# Another module that fits this checkout may be found before it.
RUN = """
import sys, pytest
from batchnorm_ext import _extension
found = _extension.backend()
assert found.build_info()["instruction_set"] == "emulated CUDA", f"{found.__file__} would be tested"
sys.exit(pytest.main(sys.argv[1:]))
"""


def main() -> int:
    """The tests' exit status; what they are comes from the command line."""
    build(INSTALLED / "batchnorm_ext")
    environment = os.environ | {"BATCHNORM_EXT_BACKEND": "prebuilt", "PYTHONPATH": str(INSTALLED)}
    command = [sys.executable, "-c", RUN, *sys.argv[1:]]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
