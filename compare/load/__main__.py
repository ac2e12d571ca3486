"""`python -m compare.load EXPERIMENT`: what a server of this machine does under load.

    mixed      clients that stream, leave, don't read and send nonsense: does every request get exactly one ending, and is
               everything as before when they are gone?
    overload   random arrivals at multiples of the capacity: does the work that is done in time stay at its peak?
    offline    the same requests through LLM.generate and through streaming clients: what does serving cost?

A server is started for it with the flags after `--`. The last line is a verdict; the exit code is 1 if it is bad.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compare import machine
from compare.load.crowd import STREAMS, Crowd
from compare.load.drive import Result, closed_loop, open_loop
from compare.load.server import Served, served

RATES = (0.5, 1, 2, 3)  # of what a closed loop gets, which its last requests, alone on the server, make look smaller than it is
RESOURCES = {"rss_bytes": 1.05, "open_files": 1.0, "threads": 1.0}  # and how far the end of a long run may exceed its middle
TOO_MUCH = 4.1  # of the capacity that those rates show

OFFLINE = """
import json, sys, time
from minfer import LLM, SamplingParams
model, asks, flags, repeats = json.loads(sys.stdin.read())
llm = LLM(model, **flags)
params = [SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True) for _, tokens in asks]
prompts = [prompt for prompt, _ in asks]
llm.generate(prompts[: len(prompts) // 4], params[: len(prompts) // 4], use_tqdm=False)
for _ in range(repeats):
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    print(json.dumps([sum(len(o.outputs[0].token_ids) for o in outputs), time.perf_counter() - started]), flush=True)
"""


def main() -> None:
    own, flags = sys.argv[1:], []
    if "--" in own:
        own, flags = own[: own.index("--")], own[own.index("--") + 1 :]
    options = arguments().parse_args(own)
    values, verdict = {"mixed": mixed, "overload": overload, "offline": offline}[options.experiment](options, flags)
    report = {
        "machine": machine.describe(),
        "versions": {name: version(name) for name in ("minfer", "torch", "uvicorn", "h11", "fastapi")},
        "command": _command(sys.argv[1:]),
        "model": options.model,
        "experiment": options.experiment,
        **values,
        "verdict": verdict or "good",
    }
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    print("; ".join(verdict) or "good", file=sys.stderr)
    raise SystemExit(1 if verdict else 0)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m compare.load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=("mixed", "overload", "offline"))
    parser.add_argument(
        "--model", default="smollm2-135m", help="tiny: random weights in a small shape, to try the server and not the model"
    )
    parser.add_argument("--clients", type=int, default=200, help="at the same time (offline: 64 is usual)")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=0, help="mixed: repeat the requests for so long, and watch the memory")
    parser.add_argument("--every", type=float, default=0, help="mixed: seconds from one round's beginning to the next's (0: at once)")
    parser.add_argument("--repeats", type=int, default=3, help="offline: rounds of each arm, interleaved")
    parser.add_argument("--ttft-limit", type=float, default=5.0, help="overload: seconds in which the first token must be there")
    parser.add_argument("--seconds", type=float, default=30, help="overload: of each rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    return parser


def mixed(options: argparse.Namespace, flags: list[str]) -> tuple[dict[str, Any], list[str]]:
    rounds: list[dict[str, Any]] = []
    broken: list[str] = []
    with served(options.model, flags) as server:
        closed_loop(server.url, Crowd().asks(20, options.seed - 1), 4)
        ends = time.monotonic() + options.minutes * 60
        while not rounds or time.monotonic() < ends:
            next_round = time.monotonic() + options.every
            result = closed_loop(server.url, Crowd().asks(options.requests, options.seed + len(rounds)), options.clients)
            broken += result.broken
            rounds.append({**result.summary(), "gauges_after": server.wait_until_idle(), **server.resources()})
            time.sleep(max(0.0, next_round - time.monotonic()))
        cpu = server.cpu_seconds()
    verdict = [f"{len(broken)} requests without exactly one ending: {broken[:3]}"] if broken else []
    verdict += [f"gauges did not return to 0: {r['gauges_after']}" for r in rounds if any(r["gauges_after"].values())]
    thirds = {name: _thirds([r[name] for r in rounds if r[name]]) for name in rounds[0] if name in RESOURCES}
    verdict += [f"{name} grows: {values}" for name, values in thirds.items() if values and values[2] > RESOURCES[name] * values[1]]
    values = {"clients": options.clients, "every_s": options.every, "server_cpu_s": cpu, "medians_of_thirds": thirds}
    return {**values, "rounds": rounds}, verdict


def _thirds(values: list[float]) -> list[float] | None:
    """The medians of the first, the middle and the last third of a run; None of a short one.

    The first rounds fill caches (grammars, prefixes, malloc's arenas). What grows after them is a leak.
    """
    third = len(values) // 3
    return [statistics.median(part) for part in (values[:third], values[third:-third], values[-third:])] if third >= 2 else None


def overload(options: argparse.Namespace, flags: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Rates are chosen from what `--clients` at a time get; the capacity is the most that was done in time at any of them."""
    levels: list[dict[str, Any]] = []
    with served(options.model, flags) as server:
        first = closed_loop(server.url, STREAMS.asks(options.requests, options.seed), options.clients)
        for times in (*RATES, None):
            server.wait_until_idle()
            done = max((level["good_per_s"] for level in levels), default=0.0)
            rate = done * TOO_MUCH if times is None else len(first.outcomes) / first.seconds * times
            result = open_loop(server.url, STREAMS.asks(int(rate * options.seconds), options.seed + 1), rate)
            levels.append({"offered_per_s": round(rate, 2), **result.summary(options.ttft_limit)})
    capacity = max(level["good_per_s"] for level in levels)
    for level in levels:
        level["times_capacity"] = round(level["offered_per_s"] / capacity, 2)
    kept = levels[-1]["good_events_per_s"] / max(level["good_events_per_s"] for level in levels)
    verdict = [] if kept >= 0.9 else [f"goodput falls to {kept:.0%} of its peak"]
    return {"capacity_per_s": capacity, "closed_loop": first.summary(), "levels": levels, "goodput_kept": round(kept, 4)}, verdict


def offline(options: argparse.Namespace, flags: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Both arms do the same requests, in turns, each in a process of its own that sleeps while the other works."""
    crowd = dataclasses.replace(STREAMS, chats=0.0, prompt_words=(16, 128), output_tokens=(64, 192))
    asks = crowd.asks(options.requests, options.seed)
    bodies = [json.loads(ask.body) for ask in asks]
    task = [options.model, [(b["prompt"], b["max_tokens"]) for b in bodies], {"prefix_caching": False}, 1]
    arms: dict[str, list[float]] = {"offline": [], "served": []}
    with served(options.model, ["--no-prefix-caching", *flags]) as server:
        closed_loop(server.url, asks[: options.clients // 4], options.clients)
        for _ in range(options.repeats):
            done = subprocess.run([sys.executable, "-c", OFFLINE], input=json.dumps(task), capture_output=True, text=True, check=True)
            tokens, seconds = json.loads(done.stdout)
            arms["offline"].append(tokens / seconds)
            result, cpu = _timed(server, lambda: closed_loop(server.url, asks, options.clients))
            arms["served"].append(sum(len(o.arrivals) for o in result.outcomes) / result.seconds)
        before = server.cpu_seconds()
        time.sleep(5)
        idle = None if before is None else ((server.cpu_seconds() or before) - before) / 5
    ratio = statistics.median(arms["served"]) / statistics.median(arms["offline"])
    values = {
        "requests": len(asks),
        "clients": options.clients,
        "tokens_per_s": {arm: [round(v, 1) for v in speeds] for arm, speeds in arms.items()},
        "served_to_offline": round(ratio, 4),
        "last_round": {**result.summary(), "server_cpu_s": cpu},
        "idle_cpu_share": idle,
    }
    verdict = [f"serving reaches {ratio:.1%} of offline speed"] if ratio < 0.95 else []
    return values, verdict + ([f"an idle server uses {idle:.1%} of a core"] if idle is not None and idle >= 0.02 else [])


def _command(arguments: list[str]) -> str:
    """As typed, without where the report goes."""
    if "--out" in arguments:
        at = arguments.index("--out")
        arguments = arguments[:at] + arguments[at + 2 :]
    return "python -m compare.load " + shlex.join(arguments)


def _timed(server: Served, work: Any) -> tuple[Result, float | None]:
    before = server.cpu_seconds()
    result = work()
    return result, None if before is None else round((server.cpu_seconds() or before) - before, 2)


if __name__ == "__main__":
    main()
