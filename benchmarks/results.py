"""The record of a run: environment, rows and their schema, files under ``results/``."""

from __future__ import annotations

import datetime
import json
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from batchnorm_ext._build import source_hash
from batchnorm_ext._extension import obtained

SCHEMA = "batchnorm_ext-benchmark/1"
ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"

CONTENDERS = (
    *(
        "batchnorm_ext",
        "batchnorm_ext_fused",
        "floor",
        "torch_eager",
        "torch_eager_no_cudnn",
        "torch_compile",
    ),
    *("onednn", "apex", "inplace_abn", "jax"),
)

# Every timing row has these keys, and may have those of OPTIONAL where they are known. `ratio` is
# this contender's time over batchnorm_ext's in the same rounds, with its 95 % interval.
REQUIRED: dict[str, type | tuple[type, ...]] = {
    "device": str,
    "driver": str,
    "cuda": str,
    "torch": str,
    "python": str,
    "commit": str,
    "case": str,
    "shape": list,
    "dtype": str,
    "layout": str,
    "op": str,
    "cache": str,
    "contender": str,
    "date": str,
    "median_us": float,
    "p10_us": float,
    "p90_us": float,
    "rounds": int,
    "bytes_min": int,
    "floor_us": (float, type(None)),
}
OPTIONAL: dict[str, type | tuple[type, ...]] = {
    "launches": int,
    "threads": int,
    "count": int,
    "ratio": float,
    "ratio_low": float,
    "ratio_high": float,
}
IDENTITY = ("device", "case", "shape", "dtype", "layout", "op", "cache", "threads", "contender")

# Sections that are not timings, and what identifies an entry.
SECTIONS: dict[str, tuple[str, ...]] = {
    "rows": IDENTITY,
    "memory": ("case", "shape", "dtype", "layout", "mode", "contender"),
    "accuracy": ("contender", "mean_over_std", "dtype"),
    "excluded": ("contender", "case", "op", "reason"),
    "missing": ("contender",),
}


class SchemaError(ValueError):
    """A file or row that is not what this benchmark writes."""


def check_row(row: dict[str, Any]) -> None:
    """Raise `SchemaError` where a timing row breaks the schema."""
    for key, kind in REQUIRED.items():
        if key not in row:
            raise SchemaError(f"row lacks {key}: {row}")
        if not isinstance(row[key], kind) or isinstance(row[key], bool):
            raise SchemaError(f"{key} has type {type(row[key]).__name__}: {row}")
    for key in row.keys() - REQUIRED.keys():
        if key not in OPTIONAL:
            raise SchemaError(f"row has an unknown key {key}: {row}")
        if not isinstance(row[key], OPTIONAL[key]):
            raise SchemaError(f"{key} has type {type(row[key]).__name__}: {row}")
    if row["contender"] not in CONTENDERS:
        raise SchemaError(f"unknown contender {row['contender']}")
    if row["cache"] not in ("cold", "hot"):
        raise SchemaError(f"cache must be cold or hot, not {row['cache']}")
    if not 0 < row["p10_us"] <= row["median_us"] <= row["p90_us"]:
        raise SchemaError(f"times out of order: {row}")


@dataclass
class Record:
    """All that a run found out."""

    environment: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)
    accuracy: list[dict[str, Any]] = field(default_factory=list)
    excluded: list[dict[str, Any]] = field(default_factory=list)
    missing: list[dict[str, Any]] = field(default_factory=list)

    def add_row(self, **measured: Any) -> None:
        """Append a timing row; what describes the machine comes from the environment."""
        machine = ("device", "driver", "cuda", "torch", "python", "commit", "date")
        row = {key: self.environment[key] for key in machine} | measured
        check_row(row)
        self.rows.append(row)

    def merged(self, newer: Record) -> Record:
        """This record with what `newer` measured, which replaces entries of the same identity."""
        result = Record(newer.environment)
        present = {row["contender"] for row in newer.rows}
        older = replace(
            self, missing=[entry for entry in self.missing if entry["contender"] not in present]
        )
        for section, identity in SECTIONS.items():
            both = [*getattr(older, section), *getattr(newer, section)]
            known = {_identity(entry, identity): entry for entry in both}
            setattr(result, section, list(known.values()))
        return result

    def save(self, path: Path) -> None:
        """Write as JSON, one entry a line, so that a diff of two files can be read."""
        parts = [f'"schema": {json.dumps(SCHEMA)}']
        parts.append(f'"environment": {json.dumps(self.environment, indent=1)}')
        for section in SECTIONS:
            entries = ",\n".join(json.dumps(entry) for entry in getattr(self, section))
            parts.append(f'"{section}": [\n{entries}\n]' if entries else f'"{section}": []')
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text("{" + ",\n".join(parts) + "}\n")
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read a file and hold it against the schema."""
        data = json.loads(path.read_text())
        if data.get("schema") != SCHEMA:
            raise SchemaError(f"{path} has schema {data.get('schema')}, expected {SCHEMA}")
        for row in data["rows"]:
            check_row(row)
        return cls(data["environment"], **{section: data[section] for section in SECTIONS})


def _identity(entry: dict[str, Any], keys: Iterable[str]) -> str:
    return json.dumps([entry.get(key) for key in keys])


def results_path(environment: dict[str, Any], root: Path = RESULTS) -> Path:
    """``<root>/<device>/<date>-<commit>.json``."""
    slug = re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")
    day = environment["date"][:10]
    return root / slug / f"{day}-{environment['commit']}.json"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """Short hash of the checkout, with ``-dirty`` where code differs from it; without git, of csrc."""
    head = _output("git", "rev-parse", "--short", "HEAD")
    if not head:
        return f"sources-{source_hash()[:7]}"
    code = ("csrc", "batchnorm_ext", "benchmarks/*.py")
    return head + ("-dirty" if _output("git", "status", "--porcelain", "--", *code) else "")


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""

    def entry(key: str) -> str:
        found = re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE)
        return found.group(1).strip() if found else ""

    name = entry("model name") or platform.processor() or platform.machine()
    family, model = entry("cpu family"), entry("model")
    # Virtual machines name generations of a processor alike.
    return f"{name} (family {family}, model {model})" if family and model else name


def _gpu_state() -> dict[str, str]:
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu")
    answer = _output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    values = answer.splitlines()[0].split(", ") if answer else []
    return dict(zip(fields, values, strict=False))


def describe_environment(device: str, threads: int, seed: int) -> dict[str, Any]:
    """What a reader needs to know about the machine and the software that was measured."""
    module = obtained()
    build = {key: str(value) for key, value in module.backend.build_info().items()}
    machine = describe_machine(device, threads)
    return machine | {"seed": seed, "backend": module.how, "build": build}


def describe_machine(device: str, threads: int) -> dict[str, Any]:
    """The machine, torch and the checkout, without the compiled module."""
    gpu = _gpu_state() if device == "cuda" else {}
    capability = torch.backends.cpu.get_cpu_capability()
    cpu = f"{_cpu_name()}, {threads} core{'s' * (threads > 1)}, {capability}"
    return {
        "device": torch.cuda.get_device_name(0) if device == "cuda" else cpu,
        "driver": gpu.get("driver_version", ""),
        "cuda": torch.version.cuda or "",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu,
        "threads": threads,
        "system": platform.platform(),
        "clocks": gpu,
    }
