"""Errors of the kernels of Liger Attention on a GPU, in bf16, against the equations in float64.

    python -m benchmarks.errors --out docs/results/errors_h100.json --seconds 120

Relative, in the norm: of output and final state, without and with a backward pass, and of every gradient; odd lengths,
grouped heads, an initial state; packed documents, decays from nothing to all, and keys that are nearly the same.
Programs are compiled side by side, and every case runs as soon as its own are: first all without a backward pass.
"""

import argparse
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.results import provenance, write
from benchmarks.tune import compilers, failures
from linearize.ops.liger import DELTA, GATES, Settings, first_tokens, fused, reference

NAMES = ("output", "state", "dq", "dk", "dv", "dmixing", "dstate")  # the first two without a backward pass


class Case(NamedTuple):
    """Inputs: what is in the keys, and how long the sequences are."""

    gate: str
    D: int
    kind: str = "plain"
    T: int = 200


def cases(sizes: list[int]) -> Iterator[Case]:
    """The gates by head size, then what is special."""
    for D in sizes:
        yield from (Case(gate, D) for gate in (*GATES, *DELTA))
        yield from (Case(gate, D, "packed") for gate in ("gla", "mamba2", "gated_deltanet"))
        yield from (Case(gate, D, "steep") for gate in ("gla", "rwkv6", "gated_deltanet"))
        yield from (Case(gate, D, "correlated") for gate in DELTA)
        yield from (Case(gate, D, T=4200) for gate in ("gla", "gated_deltanet"))  # cut into segments


class Given(NamedTuple):
    """One case's inputs."""

    leaves: list[Tensor]
    settings: Settings
    rope: tuple[Tensor, Tensor]
    first: Tensor | None
    decay: Tensor

    def to(self, device: str) -> "Given":
        """On another device, with leaves of their own."""
        leaves = [x.detach().to(device, copy=True).requires_grad_() for x in self.leaves]
        first = None if self.first is None else self.first.to(device)
        return self._replace(
            leaves=leaves,
            rope=(self.rope[0].to(device), self.rope[1].to(device)),
            first=first,
            decay=self.decay.to(device),
        )


def inputs(case: Case) -> Given:
    """On the CPU."""
    torch.manual_seed(0)
    gate, D, kind, T = case
    B, KV, groups = (2, 1, 2) if T < 1000 else (1, 1, 1)
    q, k, v = (torch.randn(B, T, heads, D) for heads in (KV * groups, KV, KV))
    settings = Settings(gate, D**-0.5, lower=0.3)
    if kind == "steep":
        k, settings = 20.0 * k, settings._replace(temperature=1.0, scale=0.0005)
    if kind == "correlated":
        k, settings = k[:, :1] + 0.3 * k + 2.0, settings._replace(strength=2.0)
    first = None
    if kind == "packed":
        number = (torch.arange(T) >= torch.tensor([20, 23, 100])[:, None]).sum(0)
        first = first_tokens(torch.stack([number, (torch.arange(T) >= 64).long()]), None)
    angles = 3 * torch.randn(T, D // 2).repeat(1, 2)
    leaves = [*(x.bfloat16() for x in (q, k, v)), torch.rand(KV * groups), torch.randn(B, KV, D, D)]
    return Given(leaves, settings, (angles.cos(), angles.sin()), first, -torch.rand(KV))


def run(given: Given, operator: Any, backward: bool, weights: list[Tensor] | None = None) -> tuple[list[Tensor], ...]:
    """What `NAMES` says, and the weights of the sum that is differentiated."""
    q, k, v, mixing, state = given.leaves
    with torch.set_grad_enabled(backward):
        results = operator(q, k, v, mixing, given.settings, given.rope, state, given.first, given.decay)
    weights = [torch.randn(x.shape) for x in results] if weights is None else weights
    gradients: tuple[Tensor, ...] = ()
    if backward:
        gradients = torch.autograd.grad(results, given.leaves, [w.to(x) for w, x in zip(weights, results, strict=True)])
    return [x.detach().cpu().double() for x in (*results, *gradients)], weights


def in_double(given: Given) -> Given:
    """The same values in float64."""
    return given._replace(leaves=[x.detach().double().requires_grad_() for x in given.leaves])


def errors(case: Case, backward: bool, device: str) -> dict[str, Any]:
    """A row of results."""
    given = inputs(case)
    row: dict[str, Any] = {**case._asdict(), "backward": backward}
    try:
        results, weights = run(given.to(device), fused, backward)
        expected, _ = run(in_double(given), reference, backward, weights)
        norms = [((x - y).norm() / y.norm()).item() for x, y in zip(results, expected, strict=True)]
        return row | dict(zip(NAMES, norms, strict=False))
    except Exception as error:  # the other cases are worth knowing
        return row | {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def main() -> None:
    """Case after case until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128], help="head sizes")
    parser.add_argument("--gates", nargs="+", default=[*GATES, *DELTA], choices=[*GATES, *DELTA])
    parser.add_argument("--processes", type=int, default=16, help="that compile")
    parser.add_argument("--seconds", type=float, default=120, help="begin nothing after this long")
    given = parser.parse_args()
    stop = time.perf_counter() + given.seconds
    found = [case for case in cases(given.sizes) if case.gate in given.gates]
    sides = [(case, backward) for backward in (False, True) for case in found]
    rows: list[dict[str, Any]] = []
    with compilers(given.processes) as begin:
        jobs = [begin(partial(run, inputs(case).to("cuda"), fused, backward)) for case, backward in sides]
        for (case, backward), programs in zip(sides, jobs, strict=True):
            failed = failures(programs, stop)
            if time.perf_counter() > stop:
                print(f"no time for {tuple(case)} {'forward + backward' if backward else 'forward'}")
                continue
            not_compiled = {**case._asdict(), "backward": backward, "error": "; ".join(failed)}
            rows.append(not_compiled if failed else errors(case, backward, "cuda"))
            print(described(rows[-1]), flush=True)
            write(given.out, {**provenance(), "rows": rows})


def described(row: dict[str, Any]) -> str:
    """A line for the terminal."""
    what = f"{row['gate']:14} D={row['D']:3} T={row['T']:4} {row['kind']:10} "
    what += "forward + backward" if row["backward"] else "forward           "
    errors = " ".join(f"{name} {row[name]:.1e}" for name in NAMES if name in row)
    return f"{what} {row.get('error', errors)}"


if __name__ == "__main__":
    main()
