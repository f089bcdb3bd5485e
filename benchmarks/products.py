"""The products of a decoding step on a GPU: find their launch settings, the table `LAUNCHES` of `products_triton`, and
compare them with cuBLAS.

    python -m benchmarks.products --out docs/results/products_h100.json --seconds 230

Each product of a layer, with the norm, SwiGLU or residual that goes with it, in the shapes of real models, bf16. What
is timed is a CUDA graph of as many of them one after the other, each with a weight of its own, as do not fit into the
L2 cache together; the median of its replays by device events. "cuBLAS" is the same by PyTorch's operations. Every
candidate is timed with 16 rows; the best of each product also with 1 and 4, and once more such that each begins before
the one ahead of it has ended (`Launch.ahead`). Results are compared with float64. What fails is kept with its reason;
what does not fit into the device's shared memory is timed with the stages that do. Prints the tables to paste, of
kernels one after the other and beginning early. A result file that is there already is gone on from.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.decode import DEVICE, GPU, SHAPES, said, timed
from benchmarks.results import provenance, write
from benchmarks.timing import copy_speed, graphed, times
from benchmarks.tune import Recorder, Task, by_dtype, compiled, start_compiler
from linearize.ops import products, products_triton
from linearize.ops.products import Norm
from linearize.ops.products_triton import LAUNCHES, Launch, launch_of

MODELS = ("SmolLM2-135M", "Llama-3.2-1B", "Llama-3-8B")
BATCHES = (16, 1, 4)  # the first for every candidate, the others for the best
BEST = 4  # of a product
AHEAD = 32768  # bytes of a program's weights that are fetched ahead
DISTINCT = 120e6 if GPU else 0  # bytes of weights; an H100's L2 cache has 50 MB
DTYPE = torch.bfloat16 if GPU else torch.float32
TOLERANCE = 6e-3  # of results, relative to float64
CUBLAS = "cuBLAS"


class Product(NamedTuple):
    """One product of a layer."""

    kernel: str  # in `LAUNCHES`
    rows: int
    columns: int


def products_of(model: str) -> list[Product]:
    """A layer's, in their order."""
    shape = SHAPES[model]
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    H, KV = shape["num_attention_heads"], shape["num_key_value_heads"]
    D = shape.get("head_dim", hidden // H)
    return [
        Product("product", (H + 2 * KV) * D, hidden),
        Product("add", hidden, H * D),
        Product("swiglu", inner, hidden),
        Product("add", hidden, inner),
    ]


def candidates(product: Product) -> list[Launch]:
    """What is tried, the settings in the table first."""
    found = [launch_of(product.kernel, product.rows, product.columns)._replace(ahead=0)]
    for rows, columns, (slices, warps), stages in itertools.product(
        (8, 16, 24, 32, 48, 64), (64, 128), ((1, 4), (2, 2), (4, 4), (8, 8)), (3, 4, 6)
    ):
        tiles = 16 + 2 ** (rows - 1).bit_length() * (1 + (product.kernel == "swiglu"))
        fits = 2 * columns * slices * tiles * (stages - 1) <= 160_000 and columns * slices <= product.columns
        if fits and 32 <= product.rows / rows <= 1024:  # shared memory; programs
            found.append(Launch(rows, columns, slices, warps, stages))
    return list(dict.fromkeys(found))


def beginning_early(product: Product, launch: Launch) -> Launch:
    """The same, which fetches some of its weights while the kernel ahead of it works."""
    tile = launch.rows * (1 + (product.kernel == "swiglu"))
    lines = min(AHEAD // (128 * tile), math.ceil(product.columns / products_triton.LINE.value))
    return launch._replace(ahead=2 ** (max(lines, 1).bit_length() - 1))


@contextmanager
def settled(product: Product, launch: Launch) -> Iterator[None]:
    """With these settings in the table."""
    with patch.dict(LAUNCHES[product.kernel], {(product.rows, product.columns): launch}):
        yield


# --- one product ---


class Problem:
    """Inputs of one product, with many weights."""

    def __init__(self, product: Product) -> None:
        kernel, N, K = self.product = product
        rows = N * (1 + (kernel == "swiglu"))
        copies = max(2, math.ceil(DISTINCT / (2 * rows * K)))
        torch.manual_seed(0)
        like: dict[str, Any] = {"device": DEVICE, "dtype": DTYPE}
        self.weights = (torch.randn(copies * rows, K, **like) / K**0.5).chunk(copies)
        self.x, self.hidden = torch.randn(max(BATCHES), K, **like), torch.zeros(max(BATCHES), N, **like)
        self.norm = Norm(torch.rand(K, **like) + 0.5, 1e-5)

    def run(self, by: Any, batch: int, weights: Iterable[Tensor]) -> list[Tensor]:
        """Each weight's product, by `products` or `products_triton`."""
        x, hidden, size = self.x[:batch], self.hidden[:batch], self.product.rows
        if self.product.kernel == "product":
            return [by.normed_product(x, self.norm, (weight, None)) for weight in weights]
        if self.product.kernel == "swiglu":
            return [by.normed_swiglu(x, self.norm, (weight, None), size) for weight in weights]
        for weight in weights:
            by.add_product(hidden, x, (weight, None))
        return [hidden]

    def error(self, by: Any, batch: int) -> float:
        """Of the first product, relative to float64."""
        self.hidden.normal_()
        x, hidden, weight = self.x[:batch].double(), self.hidden[:batch].double(), self.weights[0].double()
        (result,) = self.run(by, batch, self.weights[:1])
        if self.product.kernel == "add":
            expected = hidden + x @ weight.t()
        else:
            root = (x.square().mean(1, keepdim=True) + self.norm.epsilon).sqrt()
            expected = x / root * self.norm.weight.double() @ weight.t()
        if self.product.kernel == "swiglu":
            gate, up = expected.chunk(2, dim=1)
            expected = torch.nn.functional.silu(gate) * up
        return ((result.double() - expected).norm() / expected.norm()).item()

    def seconds(self, by: Any, batch: int) -> float:
        """Of one product."""

        def call() -> None:
            self.run(by, batch, self.weights)

        return statistics.median(times(graphed(call), 0.03) if GPU else timed(call)) / len(self.weights)

    def measured(self, by: Any, batch: int) -> dict[str, Any]:
        """Error and seconds, or what went wrong."""
        try:
            found: dict[str, Any] = {"difference": self.error(by, batch)}
            if not found["difference"] <= TOLERANCE:
                return found | {"error": "other results"}
            return found | {"seconds": self.seconds(by, batch)}
        except Exception as error:  # out of shared memory, registers, ...: a result too
            return {"error": said(error)}


# --- compiling: each program in a process of its own, which may die ---


def compile_into_cache(answer: Any, target: Any, task: Task) -> None:
    """In that process."""
    start_compiler(target)
    answer.send(compiled(task))


def compiled_apart(context: Any, target: Any, task: Task, seconds: float = 60) -> dict[str, Any]:
    """As `tune.compiled`."""
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=compile_into_cache, args=(send, target, task))
    process.start()
    send.close()
    try:
        return receive.recv() if receive.poll(seconds) else {"error": f"does not compile in {seconds} s"}
    except (EOFError, OSError):
        process.join()
        return {"error": f"the compiler ended with code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def task_of(problem: Problem, launch: Launch) -> Task:
    """The launch of a candidate."""
    tasks: list[Task] = []
    recorder = Recorder(products_triton.product_kernel, tasks, runs=False)
    with settled(problem.product, launch), patch.object(products_triton, "product_kernel", recorder):
        problem.run(products_triton, max(BATCHES), problem.weights[:1])
    return by_dtype(tasks[0])


# --- the sweep ---


class Sweep:
    """All that is measured, and written as it comes."""

    def __init__(self, out: Path, stop: float, compile_one: Callable[[Task], Future]) -> None:
        self.out, self.stop, self.compile_one = out, stop, compile_one
        self.rows: list[dict[str, Any]] = []
        if out.exists():
            self.rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
        self.copy, self.made_on = copy_speed() if GPU else 1e10, provenance()

    def row(self, problem: Problem, launch: Launch | str, batch: int, job: Future | None) -> dict:
        """Of one candidate; measured if it is not there yet."""
        name, overlap = (launch, False) if isinstance(launch, str) else (list(launch), launch.ahead > 0)
        key = {**problem.product._asdict(), "launch": name, "overlap": overlap, "batch": batch}
        known = [row for row in self.rows if key.items() <= row.items()]
        if known:
            return known[0]
        if time.perf_counter() > self.stop:
            return key | {"error": "no time"}
        found = {} if job is None else dict(job.result())
        if "error" not in found and isinstance(launch, str):
            with patch.object(products, "why_not_fused", lambda *_, **__: launch):
                found |= problem.measured(products, batch)
        elif "error" not in found:
            with settled(problem.product, launch):  # type: ignore[arg-type]
                found |= problem.measured(products_triton, batch)
        size = 2 * problem.weights[0].numel()
        self.rows.append(key | {"floor": size / self.copy} | found)
        write(self.out, {**self.made_on, "copy_bytes_per_second": self.copy, "rows": self.rows})
        print(self.described(self.rows[-1]), flush=True)
        if GPU:
            torch.cuda.synchronize()  # ends the sweep if the device is lost; the same command goes on from here
        return self.rows[-1]

    @staticmethod
    def described(row: dict[str, Any]) -> str:
        """A line for the terminal."""
        what = f"{row['kernel']:7} {row['rows']:5} x {row['columns']:5} batch {row['batch']:2} "
        what += f"{'overlap ' if row['overlap'] else ''}{row['launch']}"
        if "seconds" not in row:
            return f"{what} {row['error']}"
        return f"{what} {1e6 * row['seconds']:7.2f} us (floor {1e6 * row['floor']:6.2f})"

    def best(self, product: Product, overlap: bool, count: int, batches: tuple[int, ...]) -> list[dict[str, Any]]:
        """The fastest candidates over these batches, the fastest first: launch, and seconds by batch."""
        found: dict[tuple, dict[int, float]] = {}
        for row in self.rows:
            same = (row["kernel"], row["rows"], row["columns"], row["overlap"]) == (*product, overlap)
            if same and row["launch"] != CUBLAS and row["batch"] in batches and "seconds" in row:
                found.setdefault(tuple(row["launch"]), {})[row["batch"]] = row["seconds"]
        whole = [(launch, seconds) for launch, seconds in found.items() if len(seconds) == len(batches)]
        whole.sort(key=lambda item: sum(math.log(x) for x in item[1].values()))
        return [{"launch": Launch(*launch), "seconds": seconds} for launch, seconds in whole[:count]]

    def cublas(self, product: Product) -> dict[int, float]:
        """Its seconds by batch."""
        rows = [row for row in self.rows if row["launch"] == CUBLAS and "seconds" in row]
        return {row["batch"]: row["seconds"] for row in rows if product._asdict().items() <= row.items()}

    def table(self, wanted: list[Product], overlap: bool) -> None:
        """Print the module's table."""
        print("\n#", "beginning early" if overlap else "one after the other")
        print("LAUNCHES: dict[str, dict[tuple[int, int], Launch]] = {")
        for kernel in LAUNCHES:
            print(f'    "{kernel}": {{')
            for product in wanted:
                found = self.best(product, overlap, 1, BATCHES) or self.best(product, overlap, 1, BATCHES[:1])
                if product.kernel == kernel and found:
                    ours, others = micro(found[0]["seconds"]), micro(self.cublas(product))
                    print(f"        {product[1:]}: Launch{tuple(found[0]['launch'])},  # {ours} us, cuBLAS {others}")
            print("    },")
        print("}", flush=True)


def micro(seconds: dict[int, float]) -> str:
    """Microseconds in the order of `BATCHES`."""
    return " ".join(f"{1e6 * seconds[batch]:.2f}" for batch in BATCHES if batch in seconds)


def main() -> None:
    """Sweep product after product until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", choices=SHAPES, action="append", help="only this one")
    parser.add_argument("--processes", type=int, default=16, help="that compile")
    parser.add_argument("--seconds", type=float, default=230, help="begin nothing after this long")
    given = parser.parse_args()
    stop = time.perf_counter() + given.seconds
    context, target = multiprocessing.get_context("forkserver"), None
    context.set_forkserver_preload(["benchmarks.products"])
    if GPU:
        from triton.runtime import driver

        target = driver.active.get_current_target()
    with ThreadPoolExecutor(given.processes) as pool:

        def compile_one(task: Task) -> Future:
            return pool.submit(compiled_apart, context, target, task) if GPU else pool.submit(dict)

        try:
            sweep(Sweep(given.out, stop, compile_one), given.model or list(MODELS))
        finally:
            pool.shutdown(cancel_futures=True)


@torch.no_grad()
def sweep(made: Sweep, models: list[str]) -> None:
    """All candidates of each product, then the best of each, and these with overlap."""
    wanted = list(dict.fromkeys(product for model in models for product in products_of(model)))
    jobs = {}
    for product in wanted:
        problem = Problem(product)
        jobs[product] = {launch: made.compile_one(task_of(problem, launch)) for launch in candidates(product)}
    later: dict[Product, dict[Launch, Future]] = {}
    for product in wanted:
        problem = Problem(product)
        for batch in BATCHES:
            made.row(problem, CUBLAS, batch, None)
        for launch, job in jobs[product].items():
            made.row(problem, launch, BATCHES[0], job)
        finalists = [row["launch"] for row in made.best(product, False, BEST, BATCHES[:1])]
        early = [beginning_early(product, launch) for launch in finalists]
        later[product] = {launch: made.compile_one(task_of(problem, launch)) for launch in early}
        for launch, batch in itertools.product(finalists, BATCHES[1:]):
            made.row(problem, launch, batch, None)
        for found in made.best(product, False, 1, BATCHES):
            others = micro(made.cublas(product))
            print(
                f"best of {tuple(product)}: {found['launch']}, {micro(found['seconds'])} us, cuBLAS {others}",
                flush=True,
            )
    for product in wanted:
        problem = Problem(product)
        for (launch, job), batch in itertools.product(later[product].items(), BATCHES):
            made.row(problem, launch, batch, job)
    for overlap in (False, True):
        made.table(wanted, overlap)


if __name__ == "__main__":
    main()
