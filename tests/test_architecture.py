"""The tree's own rules: who may include and import whom, first lines, unique stems, and the typed stub."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
from native_module import ROOT

import batchnorm_ext
from batchnorm_ext import _extension, _reference

CSRC = ROOT / "csrc"
CPP = sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cuh", ".cpp", ".cu"})
PYTHON = sorted((ROOT / "batchnorm_ext").glob("*.py"))

# Which rooms of csrc each room may include; "x/backend.h" is that one header of the room x.
MAY_INCLUDE = {
    "core": {"core"},
    "cpu": {"core", "cpu"},
    "cuda/primitives": {"core", "cuda/primitives"},
    "cuda/kernels": {"core", "cuda/primitives", "cuda/kernels"},
    "cuda/launch": {"core", "cuda/primitives", "cuda/kernels", "cuda/launch"},
    "bindings": {"core", "cpu/backend.h", "cuda/launch/backend.h", "bindings", "build_stamp.h"},
}

# Headers from elsewhere: torch's, and CUDA's own.
TORCH = re.compile(r"(torch|ATen|c10|pybind11|Python\.h)")
CUDA = re.compile(r"(cuda|cooperative_groups|cub/|cuda/|mma\.h|nv/|vector_types\.h|device_)")

# Which modules of the package each module may import.
MAY_IMPORT = {
    "_version": set(),
    "_build": set(),
    "_reference": {"_version"},
    "_extension": {"_build", "_reference"},
    "_operators": {"_extension", "_reference"},
    "autograd": {"_operators", "_reference"},
    "stepwise": {"autograd", "_operators", "_reference"},
    "functional": {"stepwise", "autograd", "_operators", "_extension", "_reference"},
    "modules": {"functional", "stepwise", "autograd", "_operators", "_extension"},
    "_fusion": {"modules", "_reference"},
    "convert": {"_fusion", "modules"},
    "distributed": {
        "convert",
        "_fusion",
        "modules",
        "functional",
        "stepwise",
        "autograd",
        "_reference",
    },
    "renorm": {"modules", "functional", "autograd", "_operators", "_reference"},
    "ghost": {"modules", "functional", "_extension", "_reference"},
    "__init__": {
        "_version",
        "_extension",
        "autograd",
        "functional",
        "modules",
        "convert",
        "distributed",
        "renorm",
        "ghost",
    },
    "__main__": {"_build", "_extension"},
}


def named(paths: list[Path]) -> dict:
    return {"argvalues": paths, "ids": [path.relative_to(ROOT).as_posix() for path in paths]}


def room_of(path: Path) -> str:
    return path.parent.relative_to(CSRC).as_posix()


@pytest.mark.parametrize("path", **named(CPP))
def test_include_table(path):
    room = room_of(path)
    text = path.read_text()
    for header in re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, re.MULTILINE):
        allowed = MAY_INCLUDE[room]
        assert header in allowed or header.rpartition("/")[0] in allowed, (
            f"{room} includes {header}"
        )
        assert (CSRC / header).exists() or header == "build_stamp.h", f"{header} is not below csrc"
    for header in re.findall(r"^\s*#\s*include\s+<([^>]+)>", text, re.MULTILINE):
        assert room == "bindings" or not TORCH.match(header), f"{room} includes torch's {header}"
        free = room in ("bindings",) or room.startswith("cuda")
        assert free or not CUDA.match(header), f"{room} includes CUDA's {header}"
        if room == "core":
            assert re.fullmatch(r"\w+", header), f"core includes {header}"


@pytest.mark.parametrize("path", **named(PYTHON))
def test_import_table(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            imported |= {node.module} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            assert "batchnorm_ext" not in names, f"{path.name} imports the package by its name"
    assert imported <= MAY_IMPORT[path.stem], f"{path.name} imports {imported}"


def test_the_build_description_imports_torch_inside_functions_only():
    tree = ast.parse((ROOT / "batchnorm_ext/_build.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert "torch" not in ast.dump(node)


def test_stems_of_compiled_files_are_unique():
    stems = [path.stem for path in CPP if path.suffix in {".cpp", ".cu"}]
    assert len(stems) == len(set(stems))


def test_no_folder_hides_torchs_headers():
    assert not {p.name for p in CSRC.rglob("*") if p.is_dir()} & {"torch", "ATen", "c10", "caffe2"}


@pytest.mark.parametrize("path", **named([p for p in CPP if p.suffix in {".h", ".cuh"}]))
def test_headers_are_read_once(path):
    assert "#pragma once" in path.read_text().splitlines()[:8]


def all_files() -> list[Path]:
    python = [p for folder in ("tests", "benchmarks") for p in (ROOT / folder).rglob("*.py")]
    native = [p for p in (ROOT / "tests").rglob("*") if p.suffix in {".h", ".cuh", ".cpp", ".cu"}]
    stub = ROOT / "batchnorm_ext/_C.pyi"
    return sorted({*PYTHON, *CPP, *python, *native, stub, ROOT / "setup.py", ROOT / "Makefile"})


@pytest.mark.parametrize("path", **named(all_files()))
def test_the_first_line_says_what_the_file_owns(path):
    lines = path.read_text().splitlines()
    first = lines[1] if lines[0].startswith("#!") else lines[0]
    assert re.match(r'(// |# |"""|r""")\S.{9,}', first), f"begins with {first!r}"


@pytest.mark.parametrize("path", **named(all_files()))
def test_nothing_is_left_to_do(path):
    unfinished = "|".join(["TO" + "DO", "FIX" + "ME", "X" * 3])
    assert not re.search(rf"\b({unfinished})\b", path.read_text())


@pytest.mark.parametrize("module", [batchnorm_ext, batchnorm_ext.functional])
def test_public_names_are_documented(module):
    for name in module.__all__:
        assert isinstance(getattr(module, name), str) or getattr(module, name).__doc__, name


def stub_functions() -> dict[str, ast.FunctionDef]:
    tree = ast.parse((ROOT / "batchnorm_ext/_C.pyi").read_text())
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def parameters(node: ast.FunctionDef) -> list[str]:
    return [argument.arg for argument in node.args.args]


@pytest.mark.native
def test_the_stub_equals_the_module():
    module = _extension.backend()
    public = {name for name in dir(module) if not name.startswith("_")}
    stub = stub_functions()
    assert public == set(stub)
    for name, node in stub.items():
        signature = getattr(module, name).__doc__.splitlines()[0]
        assert re.findall(r"(\w+): ", signature) == parameters(node), signature


def test_the_stub_equals_the_pure_pytorch_path():
    for name, node in stub_functions().items():
        own = inspect.signature(getattr(_reference, name)).parameters
        takes_anything = [p.kind for p in own.values()] == [inspect.Parameter.VAR_POSITIONAL]
        assert takes_anything or list(own) == parameters(node)
