"""Runs functions on several processes of a process group; the processes are started once."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

# How long a rank waits for one that does not come.
TIMEOUT = timedelta(seconds=20)


class Ranks:
    """Up to ``most`` processes, started at the first call.

    A process that ends or does not answer makes the call fail; the next call starts all of them anew.
    """

    def __init__(self, most: int, backend: str = "gloo") -> None:
        self._most = most
        self._backend = backend
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, count: int, function: Callable[..., Any], *arguments: object) -> list[Any]:
        """Call ``function(rank, *arguments)`` in a fresh process group of ``count`` ranks; return what it returned."""
        answers = self.answers(count, function, *arguments)
        failures = [f"rank {rank}: {text}" for rank, (ok, text) in enumerate(answers) if not ok]
        assert not failures, "\n".join(failures)
        return [value for _, value in answers]

    def answers(
        self, count: int, function: Callable[..., Any], *arguments: object
    ) -> list[tuple[bool, Any]]:
        """As `run`, but a rank that failed answers (False, traceback), and one that ended (False, "ended")."""
        if not self._processes:
            self._start()
        with tempfile.TemporaryDirectory() as folder:
            task = pickle.dumps((function, arguments, count, os.path.join(folder, "store")))
            for pipe in self._pipes[:count]:
                pipe.send_bytes(task)
            answers = [self._answer(pipe) for pipe in self._pipes[:count]]
        if (False, "ended") in answers:
            self.stop()
        return answers

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for rank in range(self._most):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, theirs, self._backend), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        # Or the first to start would wait no longer than TIMEOUT for the others.
        for pipe in self._pipes:
            pipe.recv_bytes()

    @staticmethod
    def _answer(pipe: Connection) -> tuple[bool, Any]:
        try:
            if pipe.poll(6 * TIMEOUT.total_seconds()):
                return pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionError):
            pass
        return False, "ended"


def _serve(rank: int, pipe: Connection, backend: str) -> None:
    torch.set_num_threads(1)
    # Or a rank whose function communicates with nobody could leave while the others still connect to it.
    os.environ["TORCH_DIST_INIT_BARRIER"] = "1"
    pipe.send_bytes(b"started")
    while True:
        try:
            function, arguments, count, store = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            dist.init_process_group(
                backend, init_method=f"file://{store}", rank=rank, world_size=count, timeout=TIMEOUT
            )
            answer = pickle.dumps((True, function(rank, *arguments)))
        except Exception:
            answer = pickle.dumps((False, traceback.format_exc()))
        if dist.is_initialized():
            dist.destroy_process_group()
        pipe.send_bytes(answer)
