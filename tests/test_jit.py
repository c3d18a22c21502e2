"""The JIT: one compilation among many processes, after killed ones, in private folders only; and falling back."""

from __future__ import annotations

import contextlib
import importlib.machinery
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from native_module import Package, copy_sources

import batchnorm_ext
from batchnorm_ext import _build, _extension

pytestmark = pytest.mark.native


@pytest.fixture
def package(tmp_path: Path) -> Package:
    return Package(tmp_path)


class Here:
    """The package's obtaining of a native module, in this process but on a tiny csrc."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
        self.root = copy_sources(folder / "here")
        self.cache = folder / "cache of here"
        self._monkeypatch, self._capsys = monkeypatch, capsys
        monkeypatch.setattr(_build, "PACKAGE", self.root / "batchnorm_ext")
        monkeypatch.setenv("BATCHNORM_EXT_BUILD_DIR", str(self.cache))
        monkeypatch.setenv("FORCE_ONLY_CPU", "1")

    def obtain(self, choice: str = "auto") -> tuple[_extension.Obtained, list[str]]:
        """Obtain as a fresh process does; also return the lines that it says."""
        self._monkeypatch.setattr(_extension, "_jit_module", None)
        found = _extension._obtain(choice)
        return found, self._capsys.readouterr().err.splitlines()

    def entry(self) -> Path:
        """The cache's only folder."""
        (entry,) = self.cache.iterdir()
        return entry

    def install_prebuilt(self, **changes: str) -> None:
        """Install a native module that cannot load, stamped as the right one but for `changes`."""
        stamp = _build.describe(None).stamp._replace(**changes)
        _build.write_stamp(_build.PACKAGE / "_C.json", stamp)
        suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
        (_build.PACKAGE / f"_C{suffix}").write_bytes(b"no module at all")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> Here:
    return Here(tmp_path, monkeypatch, capsys)


def outcome(streams: tuple[str, str]) -> tuple[dict, list[str]]:
    """What the process printed about its backend, and the lines it wrote to stderr."""
    output, errors = streams
    assert "Traceback" not in errors
    return json.loads(output.splitlines()[-1]), errors.splitlines()


def slow_compiler(folder: Path) -> str:
    """A compiler that sleeps for a minute first where the environment says SLOW."""
    compiler = folder / "c++"
    compiler.write_text(f'#!/bin/sh\n[ -z "$SLOW" ] || sleep 60\nexec {shutil.which("c++")} "$@"\n')
    compiler.chmod(0o755)
    return str(compiler)


def test_first_use_compiles_with_one_line_and_the_next_is_silent(package):
    found, lines = outcome(package.run())
    assert found["how"] == "jit"
    assert len(lines) == 1
    assert lines[0].startswith(f"batchnorm_ext: compiling for torch {torch.__version__} (CPU) in ")
    again, lines = outcome(package.run())
    assert again == found
    assert lines == []


def test_importing_compiles_nothing(package):
    _, errors = package.run("import batchnorm_ext")
    assert errors == ""
    assert package.entries() == []


def test_of_many_processes_one_compiles(package):
    processes = [package.start() for _ in range(4)]
    results = [outcome(process.communicate(timeout=180)) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert len({found["file"] for found, _ in results}) == 1
    lines = [line for _, lines in results for line in lines]
    assert sum("compiling for torch" in line for line in lines) == 1
    assert all("compiling" in line for line in lines)


def test_a_killed_build_hangs_neither_who_waits_nor_who_comes_next(package, tmp_path):
    compiler = slow_compiler(tmp_path)
    killed = package.start(CXX=compiler, SLOW="1")
    waiting = None
    try:
        assert "compiling for torch" in killed.stderr.readline()
        waiting = package.start(CXX=compiler)
        assert "waiting for another process" in waiting.stderr.readline()
        assert list(package.cache.glob("*/attempt-*/lock"))  # torch's own, left behind
        os.kill(killed.pid, signal.SIGKILL)  # its compiler runs on
        found, lines = outcome(waiting.communicate(timeout=120))
    finally:
        for process in filter(None, (killed, waiting)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert found["how"] == "jit"
    assert len(lines) == 1
    assert "compiling for torch" in lines[0]


def test_the_module_says_what_it_was_built_for(here):
    info = here.obtain()[0].backend.build_info()
    assert info["version"] == batchnorm_ext.__version__
    assert info["torch"] == torch.__version__
    assert info["cuda"] == ""
    assert info["source_hash"] == _build.source_hash()


def test_changed_sources_are_compiled_beside_the_old_ones(here):
    first, _ = here.obtain()
    (here.root / "csrc/core/empty.h").write_text("// Another header.\n")
    second, lines = here.obtain()
    assert len(lines) == 1
    assert second.backend.build_info()["source_hash"] != first.backend.build_info()["source_hash"]
    assert len(list(here.cache.iterdir())) == 2


def test_what_an_interrupted_build_left_is_cleared(here):
    here.obtain()
    (here.entry() / "module.json").unlink()
    (here.entry() / "lock").touch()
    for attempt in here.entry().glob("attempt-*"):
        (attempt / "lock").touch()
    found, _ = here.obtain()
    assert found.how == "jit"
    assert len(list(here.entry().glob("attempt-*"))) == 1


def test_a_damaged_module_is_compiled_again(here, tmp_path, monkeypatch):
    here.obtain()
    here.cache = here.cache.rename(tmp_path / "moved")  # Python keeps what it loaded, by its path
    monkeypatch.setenv("BATCHNORM_EXT_BUILD_DIR", str(here.cache))
    (library,) = here.cache.glob("*/*/*.so")
    library.unlink()
    library.write_bytes(b"no module at all")
    found, lines = here.obtain()
    assert found.how == "jit"
    assert len(lines) == 1


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_the_cache_is_private_and_refused_where_it_is_not(here):
    here.obtain()
    assert stat.S_IMODE(here.entry().stat().st_mode) == 0o700
    for folder in (here.cache, here.entry()):
        mode = folder.stat().st_mode
        folder.chmod(0o777)
        found, lines = here.obtain()
        assert found.how == "torch"
        assert len(lines) == 1
        assert f"{folder} can be written by everyone" in lines[0]
        assert "BATCHNORM_EXT_BUILD_DIR" in lines[0]
        with pytest.raises(_extension.NativeModuleError, match="can be written by everyone"):
            here.obtain("jit")
        folder.chmod(mode)


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_which_folders_are_refused(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    _extension._refuse_if_others_can_write(folder)
    folder.chmod(0o1777)
    _extension._refuse_if_others_can_write(folder)
    folder.chmod(0o770)
    monkeypatch.setattr(_extension, "_is_own_group", lambda gid: True)
    _extension._refuse_if_others_can_write(folder)
    monkeypatch.setattr(_extension, "_is_own_group", lambda gid: False)
    with pytest.raises(PermissionError, match="can be written by its group"):
        _extension._refuse_if_others_can_write(folder)
    folder.chmod(0o700)
    if os.geteuid() == 0:
        os.chown(folder, 12345, 12345)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(PermissionError, match="belongs to another user"):
        _extension._refuse_if_others_can_write(folder)


def test_a_checkout_uses_what_is_installed_while_the_sources_are_the_same(here, monkeypatch):
    library = Path(here.obtain()[0].backend.__file__)
    installed = here.root / "site/batchnorm_ext"
    installed.mkdir(parents=True)
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    monkeypatch.syspath_prepend(installed.parent)
    compiled_for = _build.describe(None).stamp
    _build.write_stamp(installed / "_C.json", compiled_for)
    (installed / f"_C{suffix}").write_bytes(library.read_bytes())
    loaded = []
    monkeypatch.setattr(_extension, "_load_library", lambda *call: loaded.append(call))
    found, lines = here.obtain()
    assert found.how == "prebuilt"
    assert loaded == [("batchnorm_ext._C", installed / f"_C{suffix}")]
    assert lines == []
    _build.write_stamp(installed / "_C.json", compiled_for._replace(source_hash="other"))
    assert here.obtain()[0].how == "jit"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"torch": "1.13.0"}, "was built for torch 1.13.0, but this is torch"),
        ({"cuda": "9.2"}, "was built for CUDA 9.2, but this torch has"),
        ({"python": "cpython-36m"}, "was built for cpython-36m, but this is"),
        ({"source_hash": "0"}, "is older than the sources"),
    ],
    ids=["torch", "cuda", "python", "sources"],
)
def test_a_misfit_is_not_loaded(here, changes, expected):
    here.install_prebuilt(**changes)
    with pytest.raises(_extension.NativeModuleError, match=expected) as caught:
        here.obtain("prebuilt")
    assert _extension.INSTALL in str(caught.value)


def test_a_misfit_is_compiled_anew_with_one_message_that_names_the_fix(here):
    here.install_prebuilt(torch="1.13.0")
    for then in ("compiling for torch", "a module compiled earlier is used instead"):
        found, lines = here.obtain()
        assert found.how == "jit"
        assert len(lines) == 1
        assert "the installed native module was built for torch 1.13.0" in lines[0]
        assert _extension.INSTALL in lines[0]
        assert then in lines[0]


def test_a_module_that_does_not_load_is_compiled_anew(here, package):
    here.install_prebuilt()
    for name in ("_C.json", f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"):
        shutil.copy(_build.PACKAGE / name, package.root / "batchnorm_ext")
    found, lines = outcome(package.run())
    assert found["how"] == "jit"
    assert len(lines) == 1
    assert "does not load" in lines[0]


def test_without_module_and_compiler_pure_pytorch_serves_with_one_message(here, monkeypatch):
    here.install_prebuilt(torch="1.13.0")
    monkeypatch.setenv("CXX", "no-such-compiler")
    found, lines = here.obtain()
    assert found.how == "torch"
    assert len(lines) == 1
    assert "was built for torch 1.13.0" in lines[0]
    assert "there is no C++ compiler no-such-compiler" in lines[0]
    assert "python -m batchnorm_ext" in lines[0]


def test_sources_that_do_not_compile_are_reported_by_their_first_error(here):
    (here.root / "csrc/bindings/module.cpp").write_text("#error this cannot be\n")
    found, lines = here.obtain()
    assert found.how == "torch"
    assert len(lines) == 2  # that it compiles, and what came of it
    assert "could not be compiled" in lines[1]
    assert "error: #error this cannot be" in lines[1]
    log = re.search(r"\(all of it: (.*?)\)", lines[1])
    assert "this cannot be" in Path(log[1]).read_text()


@pytest.mark.parametrize("choice", ["prebuilt", "jit"])
def test_a_choice_that_does_not_work_is_an_error(here, choice, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(_extension.NativeModuleError, match="fix: "):
        here.obtain(choice)


def test_pure_pytorch_by_choice_is_silent(here):
    found, lines = here.obtain("torch")
    assert found.how == "torch"
    assert lines == []


def test_an_unknown_choice_is_refused(here):
    with pytest.raises(ValueError, match="one of auto, prebuilt, jit, torch, got fastest"):
        here.obtain("fastest")


def test_a_gpu_without_code_for_it_is_a_misfit(monkeypatch):
    stamp = _build.Stamp("1", "2", "13.0", "7.5;9.0", "hash", "python")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert _extension._uncovered_gpu(stamp) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (12, 0))
    assert "compute capability 12.0" in _extension._uncovered_gpu(stamp)


@pytest.mark.slow
def test_the_real_module_by_jit_equals_the_prebuilt_one(tmp_path):
    """In a process of its own, since two modules cannot register the same operators in one."""
    code = """
        import sys, torch, batchnorm_ext
        from batchnorm_ext import _extension
        if sys.argv[1] == "jit":
            assert batchnorm_ext.load() is _extension.backend()
        torch.manual_seed(0)
        x = torch.randn(8, 5, 7, 9, requires_grad=True)
        layer = batchnorm_ext.BatchNorm2d(5)
        y = layer(x)
        y.backward(torch.randn_like(y))
        assert _extension.obtained().how == sys.argv[1]
        torch.save([y.detach(), x.grad, layer.weight.grad, *layer.buffers()], sys.argv[2])
    """
    results = []
    for how in ("prebuilt", "jit"):
        environment = os.environ | {
            "BATCHNORM_EXT_BACKEND": how,
            "BATCHNORM_EXT_BUILD_DIR": str(tmp_path / "cache"),
        }
        file = tmp_path / how
        command = [sys.executable, "-c", textwrap.dedent(code), how, str(file)]
        subprocess.run(command, env=environment, cwd=tmp_path, check=True)
        results.append(torch.load(file))
    for prebuilt, jit in zip(*results, strict=True):
        assert torch.equal(prebuilt, jit)
