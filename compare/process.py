"""The parent's side of one engine: starts the subprocess, asks, waits no longer than the limit, and never trusts the answer.

An idle engine is stopped with SIGSTOP (its whole process group), so that several stay loaded and interleave A B A B while
exactly one of them can use the machine: thread pools of several engines spin when idle, and would slow the one being timed.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compare.errors import EngineFailure
from compare.protocol import LoadOptions, Request, Trace, check_traces

ROOT = Path(__file__).resolve().parent.parent


class EngineProcess:
    """One engine's worker. Use as a context manager, or call `close`.

    engine: a name under compare.engines, or a dotted module (the tests' fakes). log: where the engine's own output goes.
    """

    def __init__(self, engine: str, python: Path, log: Path, *, cpus: Sequence[int] = (), env: Mapping[str, str] | None = None) -> None:
        self.engine, self.log = engine, log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log_file = log.open("ab")
        self._process = subprocess.Popen(
            [str(python), "-m", "compare.worker", engine, ",".join(map(str, cpus))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log_file,
            env=worker_environment(len(cpus), env),
            start_new_session=True,  # a group of its own: what the engine forks is stopped and killed with it
            cwd=log.parent,
        )
        self._lines: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self._stopped = False

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, op: str, limit: float, **message: Any) -> dict[str, Any]:
        """One op and its result. Raises `EngineFailure`; after a crash or time-out the process is dead."""
        self.resume()
        line = json.dumps({"op": op, **message}) + "\n"
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
            raw = self._lines.get(timeout=limit)
        except queue.Empty:
            self.kill()
            raise EngineFailure("timeout", f"no answer to {op} within {limit:.0f} s") from None
        except (BrokenPipeError, OSError) as error:
            raise self._crash(op) from error
        if not raw:
            raise self._crash(op)
        try:
            answer = json.loads(raw)
        except ValueError:
            self.kill()
            raise EngineFailure("invalid", f"the answer to {op} was not JSON: {raw[:80]!r}") from None
        if "error" in answer:
            told = answer["error"]
            with contextlib.suppress(OSError):
                self._log_file.write(told["traceback"].encode())
            raise EngineFailure(told["kind"], first_lines(told["message"]))
        result: dict[str, Any] = answer["ok"]
        return result

    def load(self, model: Path, options: LoadOptions, limit: float) -> dict[str, Any]:
        return self.ask("load", limit, model=str(model), options=asdict(options))

    def generate(self, requests: list[Request], limit: float, vocab_size: int = 0) -> list[Trace]:
        """Traces that have been checked against the parent's own clock."""
        start = time.perf_counter()
        result = self.ask("generate", limit, requests=[asdict(r) for r in requests])
        wall = time.perf_counter() - start
        try:
            traces = [Trace.from_json(t) for t in result["traces"]]
            check_traces(requests, traces, wall, vocab_size)
        except (ValueError, KeyError, TypeError) as error:
            raise EngineFailure("invalid", f"its answer can't be true: {error}") from error
        return traces

    def pause(self) -> None:
        """Stops every process of the engine's group until the next question."""
        if self.alive and not self._stopped:
            os.killpg(self._process.pid, signal.SIGSTOP)
            # A signal takes a moment; the next engine must not start before this one has really stopped (or died).
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            self._stopped = True

    def resume(self) -> None:
        if self._stopped:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGCONT)
            self._stopped = False

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """Asks it to leave, gives it ten seconds, then ends it and whatever it left in its group."""
        self.resume()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(b'{"op": "exit"}\n')
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        self.kill()
        self._log_file.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(b"")  # end of file: the worker is gone

    def _crash(self, op: str) -> EngineFailure:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        self.kill()
        code = self._process.returncode
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        if code == -signal.SIGKILL:
            how += " (out of memory, or ended from outside)"
        return EngineFailure("crash", f"died of {how} during {op}; last words: {last_words(self.log)}")


def worker_environment(threads: int, extra: Mapping[str, str] | None) -> dict[str, str]:
    """The environment a worker sees: thread counts for every pool that reads one, no hub, and this package on the path."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONHOME", "VIRTUAL_ENV")}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", PYTHONUNBUFFERED="1", DO_NOT_TRACK="1")
    if threads:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
            env[name] = str(threads)
    return {**env, **(extra or {})}


def last_words(log: Path, lines: int = 3) -> str:
    """The last non-empty lines of a log, joined: usually the error."""
    try:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 8192))
            text = file.read().decode(errors="replace")
    except OSError:
        return "none"
    return " | ".join(collections.deque((s.strip() for s in text.splitlines() if s.strip()), lines))[-400:] or "none"


def first_lines(message: str, limit: int = 400) -> str:
    return " ".join(message.split())[:limit]
