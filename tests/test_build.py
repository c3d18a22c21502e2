"""The build: how CUDA is found, what is compiled with what, what is packed, and that the tests test it."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from native_module import ROOT, Package, copy_sources

import batchnorm_ext
from batchnorm_ext import _build, _extension

VARIABLES = (
    "CUDA_HOME", "CUDA_PATH", "FORCE_CUDA", "FORCE_ONLY_CPU", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS",
    "DEBUG", "NVCC_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS", "CXX",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def no_nvcc(monkeypatch, tmp_path):
    """A machine without nvcc, on its path or where it usually is."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(_build, "USUAL_HOME", tmp_path / "nowhere")
    monkeypatch.setattr(_build, "_pip_folders", lambda name: [])


@pytest.fixture
def torch_with_cuda(monkeypatch):
    """A torch that says it was built with CUDA 13.0."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def fake_nvcc(home: Path, release: str = "13.0", top: str = "") -> Path:
    """A script that answers as nvcc does; asked for its home, it names `top`."""
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        '#!/bin/sh\ncase "$1" in\n'
        f"--version) echo 'Cuda compilation tools, release {release}, V{release}.88' ;;\n"
        "--list-gpu-code) echo sm_75 sm_80 sm_90 sm_100 ;;\n"
        f"--dryrun) echo '#$ TOP={top}' >&2 ;;\n"
        "esac\n"
    )
    nvcc.chmod(0o755)
    return nvcc


# ---- CUDA or not --------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_nvcc", "torch_with_cuda")
def test_without_nvcc_the_cpu_build_says_why():
    toolkit, reason = _build.choose_toolkit()
    assert toolkit is None
    assert "nvcc was not found" in reason
    assert "CUDA_HOME" in reason


@pytest.mark.usefixtures("no_nvcc")
def test_a_torch_without_cuda_gets_a_cpu_build_without_ado(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert _build.choose_toolkit() == (None, None)


@pytest.mark.usefixtures("torch_with_cuda")
def test_cuda_needs_no_visible_gpu(tmp_path, monkeypatch):
    fake_nvcc(tmp_path)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert _build.choose_toolkit() == (_build.Toolkit(tmp_path, (13, 0)), None)
    monkeypatch.setenv("FORCE_ONLY_CPU", "1")
    assert _build.choose_toolkit() == (None, None)


@pytest.mark.usefixtures("torch_with_cuda", "no_nvcc")
def test_a_forced_cuda_build_without_nvcc_is_an_error_that_says_why(monkeypatch):
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(_build.CudaUnavailable, match="FORCE_CUDA is set, but nvcc was not found"):
        _build.choose_toolkit()


def test_a_forced_cuda_build_of_a_torch_without_cuda_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(_build.CudaUnavailable, match=r"but torch .* has no CUDA"):
        _build.choose_toolkit()


def test_forcing_both_is_an_error(monkeypatch):
    monkeypatch.setenv("FORCE_CUDA", "1")
    monkeypatch.setenv("FORCE_ONLY_CPU", "1")
    with pytest.raises(_build.CudaUnavailable, match="both set"):
        _build.choose_toolkit()


@pytest.mark.usefixtures("torch_with_cuda")
@pytest.mark.parametrize("forced", [False, True])
def test_an_nvcc_of_another_major_version_is_not_used(tmp_path, monkeypatch, forced):
    fake_nvcc(tmp_path, release="12.8")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    expected = "is of CUDA 12.8, but torch .* was built with CUDA 13.0"
    if forced:
        monkeypatch.setenv("FORCE_CUDA", "1")
        with pytest.raises(_build.CudaUnavailable, match=expected):
            _build.choose_toolkit()
    else:
        toolkit, reason = _build.choose_toolkit()
        assert toolkit is None
        assert "is of CUDA 12.8" in reason


def test_cuda_home_without_nvcc_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(_build.CudaUnavailable, match=f"CUDA_HOME={tmp_path} has no bin/nvcc"):
        _build.find_toolkit()


def test_nvcc_is_asked_for_its_home(tmp_path, monkeypatch):
    home = tmp_path / "toolkit"
    fake_nvcc(home)
    wrapper = fake_nvcc(tmp_path / "usr", top=f"{home}/bin/..")
    monkeypatch.setenv("PATH", str(wrapper.parent) + os.pathsep + os.environ["PATH"])
    assert _build.find_toolkit() == _build.Toolkit(home, (13, 0))


def test_an_nvcc_that_does_not_say_its_home_is_followed(tmp_path, monkeypatch):
    home = tmp_path / "toolkit"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(fake_nvcc(home))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert _build.find_toolkit().home == home


# ---- architectures, jobs, flags -----------------------------------------------------------------


@pytest.mark.usefixtures("torch_with_cuda")
def test_architectures_as_asked_for_or_for_what_is_visible_or_for_all(tmp_path, monkeypatch):
    fake_nvcc(tmp_path)
    toolkit = _build.Toolkit(tmp_path, (13, 0))
    assert _build.choose_architectures(toolkit) == "7.5;8.0;9.0;10.0+PTX"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    capabilities = [(9, 0), (8, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    assert _build.choose_architectures(toolkit) == "8.0;9.0+PTX"
    capabilities[0] = (12, 0)  # newer than this nvcc
    assert _build.choose_architectures(toolkit) == "8.0;10.0+PTX"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0+PTX")
    assert _build.choose_architectures(toolkit) == "8.6;9.0+PTX"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "native")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(_build.CudaUnavailable, match="no GPU is visible"):
        _build.choose_architectures(toolkit)


@pytest.mark.parametrize(
    ("arch_list", "capability", "expected"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 9), True),  # the same major version
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("9.0+PTX", (8, 0), False),
        ("9.0a", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),  # of this architecture only
        ("7.5;8.0;9.0;10.0;12.0+PTX", (12, 1), True),
        ("7.5;8.0;9.0;10.0;12.0+PTX", (7, 0), False),
        ("Hopper", (9, 0), True),
    ],
)
def test_which_gpus_a_list_serves(arch_list, capability, expected):
    assert _build.covers(arch_list, capability) is expected


def test_jobs_are_limited_by_cores_memory_and_the_user(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert _build.job_count(available_gib=64) == 8
    assert _build.job_count(available_gib=7) == 3
    assert _build.job_count(available_gib=0.5) == 1
    monkeypatch.setenv("MAX_JOBS", "5")
    assert _build.job_count(available_gib=0.5) == 5


def test_memory_is_measured():
    assert 0 < _build._available_gib() < 2**20


def test_flags(monkeypatch):
    build = _build.describe(None)
    flags = build.cxx_flags + build.nvcc_flags
    assert "-O3" in build.cxx_flags
    assert not [flag for flag in flags if "std=" in flag or "fast" in flag or "march" in flag]
    assert build.macros == []
    assert int(build.environment["MAX_JOBS"]) >= 1
    monkeypatch.setenv("DEBUG", "1")
    monkeypatch.setenv("NVCC_FLAGS", "-lineinfo --threads 2")
    build = _build.describe(None)
    assert "-O3" not in build.cxx_flags
    assert build.nvcc_flags[-3:] == ["-lineinfo", "--threads", "2"]


def test_flags_on_macos(tmp_path, monkeypatch):
    """Apple's compiler driver takes OpenMP only for its preprocessor; older torch brings no header."""
    monkeypatch.setattr(_build.sys, "platform", "darwin")
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    build = _build.describe(None)
    assert not [flag for flag in build.cxx_flags + build.link_flags if "openmp" in flag]
    (tmp_path / "include").mkdir()
    (tmp_path / "include/omp.h").touch()
    build = _build.describe(None)
    assert build.cxx_flags[-2:] == ["-Xpreprocessor", "-fopenmp"]
    assert build.link_flags == []


def test_nothing_is_built_on_windows(monkeypatch):
    monkeypatch.setattr(_build.os, "name", "nt")
    with pytest.raises(_build.CompilerUnavailable, match="on Windows"):
        _build.describe(None)


@pytest.mark.usefixtures("torch_with_cuda")
def test_a_cuda_build_is_described(tmp_path, monkeypatch):
    fake_nvcc(tmp_path)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    monkeypatch.setattr(_build, "_pip_folders", lambda name: [tmp_path / name])
    build = _build.describe(_build.Toolkit(tmp_path, (13, 0)))
    assert build.macros == [("BATCHNORM_EXT_WITH_CUDA", None)]
    assert build.environment["TORCH_CUDA_ARCH_LIST"] == build.stamp.arch_list == "9.0"
    assert build.environment["CUDA_HOME"] == str(tmp_path)
    assert (build.stamp.torch, build.stamp.cuda) == (torch.__version__, "13.0")
    assert "-isystem" in build.nvcc_flags  # the toolkit has no cusparse.h, torch's wheels do
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libcudart.so.13").touch()
    (tmp_path / "lib").rename(tmp_path / "wheel")
    monkeypatch.setattr(_build, "_pip_folders", lambda name: [tmp_path / "wheel"])
    build.generate(tmp_path / "generated")
    assert (tmp_path / "generated/libcudart.so").resolve().name == "libcudart.so.13"


def test_every_source_file_is_compiled_exactly_once():
    csrc = _build.source_root()
    on_disk = {path for path in csrc.rglob("*") if path.suffix in {".cpp", ".cu"}}
    assert set(_build.sources(cuda=True)) == on_disk
    assert len(_build.sources(cuda=True)) == len(on_disk)
    on_cpu = {path for path in on_disk if path.relative_to(csrc).parts[0] != "cuda"}
    assert set(_build.sources(cuda=False)) == on_cpu


def test_a_key_differs_with_whatever_the_module_depends_on(monkeypatch):
    build = _build.describe(None)
    others = [
        build._replace(stamp=build.stamp._replace(**{field: "other"}))
        for field in build.stamp._fields
    ]
    others += [build._replace(cxx_flags=[]), build._replace(macros=[("A", None)])]
    keys = {build.key(), *(other.key() for other in others)}
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-lineinfo")
    keys.add(build.key())
    monkeypatch.setenv("CXX", "clang++")
    keys.add(build.key())
    assert len(keys) == len(others) + 3
    assert torch.__version__ in build.key()


def test_the_stamp_header_changes_only_when_the_stamp_does(tmp_path):
    build = _build.describe(None)
    build.generate(tmp_path)
    header = tmp_path / "build_stamp.h"
    assert f"#define BATCHNORM_EXT_TORCH {torch.__version__}\n" in header.read_text()
    os.utime(header, (1, 1))
    build.generate(tmp_path)
    assert header.stat().st_mtime == 1
    build._replace(stamp=build.stamp._replace(source_hash="other")).generate(tmp_path)
    assert header.stat().st_mtime > 1


def test_a_stamp_survives_the_file_and_damage_is_no_stamp(tmp_path):
    stamp = _build.describe(None).stamp
    file = tmp_path / "_C.json"
    _build.write_stamp(file, stamp)
    assert _build.read_stamp(file) == stamp
    for damage in ("", "[]", "{}", '{"version": 1}'):
        file.write_text(damage)
        assert _build.read_stamp(file) is None
    assert _build.read_stamp(tmp_path / "missing") is None


# ---- what is installed and packed ---------------------------------------------------------------


@pytest.mark.native
def test_the_module_under_test_was_built_from_these_sources():
    root = ROOT / "csrc"
    installed = _build.source_root()
    assert {p.relative_to(installed) for p in installed.rglob("*.*")} >= {
        p.relative_to(root) for p in root.rglob("*.*")
    }
    for path in root.rglob("*.*"):
        assert (installed / path.relative_to(root)).read_bytes() == path.read_bytes()
    assert _extension.backend().build_info()["source_hash"] == _build.source_hash()


@pytest.mark.native
@pytest.mark.skipif(os.environ.get("BATCHNORM_EXT_BACKEND") != "prebuilt", reason="not installed")
def test_the_package_under_test_is_the_installed_one():
    assert Path(batchnorm_ext.__file__).parent != ROOT / "batchnorm_ext"
    assert _extension.obtained().how == "prebuilt"
    assert _build.read_stamp(_build.PACKAGE / "_C.json").torch == torch.__version__
    assert (_build.PACKAGE / "py.typed").exists()
    assert (_build.PACKAGE / "_C.pyi").exists()


@pytest.mark.native
def test_the_doctor_finds_nothing_to_do():
    command = [sys.executable, "-m", "batchnorm_ext"]
    run = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    for expected in (batchnorm_ext.__version__, torch.__version__, "module", "native", "nvcc"):
        assert expected in run.stdout
    assert "to do" not in run.stdout


@pytest.mark.native
def test_the_doctor_names_the_fix(tmp_path):
    package = Package(tmp_path)
    process = package.start(
        "import runpy, sys; sys.argv[0] = 'batchnorm_ext'; runpy.run_module('batchnorm_ext', run_name='__main__')",
        CXX="no-such-compiler",
    )
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "pure PyTorch" in output
    assert "to do: no native module is installed (fix: pip install" in output
    assert "to do: the native module cannot be compiled: there is no C++ compiler" in output


def setup(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py in `folder`."""
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.native
def test_setup_explains_a_forced_cuda_build_that_cannot_be_done(tmp_path):
    run = setup(copy_sources(tmp_path), "--version", FORCE_CUDA="1", CUDA_HOME=str(tmp_path))
    assert run.returncode != 0
    assert "FORCE_CUDA is set, but" in run.stderr.splitlines()[-1]


@pytest.mark.native
@pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA")
def test_setup_warns_where_nvcc_is_missing(tmp_path):
    run = setup(copy_sources(tmp_path), "--version", CUDA_HOME=str(tmp_path))
    assert run.returncode == 0
    assert "building batchnorm_ext for the CPU only: CUDA_HOME=" in run.stderr


@pytest.mark.native
def test_setup_does_without_a_compiler(tmp_path):
    source = copy_sources(tmp_path / "source")
    arguments = ("-q", "bdist_wheel", "--dist-dir", str(tmp_path))
    run = setup(source, *arguments, CXX="no-such-compiler", FORCE_ONLY_CPU="1")
    assert run.returncode == 0, run.stderr
    assert "without native module: there is no C++ compiler no-such-compiler" in run.stderr
    (wheel,) = tmp_path.glob("*-none-any.whl")
    with zipfile.ZipFile(wheel) as file:
        assert not {"batchnorm_ext/_C.json", "build"} & set(file.namelist())
        file.extractall(tmp_path / "site")
    package = Package(tmp_path / "elsewhere")
    package.environment["PYTHONPATH"] = str(tmp_path / "site")
    output, errors = package.run(CXX="no-such-compiler")
    assert '"how": "torch"' in output
    assert "the slower pure-PyTorch path is used" in errors


@pytest.mark.native
def test_setup_explains_a_forced_cuda_build_without_a_compiler(tmp_path):
    fake_nvcc(tmp_path / "toolkit")
    source = copy_sources(tmp_path / "source")
    (tmp_path / "with").mkdir()
    startup = "import torch.version; torch.version.cuda = '13.0'"
    (tmp_path / "with/sitecustomize.py").write_text(startup)
    run = setup(
        source,
        "--version",
        FORCE_CUDA="1",
        CUDA_HOME=str(tmp_path / "toolkit"),
        CXX="no-such-compiler",
        TORCH_CUDA_ARCH_LIST="9.0",
        PYTHONPATH=str(tmp_path / "with"),
    )
    assert run.returncode != 0
    assert "FORCE_CUDA is set, but there is no C++ compiler" in run.stderr.splitlines()[-1]


@pytest.mark.native
def test_setup_explains_that_it_needs_torch(tmp_path):
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/torch.py").write_text("raise ImportError('no torch here')")
    source = copy_sources(tmp_path / "source")
    run = setup(source, "--version", PYTHONPATH=str(tmp_path / "hidden"))
    assert run.returncode != 0
    assert "install torch first" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.native
@pytest.mark.slow
def test_a_wheel_built_from_the_sdist_holds_all_that_is_needed(tmp_path):
    source = copy_sources(tmp_path / "source")
    run = setup(source, "-q", "sdist", "--dist-dir", str(tmp_path), FORCE_ONLY_CPU="1")
    assert run.returncode == 0, run.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
        file.extractall(tmp_path / "unpacked", filter="data")
    assert names >= {"csrc/bindings/module.cpp", "csrc/core/empty.h", "batchnorm_ext/_build.py"}
    assert names >= {"batchnorm_ext/py.typed", "batchnorm_ext/_C.pyi", "LICENSE"}

    (unpacked,) = (tmp_path / "unpacked").iterdir()
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*command, "-w", str(tmp_path), str(unpacked)],
        env=os.environ | {"FORCE_ONLY_CPU": "1"},
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        file.extractall(tmp_path / "site")
    inside = {name.removeprefix("batchnorm_ext/") for name in names}
    assert inside >= {
        "csrc/bindings/module.cpp",
        "csrc/core/empty.h",
        "_C.json",
        "_C.pyi",
        "py.typed",
    }

    package = Package(tmp_path / "elsewhere")
    package.environment["PYTHONPATH"] = str(tmp_path / "site")
    output, errors = package.run()
    assert '"how": "prebuilt"' in output
    assert errors == ""
    output, _ = package.run(BATCHNORM_EXT_BACKEND="jit")
    assert '"how": "jit"' in output
