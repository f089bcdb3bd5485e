"""The delta rule with given gates on a GPU: errors of its kernels in bf16, and times against PyTorch's chunks.

    python -m benchmarks.delta --out docs/results/delta_h100.json --seconds 60

Errors are relative to the equation in float64, in the norm: of output and final state, without and with a backward
pass, and of every gradient; 9 query and 3 key/value heads. Times are of one layer of SmolLM2-135M in training, forward
and backward, replayed as a CUDA graph, as training does, also of one long sequence, which is cut into segments.
Programs are compiled side by side, and every case runs as soon as its own are: first without a backward pass.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.results import provenance, write
from benchmarks.timing import graphed, times
from benchmarks.tune import compilers, failures
from linearize.ops.gated_delta import chunked, gated_delta, reference

NAMES = ("output", "state", "dq", "dk", "dv", "dlog_g", "dbeta", "dstate")  # the first two without a backward pass
HEADS, KV_HEADS = 9, 3


class Case(NamedTuple):
    """Inputs: their shape, and what is special about them."""

    D: int
    kind: str = "plain"
    B: int = 2
    T: int = 256


class Given(NamedTuple):
    """One case's inputs."""

    leaves: list[Tensor]
    document: Tensor | None

    def to(self, device: str, dtype: torch.dtype | None = None) -> "Given":
        """As leaves of their own, elsewhere or in another dtype."""
        leaves = [x.detach().to(device, dtype, copy=True).requires_grad_() for x in self.leaves]
        return Given(leaves, None if self.document is None else self.document.to(device))


def cases(sizes: list[int]) -> Iterator[Case]:
    """Those without anything special first."""
    yield from (Case(D) for D in sizes)
    yield from (Case(D, kind) for D in sizes for kind in ("packed", "steep", "correlated"))
    yield from (Case(D, T=T) for D in sizes for T in (2, 65))
    yield from (Case(D, B=1, T=4200) for D in sizes)  # cut into segments


def inputs(case: Case) -> Given:
    """q, k, v, log_g, beta and a state on the CPU: queries and keys of length 1 in fp32, values in bf16."""
    torch.manual_seed(0)
    D, kind, B, T = case
    q, k, v = (torch.randn(B, T, heads, D) for heads in (HEADS, KV_HEADS, KV_HEADS))
    log_g, beta = (F.logsigmoid(torch.randn(B, T, KV_HEADS, 1)) / 16, torch.rand(B, T, KV_HEADS, 1))
    if kind == "steep":
        log_g[:, ::3], log_g[:, 1::3] = -20.0, -1e4
    if kind == "correlated":
        k, beta = k[:, :1] + 0.3 * k, 2 * beta
    document = None
    if kind == "packed":
        document = (torch.arange(T) >= torch.tensor([20, 23, 100])[:, None]).sum(0).expand(B, T)
    leaves = [F.normalize(q, dim=-1), F.normalize(k, dim=-1), v.bfloat16(), log_g, beta]
    return Given([*leaves, torch.randn(B, KV_HEADS, D, D)], document)


def run(given: Given, operator: Any, backward: bool, weights: list[Tensor] | None = None) -> tuple[list[Tensor], ...]:
    """What `NAMES` says, and the weights of the sum that is differentiated."""
    with torch.set_grad_enabled(backward):
        results = operator(*given.leaves, given.document)
    weights = [torch.randn(x.shape) for x in results] if weights is None else weights
    gradients: tuple[Tensor, ...] = ()
    if backward:
        gradients = torch.autograd.grad(results, given.leaves, [w.to(x) for w, x in zip(weights, results, strict=True)])
    return [x.detach().cpu().double() for x in (*results, *gradients)], weights


def errors(case: Case, backward: bool, device: str) -> dict[str, Any]:
    """A row of results."""
    given = inputs(case)
    row: dict[str, Any] = {**case._asdict(), "backward": backward}
    try:
        results, weights = run(given.to(device), gated_delta, backward)
        expected, _ = run(given.to(device, torch.float64), reference, backward, weights)
        norms = [((x - y).norm() / y.norm()).item() for x, y in zip(results, expected, strict=True)]
        return row | dict(zip(NAMES, norms, strict=False))
    except Exception as error:  # the other cases are worth knowing
        return row | {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def graph_of(case: Case, operator: Any, backward: bool) -> Callable[[], None]:
    """The replay of one call, with the gradients of all but the state, or without any."""
    *leaves, _ = inputs(case).to("cuda").leaves
    doutput = torch.randn_like(leaves[0])

    def call() -> None:
        with torch.set_grad_enabled(backward):
            output = operator(*leaves)[0]
        if backward:
            torch.autograd.grad(output, leaves, doutput)

    return graphed(call)


def pytorch(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """The chunks, from no state."""
    state = q.new_zeros(q.shape[0], k.shape[2], k.shape[3], v.shape[3])
    return chunked(q, k, v, log_g, beta, state)


def timed(case: Case, backward: bool, name: str) -> dict[str, Any]:
    """A row of results."""
    row: dict[str, Any] = {**case._asdict(), "backward": backward, "operator": name}
    try:
        return row | {"seconds": times(graph_of(case, {"kernels": gated_delta, "chunked": pytorch}[name], backward))}
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def main() -> None:
    """Case after case until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128], help="head sizes")
    parser.add_argument("--processes", type=int, default=16, help="that compile")
    parser.add_argument("--seconds", type=float, default=60, help="begin nothing after this long")
    given = parser.parse_args()
    stop = time.perf_counter() + given.seconds
    sizes, passes = given.sizes, [False, True]
    layers = [Case(D, B=8, T=1024) for D in sizes] + [Case(64, B=1, T=32768)]
    sides = [(layer, back, name) for layer in layers for name in ("kernels", "chunked") for back in passes]
    timings = [("times", *side[:2], partial(timed, *side)) for side in sides]
    plain, special = (
        [("errors", case, back, partial(errors, case, back, "cuda")) for back in passes for case in some]
        for some in (list(cases(sizes))[: len(sizes)], list(cases(sizes))[len(sizes) :])
    )
    jobs = plain + timings + special
    results: dict[str, Any] = {"errors": [], "times": []}
    with compilers(given.processes) as begin:
        programs = [begin(partial(run, inputs(case).to("cuda"), gated_delta, back)) for _, case, back, _ in jobs]
        for (kind, case, back, job), needed in zip(jobs, programs, strict=True):
            failed = failures(needed, stop)
            if time.perf_counter() > stop:
                print(f"no time for the {kind} of {tuple(case)} {'forward + backward' if back else 'forward'}")
                continue
            not_compiled = {**case._asdict(), "backward": back, "error": "; ".join(failed)}
            results[kind].append(not_compiled if failed else job())
            print(described(results[kind][-1]), flush=True)
            write(given.out, {**provenance(), **results})


def described(row: dict[str, Any]) -> str:
    """A line for the terminal."""
    what = f"D={row['D']:3} B={row['B']} T={row['T']:5} {row['kind']:10} {row.get('operator', ''):7} "
    what += "forward + backward" if row["backward"] else "forward           "
    if "seconds" in row:
        return f"{what} {1000 * statistics.median(row['seconds']):.3f} ms"
    errors = " ".join(f"{name} {row[name]:.1e}" for name in NAMES if name in row)
    return f"{what} {row.get('error', errors)}"


if __name__ == "__main__":
    main()
