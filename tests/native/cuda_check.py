"""Compiles every CUDA kernel for every architecture, lists what each needs, and refuses spills.

A spill is a register kept in memory for lack of others. The kernels that walk over whole tensors
must have none; neither may they use a stack frame, which is the same by another name.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parents[2] / "csrc"
MEASURING = CSRC.parent / "benchmarks" / "device_limits.cu"
ARCHITECTURES = ("75", "80", "89", "90", "100", "120")
DOCUMENT = CSRC.parent / "docs" / "performance.md"
MARKS = ("<!-- cuda-check: begin -->\n", "<!-- cuda-check: end -->")
DTYPES = {"double": 8, "float": 4, "float16": 2, "bfloat16": 2}
HOT = ("reduce", "pointwise", "resident")
WIDTH = 100


class Kernel(NamedTuple):
    """What ptxas says of one kernel."""

    name: str
    registers: int
    shared: int
    stack: int
    spilled: int


def demangle(names: list[str]) -> list[str]:
    """Readable names, without the namespaces and types that all kernels share."""
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    text = re.sub(r"\bbatchnorm_ext::(cuda::)?|^void ", "", text, flags=re.MULTILINE)
    return [line[: line.rindex(">(") + 1] if ">(" in line else line for line in text.splitlines()]


def parse(log: str) -> list[Kernel]:
    """The kernels in what ``ptxas -v`` printed."""
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers"
        r"(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
        re.DOTALL,
    )
    found = list(pattern.finditer(log))
    names = demangle([match["name"] for match in found])
    return [
        Kernel(
            name,
            int(match["registers"]),
            int(match["shared"] or 0),
            int(match["stack"]),
            int(match["stores"]) + int(match["loads"]),
        )
        for name, match in zip(names, found, strict=True)
    ]


def compile_source(nvcc: str, source: Path, architecture: str, standard: str) -> list[Kernel]:
    """Compile one file for one architecture to a cubin; an error carries the compiler's output."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-cubin", "-O3", f"-std={standard}", f"-I{CSRC}", "-Xptxas", "-v"]
        command += [f"-arch=sm_{architecture}", str(source), "-o", f"{folder}/kernel.cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return parse(done.stderr)


def table(kernels: dict[str, dict[str, Kernel]], architectures: list[str]) -> str:
    """Markdown: registers of the main kernels, those of plain batch norm with 16-byte vectors."""
    rows: dict[str, dict[str, str]] = {}
    for name, compiled in kernels.items():
        match = re.fullmatch(
            r"(\w+)<(\w+)<(\w+)(?:, (?:false|\d))*>, (\w+), (\d+), \d+(, true|, false)?>", name
        )
        if match is None or match[1] not in HOT or match[3] not in DTYPES or "Activat" in match[2]:
            continue
        if int(match[5]) * DTYPES[match[3]] != 16:
            continue
        found = [compiled[architecture] for architecture in architectures]
        spilled = any(kernel.spilled or kernel.stack for kernel in found)
        cell = " / ".join(str(kernel.registers) for kernel in found) + " spills" * spilled
        streams = " that streams" if match[6] == ", true" else ""
        row = f"`{match[1]}`{streams}, `{match[2]}`, `{match[4]}`"
        rows.setdefault(row, {})[match[3]] = cell
    lines = [
        "| kernel, operation, view | " + " | ".join(DTYPES) + " |",
        "|---|" + "---|" * len(DTYPES),
    ]
    for row, cells in sorted(rows.items()):
        lines.append(f"| {row} | " + " | ".join(cells.get(dtype, "") for dtype in DTYPES) + " |")
    return "\n".join(lines) + "\n"


def document(text: str) -> None:
    """Put the table between its marks in the document."""
    before, rest = DOCUMENT.read_text().split(MARKS[0])
    DOCUMENT.write_text(before + MARKS[0] + text + MARKS[1] + rest.split(MARKS[1])[1])


def main() -> int:
    """Print the table; 1 where a hot kernel spills, 2 where there is no compiler."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--architectures", default=",".join(ARCHITECTURES))
    parser.add_argument("--std", default="c++17")
    parser.add_argument(
        "--document", action="store_true", help=f"write the table in {DOCUMENT.name}"
    )
    options = parser.parse_args()
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("nvcc is not on PATH; install a CUDA toolkit to check the kernels", file=sys.stderr)
        return 2

    architectures = options.architectures.split(",")
    sources = [*sorted(CSRC.glob("cuda/**/*.cu")), MEASURING]
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        jobs = {
            (source, architecture): pool.submit(
                compile_source, nvcc, source, architecture, options.std
            )
            for architecture in architectures
            for source in sources
        }
        kernels: dict[str, dict[str, Kernel]] = {}
        for (source, architecture), job in jobs.items():
            compiled = job.result()
            if not compiled:
                raise SystemExit(f"{source} holds no kernel for sm_{architecture}")
            for kernel in compiled:
                kernels.setdefault(kernel.name, {})[architecture] = kernel

    print("registers a thread, by architecture; shared memory is sized at launch unless given\n")
    print(f"{'kernel':{WIDTH}}" + "".join(f"{'sm_' + a:>8}" for a in architectures))
    bad = []
    for name in sorted(kernels):
        cells = ""
        for architecture in architectures:
            kernel = kernels[name][architecture]
            mark = "!" if kernel.spilled or kernel.stack else ""
            cells += f"{mark + str(kernel.registers):>8}"
            if mark and name.startswith(HOT):
                bad.append((architecture, kernel))
            if kernel.shared:
                cells += f" +{kernel.shared}B"
        print(f"{name:{WIDTH}}{cells}")
    for architecture, kernel in bad:
        print(
            f"sm_{architecture} {kernel.name}: {kernel.spilled} bytes spilled, "
            f"stack frame of {kernel.stack}"
        )
    if options.document:
        document(table(kernels, architectures))
    count = sum(len(by_architecture) for by_architecture in kernels.values())
    print(f"\n{count} kernels compiled, {len(bad)} hot kernels spill")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
