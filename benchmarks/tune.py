"""Find the launch settings of the kernels of Liger Attention on this GPU: the table `LAUNCHES` in `liger_fused`.

    python -m benchmarks.tune --out docs/results/launches_h100.json --sizes 128 64 --seconds 400
    python -m benchmarks.tune --out launches.json --gate given-key --kernels read read_gradients write_gradients
    python -m benchmarks.tune --out launches.json --gate deltanet --shape 1 32768 --heads 9 3 --sizes 64 \
        --kernels delta_states delta_carry delta_state_gradients

For every kernel and head size, first where most time goes: each candidate is compiled (side by side, in processes that
share Triton's cache), run within a whole forward and backward pass whose results must be those of the settings in the
table, and timed alone; the median of many runs by device events. bf16, window 64, 4 sinks, random inputs; other shapes
than 4 x 8,192 tokens, and other gates than `gla`, if told so: `output` runs where there is no group of heads to share
keys, with `--heads 32 32`, and `group_output` where there is one; `read` and the two kernels of gradients that belong
to it, of recurrences whose gates are given, with `--gate given-key`, `given-value` or `given-head`. What does not
compile or does not fit is kept with its reason. Prints the table to paste.

Kernels of windows and keys that the fused operator does not take are not tried.
"""

import argparse
import importlib
import itertools
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.results import provenance, write
from linearize.ops import (
    gated_linear,
    gated_linear_triton,
    liger_backward_triton,
    liger_delta_backward_triton,
    liger_delta_forward_triton,
    liger_forward_triton,
    liger_group_triton,
    liger_steep_triton,
    liger_window_triton,
)
from linearize.ops.liger import Settings, fused
from linearize.ops.liger_fused import LAUNCHES, Launch, padded

MODULES = (
    liger_forward_triton,
    liger_group_triton,
    liger_backward_triton,
    liger_delta_forward_triton,
    liger_delta_backward_triton,
    liger_steep_triton,
    liger_window_triton,
    gated_linear_triton,
)
GIVEN = ("given-key", "given-value", "given-head")  # gates of the recurrence alone: a decay for each of these
TOLERANCE = 5e-3  # of results, relative to those of the first candidate: bf16, summed in another order


class Task(NamedTuple):
    """One launch; tensors are told by dtype where nothing is to run."""

    kernel: str  # module:name
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    told: dict[str, Any]


def options(launch: Launch) -> dict[str, int]:
    """As Triton takes them."""
    limit = {"maxnreg": launch.registers} if launch.registers else {}
    return {"num_warps": launch.num_warps, "num_stages": launch.num_stages, **limit}


def candidates(kernel: str, D: int) -> list[Launch]:
    """What is tried, the settings in the table first: few, those that spill least when compiled for an H100.
    `num_stages` matters only to kernels with loops over tiles."""
    current = LAUNCHES[kernel][D]
    if "state" in kernel or kernel == "delta_carry":
        blocks = (16, 32) if kernel == "delta_carry" else (32, 64, 128)
        passes = itertools.product((4, 8), (2, 3, 4), blocks)
        found = [Launch(warps, stages, block) for warps, stages, block in passes if block <= D]
    elif kernel == "output":
        found = [Launch(4, 1), Launch(4, 1, registers=168), Launch(8, 1, registers=128), Launch(8, 1)]
    elif kernel == "group_output":
        found = [Launch(4, 1), Launch(4, 1, registers=168), Launch(8, 1, heads=2), Launch(8, 1, registers=128, heads=2)]
    elif kernel in ("prepare", "gate_gradients"):
        found = [Launch(1, 1, rows) for rows in (2, 4, 8, 16, 32) if rows * D <= 2048]  # more do not fit into registers
    else:
        loops = kernel.endswith("_gradients") and kernel != "add_gradients"
        found = [Launch(4, 1), Launch(4, 1, registers=168), Launch(8, 1), Launch(8, 1, registers=128)]
        found += [Launch(4, 2), Launch(8, 2)] if loops else [Launch(16, 1)]
    return [current, *(launch for launch in found if launch != current)]


# --- launches ---


class Recorder:
    """Stands in for a kernel: notes every launch, and runs it if told so."""

    def __init__(self, kernel: Any, tasks: list[Task], runs: bool) -> None:
        self.kernel, self.tasks, self.runs = kernel, tasks, runs
        self.name = f"{kernel.fn.__module__}:{kernel.fn.__name__}"

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **told: Any) -> None:
            self.tasks.append(Task(self.name, grid, args, told))
            if self.runs:
                self.kernel[grid](*args, **told)

        return launch


@contextmanager
def recording(runs: bool = True) -> Iterator[list[Task]]:
    """The launches of what is called inside."""
    tasks: list[Task] = []
    found = [(module, name) for module in MODULES for name in vars(module) if name.endswith("_kernel")]
    kept = [(module, name, getattr(module, name)) for module, name in found]
    try:
        for module, name, kernel in kept:
            setattr(module, name, Recorder(kernel, tasks, runs))
        yield tasks
    finally:
        for module, name, kernel in kept:
            setattr(module, name, kernel)


def tasks_of(kernel: str, tasks: list[Task]) -> list[Task]:
    """Those of one kernel, and of those without settings of their own that follow it."""
    owner, mine = "", []
    for task in tasks:
        name = task.kernel.split(":")[1].removesuffix("_kernel")
        if name in LAUNCHES:
            owner = name
        if owner == kernel:
            mine.append(task)
    return mine


@contextmanager
def settled(kernel: str, D: int, launch: Launch) -> Iterator[None]:
    """With other settings in the table."""
    kept = LAUNCHES[kernel][D]
    LAUNCHES[kernel][D] = launch
    try:
        yield
    finally:
        LAUNCHES[kernel][D] = kept


# --- compiling ---


class Target:
    """As much of Triton's driver as compiling takes, so that no process but the first one needs the device."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        """What to compile for."""
        return self.target

    def get_current_device(self) -> int:
        """Any number."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Any number."""
        return 0


def start_compiler(target: Any) -> None:
    """Once in each process."""
    from triton.runtime import driver

    driver.set_active(Target(target))


def with_settings(task: Task, launch: Launch) -> Task:
    """The task by other settings."""
    settings = {
        "BV": launch.block,
        "STAGES": launch.num_stages,
        "ROWS": launch.block,
        "HEADS": math.gcd(launch.heads, task.told.get("GROUPS", 1)),
    }
    told = task.told | {name: value for name, value in settings.items() if name in task.told}
    told.pop("maxnreg", None)
    return task._replace(told=told | options(launch))


def compiled(task: Task) -> dict[str, Any]:
    """Put one program into Triton's cache: its seconds and shared memory, or why not."""
    module, name = task.kernel.split(":")
    start = time.perf_counter()
    try:
        program = getattr(importlib.import_module(module), name).warmup(*task.args, grid=task.grid, **task.told)
    except Exception as error:  # whatever the compiler has against it is a result
        return {"error": f"{type(error).__name__}: {str(error)[:200]}"}
    return {"compile_seconds": time.perf_counter() - start, "shared": program.metadata.shared}


def by_dtype(task: Task) -> Task:
    """For another process."""
    return task._replace(args=tuple(x.dtype if isinstance(x, Tensor) else x for x in task.args))


Jobs = dict[tuple, Future]  # by program, the kernel first


def program_key(task: Task) -> tuple:
    """What it takes to compile it; numbers that a kernel is given at run time are left out."""
    args = (x if isinstance(x, torch.dtype) else type(x) for x in by_dtype(task).args)
    return (task.kernel, *args, *sorted(task.told.items()))


@contextmanager
def compilers(processes: int) -> Iterator[Callable[[Callable[[], Any]], Jobs]]:
    """A function that has every program of a call compiled into Triton's cache, each once, side by side and in the
    order asked for, while its caller goes on; what is not ready at the end is dropped."""
    from triton.runtime import driver

    context, target = multiprocessing.get_context("spawn"), driver.active.get_current_target()
    jobs: Jobs = {}
    with ProcessPoolExecutor(processes, context, start_compiler, (target,)) as pool:

        def begin(call: Callable[[], Any]) -> Jobs:
            with recording(runs=False) as tasks:
                call()
            for task in tasks:
                if program_key(task) not in jobs:
                    jobs[program_key(task)] = pool.submit(compiled, by_dtype(task))
            return {key: jobs[key] for key in map(program_key, tasks)}

        try:
            yield begin
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():  # some have half a minute to go
                process.terminate()


def failures(jobs: Jobs, stop: float) -> list[str]:
    """Waits for programs, until `stop` by `time.perf_counter`: which do not compile, and why."""
    done, _ = wait(jobs.values(), timeout=max(0.0, stop - time.perf_counter()))
    found = {(key[0], job.exception() or job.result().get("error")) for key, job in jobs.items() if job in done}
    return sorted(f"{kernel}: {error}" for kernel, error in found if error)


def compile_all(calls: Iterable[Callable[[], Any]], processes: int) -> dict[str, Any]:
    """Every program of the given calls, side by side, into Triton's cache: the seconds of each by kernel, and what did
    not compile."""
    with compilers(processes) as begin:
        jobs = {key: job for call in calls for key, job in begin(call).items()}
        rows = [(key[0].split(":")[1], job.result()) for key, job in jobs.items()]
    seconds: dict[str, list[float]] = {}
    for kernel, row in rows:
        seconds.setdefault(kernel, []).append(row.get("compile_seconds", float("inf")))
    errors = sorted({f"{kernel}: {row['error']}" for kernel, row in rows if "error" in row})
    slowest = max((max(times), kernel) for kernel, times in seconds.items())
    print(
        f"{len(rows)} programs; the slowest to compile: {slowest[1]}, {slowest[0]:.1f} s", *errors, sep="\n", flush=True
    )
    return {"seconds": seconds, "errors": errors}


# --- one head size ---


class Problem:
    """One layer's attention, forward and backward."""

    def __init__(
        self, shape: tuple[int, ...], gate: str, device: str = "cuda", dtype: torch.dtype = torch.bfloat16
    ) -> None:
        B, T, H, KV, D = shape
        torch.manual_seed(0)
        q, k, v = (torch.randn(B, T, n, D, device=device, dtype=dtype) for n in (H, KV, KV))
        self.leaves = [x.requires_grad_() for x in (q, k, v, torch.full((H,), 0.3, device=device))]
        self.doutput = torch.randn_like(q)
        angles = torch.arange(T, device=device)[:, None] * 10000 ** (-torch.arange(0, D, 2, device=device) / D)
        self.rope = angles.cos().repeat(1, 2).to(dtype), angles.sin().repeat(1, 2).to(dtype)
        self.settings = Settings(gate, D**-0.5)
        self.decay = -torch.rand(KV, device=device)

    def run(self) -> list[Tensor]:
        """Output, final state and gradients."""
        q, k, v, mixing = self.leaves
        given = q, k, v, mixing, self.settings, self.rope, None, None, self.decay
        output, state = fused(*given)
        return [output.detach(), state.detach(), *torch.autograd.grad(output, self.leaves, self.doutput)]


class GivenProblem:
    """One layer's recurrence with given gates, forward and backward."""

    def __init__(
        self, shape: tuple[int, ...], gate: str, device: str = "cuda", dtype: torch.dtype = torch.bfloat16
    ) -> None:
        B, T, H, KV, D = shape
        torch.manual_seed(0)
        q, k = (torch.randn(B, T, n, D, device=device) for n in (H, KV))
        v = torch.randn(B, T, KV, D, device=device, dtype=dtype)
        log_g = -torch.rand(B, T, KV, 1 if gate == "given-head" else D, device=device) / 16
        self.leaves = [x.requires_grad_() for x in (q, k, v, log_g, torch.randn(B, KV, D, D, device=device))]
        self.doutput, self.by_value = torch.randn_like(q), gate == "given-value"

    def run(self) -> list[Tensor]:
        """Output, final state and gradients."""
        q, k, v, log_g, initial = self.leaves
        output, state = gated_linear.fused(q, k, v, log_g, initial, None, self.by_value)
        return [output.detach(), state.detach(), *torch.autograd.grad(output, self.leaves, self.doutput)]


def problem_of(
    shape: tuple[int, ...], gate: str, device: str = "cuda", dtype: torch.dtype = torch.bfloat16
) -> Problem | GivenProblem:
    """Of any gate."""
    return (GivenProblem if gate in GIVEN else Problem)(shape, gate, device, dtype)


def difference(results: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error among the results."""
    pairs = [(x.float(), y.float()) for x, y in zip(results, expected, strict=True)]
    return max(((x - y).norm() / y.norm()).item() for x, y in pairs)


def replay(tasks: list[Task]) -> None:
    """Launch all of them again, onto the same tensors."""
    for task in tasks:
        module, name = task.kernel.split(":")
        getattr(importlib.import_module(module), name)[task.grid](*task.args, **task.told)


def seconds_of(tasks: list[Task], runs: int = 25) -> list[float]:
    """Of all launches together, by device events; they queue behind a pause, so that no launch is waited for."""
    replay(tasks)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    torch.cuda.synchronize()
    torch.cuda._sleep(10_000_000)  # cycles, some 6 ms
    for begin, end in events:
        begin.record()
        replay(tasks)
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1000 for begin, end in events]


def tried(problem: Problem | GivenProblem, kernel: str, D: int, launch: Launch, expected: list[Tensor] | None) -> tuple:
    """A row of results, and what the first candidate computes."""
    row: dict[str, Any] = {}
    try:
        with settled(kernel, D, launch), recording() as tasks:
            results = problem.run()
            mine = tasks_of(kernel, tasks)
        if expected is None:  # copies: what is timed writes into these very results, or adds to them, again and again
            expected = [x.clone() for x in results]
        row["difference"] = difference(results, expected)
        if row["difference"] <= TOLERANCE:
            row["seconds"] = statistics.median(seconds_of(mine))
        else:
            row["error"] = "other results"
    except Exception as error:  # out of shared memory, registers, ...: a result too
        row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
    return row, expected


def seconds_in_table(problem: Problem | GivenProblem, kernel: str) -> float:
    """Of a kernel by the settings in the table."""
    with recording() as tasks:
        problem.run()
    return statistics.median(seconds_of(tasks_of(kernel, tasks), runs=5))


def main() -> None:
    """Sweep kernel after kernel until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 64], help="head sizes")
    parser.add_argument("--kernels", nargs="+", default=list(LAUNCHES), choices=list(LAUNCHES))
    parser.add_argument("--shape", type=int, nargs=2, default=(4, 8192), help="sequences, tokens of each")
    parser.add_argument("--heads", type=int, nargs=2, default=(32, 8), help="query heads, key/value heads")
    parser.add_argument("--gate", default="gla")
    parser.add_argument("--processes", type=int, default=28, help="that compile")
    parser.add_argument("--seconds", type=float, default=400, help="begin nothing after this long")
    given = parser.parse_args()
    start = time.perf_counter()
    from triton.runtime import driver

    context, target = multiprocessing.get_context("spawn"), driver.active.get_current_target()
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(given.processes, context, start_compiler, (target,)) as pool:
        problems = {D: problem_of((*given.shape, *given.heads, D), given.gate) for D in given.sizes}
        wanted: list[tuple[int, str, Launch, list[Task]]] = []
        for D, problem in problems.items():
            with recording(runs=False) as tasks:
                problem.run()
            for kernel in given.kernels:
                named = [by_dtype(task) for task in tasks if task.kernel.endswith(f":{kernel}_kernel")]
                for launch in candidates(kernel, padded(D)) if named else ():
                    wanted.append((D, kernel, launch, named))
        # those in the table first: every pass runs them
        wanted.sort(key=lambda one: one[2] != LAUNCHES[one[1]][padded(one[0])])
        jobs: dict[tuple[int, str, Launch], list[Future]] = {}
        for D, kernel, launch, named in wanted:
            again = [with_settings(task, launch) for task in named]
            jobs[D, kernel, launch] = [pool.submit(compiled, task) for task in again]
        swept = dict.fromkeys((D, kernel) for D, kernel, _ in jobs)
        for D, kernel in swept:
            for job in jobs[D, kernel, LAUNCHES[kernel][padded(D)]]:
                job.result()
        print(f"{time.perf_counter() - start:.0f} s: {len(jobs)} programs to compile", flush=True)
        takes = {(D, kernel): seconds_in_table(problems[D], kernel) for D, kernel in swept}
        for D, kernel in sorted(swept, key=lambda one: -takes[one]):  # first where most can be gained
            expected = None
            for launch in candidates(kernel, padded(D)):
                if time.perf_counter() - start > given.seconds:
                    continue
                row = {"D": D, "shape": given.shape, "heads": given.heads, "kernel": kernel, **launch._asdict()}
                for job in jobs[D, kernel, launch]:
                    row |= job.result()
                if "error" not in row:
                    more, expected = tried(problems[D], kernel, padded(D), launch, expected)
                    row |= more
                rows.append(row)
                print(described(row), flush=True)
            finish(rows, D, kernel)
            write(given.out, {**provenance(), "gate": given.gate, "rows": rows, "launches": table()})
            print(f"{time.perf_counter() - start:.0f} s", flush=True)
        pool.shutdown(cancel_futures=True)
    print("LAUNCHES: dict[str, dict[int, Launch]] = {")
    for kernel, sizes in LAUNCHES.items():
        print(f'    "{kernel}": {{{", ".join(f"{size}: {shown(launch)}" for size, launch in sizes.items())}}},')
    print("}")


def finish(rows: list[dict[str, Any]], D: int, kernel: str) -> None:
    """Put the fastest settings of one kernel into the table, for those that follow to run with, and tell."""
    timed = [row for row in rows if row["D"] == D and row["kernel"] == kernel and "seconds" in row]
    if timed:
        best = min(timed, key=lambda row: row["seconds"])
        LAUNCHES[kernel][padded(D)] = Launch(*(best[field] for field in Launch._fields))
        print(f"best of D={D} {kernel}: {described(best)}; the table's {1000 * timed[0]['seconds']:.3f} ms")


def table() -> dict[str, dict[int, list[int]]]:
    """The table as it stands, for JSON."""
    return {kernel: {size: list(launch) for size, launch in sizes.items()} for kernel, sizes in LAUNCHES.items()}


def shown(launch: Launch) -> str:
    """As in the source, without defaults."""
    values = list(launch)
    while values and values[-1] == Launch._field_defaults.get(Launch._fields[len(values) - 1]):
        values.pop()
    return f"Launch({', '.join(map(str, values))})"


def described(row: dict[str, Any]) -> str:
    """A line for the terminal."""
    what = f"D={row['D']} {row['kernel']:16} warps {row['num_warps']:2} stages {row['num_stages']} "
    what += f"block {row['block']:3} registers {row['registers']:3}"
    if "seconds" not in row:
        return f"{what} {row.get('error')}"
    return f"{what} {1000 * row['seconds']:7.3f} ms, compiled in {row.get('compile_seconds', 0.0):4.1f} s"


if __name__ == "__main__":
    main()
