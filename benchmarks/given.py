"""Recurrences with given gates on a GPU: errors of their kernels in bf16, and times against PyTorch's chunks.

    python -m benchmarks.given --out docs/results/given_h200.json --rules key value head --seconds 120

Rules: `delta`, and decays by `key` channel, `value` channel or `head`. Errors are relative to the equation in float64,
in the norm: of output and final state, without and with a backward pass, and of every gradient; 9 query and 3 key/value
heads. Times are of one layer of SmolLM2-135M in training, forward and backward, replayed as a CUDA graph, as training
does, also of one long sequence, which is cut into segments, and but for `delta` of 32 query and 8 key/value heads.
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
from linearize.ops import gated_delta, gated_linear

Results = tuple[Tensor, Tensor]


class Rule(NamedTuple):
    """How a state changes, by kernels, by PyTorch's chunks and token by token: of q, k, v, log_g, more gates, state and
    document."""

    kernels: Callable[..., Results]
    chunked: Callable[..., Results]
    reference: Callable[..., Results]
    gates: tuple[str, ...] = ()  # beside log_g


LINEAR = Rule(gated_linear.fused, gated_linear.chunked, gated_linear.reference)
RULES = {
    "delta": Rule(gated_delta.gated_delta, gated_delta.chunked, gated_delta.reference, ("beta",)),
    "key": LINEAR,
    "value": Rule(
        partial(gated_linear.fused, by_value=True),
        gated_linear.chunked_by_value,
        partial(gated_linear.reference, by_value=True),
    ),
    "head": LINEAR,
}


class Case(NamedTuple):
    """Inputs: their shape, and what is special about them."""

    rule: str
    D: int
    kind: str = "plain"
    B: int = 2
    T: int = 256
    H: int = 9
    KV: int = 3

    @property
    def names(self) -> tuple[str, ...]:
        """Of what is compared; the first two without a backward pass."""
        gates = ("log_g", *RULES[self.rule].gates)
        return "output", "state", *(f"d{name}" for name in ("q", "k", "v", *gates, "state"))


class Given(NamedTuple):
    """One case's inputs."""

    leaves: list[Tensor]
    document: Tensor | None

    def as_leaves(self, dtype: torch.dtype | None = None) -> "Given":
        """Copies that have gradients, in another dtype if told so."""
        return Given([x.detach().to(dtype=dtype, copy=True).requires_grad_() for x in self.leaves], self.document)


def plain(rules: list[str], sizes: list[int]) -> Iterator[Case]:
    """Those without anything special."""
    yield from (Case(rule, D) for rule in rules for D in sizes)


def special(rules: list[str], sizes: list[int]) -> Iterator[Case]:
    """The others."""
    for rule in rules:
        yield from (Case(rule, D, kind) for D in sizes for kind in ("packed", "steep", "correlated"))
        yield from (Case(rule, D, T=T) for D in sizes for T in (2, 65))
        yield from (Case(rule, D, B=1, T=4200) for D in sizes)  # cut into segments


def layers(rules: list[str], sizes: list[int]) -> Iterator[Case]:
    """What is timed."""
    for rule in rules:
        yield from (Case(rule, D, B=8, T=1024) for D in sizes)
        yield Case(rule, 64, B=1, T=32768)
        if rule != "delta":
            yield from (Case(rule, D, B=4, T=8192, H=32, KV=8) for D in sizes)


def inputs(case: Case, device: str) -> Given:
    """q, k, v, gates and a state: queries and keys, of length 1, in fp32, values in bf16."""
    torch.manual_seed(0)
    rule, D, kind, B, T, H, KV = case
    q, k, v = (torch.randn(B, T, heads, D, device=device) for heads in (H, KV, KV))
    decays = 1 if rule in ("delta", "head") else D
    gates = [F.logsigmoid(torch.randn(B, T, KV, decays, device=device)) / 16]
    if rule == "delta":
        gates.append(torch.rand(B, T, KV, 1, device=device))
    if kind == "steep":
        gates[0][:, ::3], gates[0][:, 1::3] = -20.0, -1e4
    if kind == "correlated":
        k = k[:, :1] + 0.3 * k
        gates[1:] = [2 * beta for beta in gates[1:]]
    document = None
    if kind == "packed":
        starts = torch.tensor([20, 23, 100], device=device)
        document = (torch.arange(T, device=device) >= starts[:, None]).sum(0).expand(B, T)
    leaves = [F.normalize(q, dim=-1), F.normalize(k, dim=-1), v.bfloat16(), *gates]
    return Given([*leaves, torch.randn(B, KV, D, D, device=device)], document)


def run(given: Given, operator: Any, backward: bool, weights: list[Tensor] | None = None) -> tuple[list[Tensor], ...]:
    """What `Case.names` says, and the weights of the sum that is differentiated."""
    with torch.set_grad_enabled(backward):
        results = operator(*given.leaves, given.document)
    weights = [torch.randn(x.shape) for x in results] if weights is None else weights
    gradients: tuple[Tensor, ...] = ()
    if backward:
        gradients = torch.autograd.grad(results, given.leaves, [w.to(x) for w, x in zip(weights, results, strict=True)])
    return [x.detach().cpu().double() for x in (*results, *gradients)], weights


def errors(case: Case, backward: bool, device: str) -> dict[str, Any]:
    """A row of results."""
    given = inputs(case, device)
    row: dict[str, Any] = {**case._asdict(), "backward": backward}
    try:
        rule = RULES[case.rule]
        results, weights = run(given.as_leaves(), rule.kernels, backward)
        expected, _ = run(given.as_leaves(torch.float64), rule.reference, backward, weights)
        norms = [((x - y).norm() / y.norm()).item() for x, y in zip(results, expected, strict=True)]
        return row | dict(zip(case.names, norms, strict=False))
    except Exception as error:  # the other cases are worth knowing
        return row | {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def graph_of(case: Case, operator: Any, backward: bool) -> Callable[[], None]:
    """The replay of one call from no state, with the gradients of all else, or without any."""
    *leaves, state = inputs(case, "cuda").as_leaves().leaves
    state, doutput = torch.zeros_like(state), torch.randn_like(leaves[0])

    def call() -> None:
        with torch.set_grad_enabled(backward):
            output = operator(*leaves, state)[0]
        if backward:
            torch.autograd.grad(output, leaves, doutput)

    return graphed(call)


def timed(case: Case, backward: bool, name: str) -> dict[str, Any]:
    """A row of results."""
    row: dict[str, Any] = {**case._asdict(), "backward": backward, "operator": name}
    try:
        return row | {"seconds": times(graph_of(case, getattr(RULES[case.rule], name), backward))}
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def main() -> None:
    """Case after case until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128], help="head sizes")
    parser.add_argument("--processes", type=int, default=16, help="that compile")
    parser.add_argument("--seconds", type=float, default=60, help="begin nothing after this long")
    given = parser.parse_args()
    stop = time.perf_counter() + given.seconds
    wanted, passes = (given.rules, given.sizes), (False, True)
    sides = [(layer, back, name) for layer in layers(*wanted) for name in ("kernels", "chunked") for back in passes]
    timings = [("times", *side[:2], partial(timed, *side)) for side in sides]
    first, last = (
        [("errors", case, back, partial(errors, case, back, "cuda")) for back in passes for case in some(*wanted)]
        for some in (plain, special)
    )
    jobs = first + timings + last
    results: dict[str, Any] = {"errors": [], "times": []}
    with compilers(given.processes) as begin:
        programs = [begin(_call(case, back)) for _, case, back, _ in jobs]
        for (kind, case, back, job), needed in zip(jobs, programs, strict=True):
            failed = failures(needed, stop)
            if time.perf_counter() > stop:
                print(f"no time for the {kind} of {tuple(case)} {'forward + backward' if back else 'forward'}")
                continue
            not_compiled = {**case._asdict(), "backward": back, "error": "; ".join(failed)}
            results[kind].append(not_compiled if failed else job())
            print(described(results[kind][-1]), flush=True)
            write(given.out, {**provenance(), **results})


def _call(case: Case, backward: bool) -> Callable[[], Any]:
    """By kernels."""
    return partial(run, inputs(case, "cuda").as_leaves(), RULES[case.rule].kernels, backward)


def described(row: dict[str, Any]) -> str:
    """A line for the terminal."""
    what = f"{row['rule']:5} D={row['D']:3} B={row['B']} T={row['T']:5} H={row['H']:2} {row['kind']:10} "
    what += f"{row.get('operator', ''):7} "
    what += "forward + backward" if row["backward"] else "forward           "
    if "seconds" in row:
        return f"{what} {1000 * statistics.median(row['seconds']):.3f} ms"
    names = Case(row["rule"], row["D"]).names
    errors = " ".join(f"{name} {row[name]:.1e}" for name in names if name in row)
    return f"{what} {row.get('error', errors)}"


if __name__ == "__main__":
    main()
