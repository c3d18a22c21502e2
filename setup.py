"""Hands the build description in batchnorm_ext/_build.py to setuptools."""

import importlib.util
import os
import shutil
import sys
import warnings
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def load_build_description():
    """Load _build.py by path: the package itself cannot be imported before it is built."""
    path = ROOT / "batchnorm_ext" / "_build.py"
    spec = importlib.util.spec_from_file_location("batchnorm_ext_build", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


try:
    import torch
except ImportError as error:
    raise SystemExit(
        "batchnorm_ext is compiled against the installed torch, which cannot be imported "
        f"({error}); install torch first, then run: pip install --no-build-isolation ."
    ) from None

description = load_build_description()
toolkit, why_cpu = description.choose_toolkit()

# Objects built against one torch are of no use to another.
base = Path("build") / f"torch-{torch.__version__}"
generated = ROOT / base / "generated"


class BuildPython(build_py):
    """Starts from an empty folder, so that a file deleted since the last build is not packed."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "batchnorm_ext", ignore_errors=True)
        super().run()


def native_module():
    """What setuptools is told of the native module; nothing where none can be built.

    The package then serves all calls with plain PyTorch, which it says at its first one.
    """
    try:
        build = description.describe(toolkit)
        description.require_compiler()
    except description.CompilerUnavailable as error:
        if description.is_set("FORCE_CUDA"):
            raise SystemExit(f"batchnorm_ext: FORCE_CUDA is set, but {error}") from None
        warnings.warn(f"installing batchnorm_ext without native module: {error}", stacklevel=1)
        return {"cmdclass": {"build_py": BuildPython}}
    if why_cpu:
        warnings.warn(f"building batchnorm_ext for the CPU only: {why_cpu}", stacklevel=1)
    if "pip-build-env" in torch.__file__:
        print(
            f"batchnorm_ext: building against torch {torch.__version__} of pip's isolated environment. "
            "If yours is another, the module will be compiled again at first use; "
            "pip install --no-build-isolation . builds against yours.",
            file=sys.stderr,
        )
    os.environ.update(build.environment)
    cpp_extension = description.torch_extension_tools(build)

    class BuildNative(cpp_extension.BuildExtension):
        """Leaves the stamp beside the module it built."""

        def run(self):
            build.generate(generated)
            super().run()
            module = Path(self.get_ext_fullpath("batchnorm_ext._C"))
            description.write_stamp(module.with_name("_C.json"), build.stamp)

    extension = cpp_extension.CUDAExtension if toolkit else cpp_extension.CppExtension
    module = extension(
        "batchnorm_ext._C",
        [path.relative_to(ROOT).as_posix() for path in build.sources],
        include_dirs=[str(generated), *map(str, build.include_dirs)],
        library_dirs=[str(generated)],
        define_macros=build.macros,
        extra_compile_args={"cxx": build.cxx_flags, "nvcc": build.nvcc_flags},
        extra_link_args=build.link_flags,
    )
    commands = {"build_py": BuildPython, "build_ext": BuildNative}
    return {"ext_modules": [module], "cmdclass": commands}


setup(
    # Here, since pyproject.toml cannot say it in a way that both old and new setuptools accept.
    license="MIT",
    options={"build": {"build_base": str(base)}},
    **native_module(),
)
