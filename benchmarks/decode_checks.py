"""Whether decoding steps are right on a GPU, and the launch settings of their kernel: `benchmarks.decode --smoke` and
`--tune`."""

import itertools
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.decode import BATCHES, CONVERTED, DEVICE, GPU, random_model, said, timed
from benchmarks.results import provenance, write
from benchmarks.timing import copy_speed, graphed
from linearize import convert
from linearize.cache import cache_bytes
from linearize.convert import mixers
from linearize.features import RANK
from linearize.ops import step
from linearize.ops.liger import DELTA, GATES, Settings
from linearize.ops.step import Beyond, Clock, Held
from linearize.readouts import EPSILON


@torch.no_grad()
def smoke(out: Path, structures: Iterable[str], stop: float) -> None:
    """The kernels against the PyTorch code in float64; of each structure, the graph against the ordinary forward, and
    memory over 3,000 tokens."""
    found: dict[str, Any] = {}
    for D, groups in ((64, 3), (128, 4), (80, 1)):
        for gate in (*GATES, "none", *DELTA):
            try:
                error: float | str = kernel_error(gate, D, groups)
            except Exception as raised:
                error = said(raised)
            found[f"kernel {gate} D={D} groups={groups}"] = error
            print(f"kernel {gate} D={D} groups={groups}: {error}", flush=True)
        write(out, {**provenance(), "found": found})
    for name, error in product_errors() if GPU else ():
        found[name] = error
        print(f"{name}: {error}", flush=True)
    for structure in structures:
        if time.perf_counter() > stop:
            break
        try:
            errors = graph_error("SmolLM2-135M" if GPU else "tiny", structure)
        except Exception as error:
            errors = {"failed": said(error)}
        for name, value in errors.items():
            found[f"{structure}: {name}"] = value
            print(f"{structure}: {name}: {value}", flush=True)
        write(out, {**provenance(), "found": found})


def kernel_error(gate: str, D: int, groups: int) -> float:
    """The relative error of ten steps in bf16, output and state; of the delta rule with all that the default recipe
    adds to it, and with a gate for each channel."""
    B, KV, fixed = 3, 2, Settings(gate, D**-0.5, feature_map="linear" if gate in DELTA else "softmax")
    mixing, decay = torch.rand(KV * groups, device=DEVICE), -torch.rand(KV, device=DEVICE)
    given = [random_inputs(B, KV, groups, D) for _ in range(10)]
    clock, held = random_memory(B, KV, D, fixed)
    truth = Held(held.keys.double(), held.values.double(), held.valid.clone(), held.state.double())
    worst, run = 0.0, step.step
    if GPU:
        from linearize.ops import step_triton

        run = step_triton.run
    for heads, cos, sin in given:
        more = random_beyond(B, KV, groups, D) if gate in DELTA else step.NOTHING
        ours = run(heads, mixing, fixed, (cos, sin), (cos, sin), clock, held, decay, more).double()
        turn = cos.double(), sin.double()
        alike = clock._replace(shared={})  # which are in the dtype of the cache
        expected = step.plain(heads.double(), mixing.double(), fixed, turn, turn, alike, truth, decay, doubled(more))
        worst = max(worst, ((ours - expected).norm() / expected.norm()).item())
        step.advance(clock)
    return max(worst, ((held.state - truth.state).norm() / truth.state.norm()).item())


def product_errors() -> Iterator[tuple[str, float | str]]:
    """Relative errors of the kernels of a layer's products, in bf16, by name."""
    from benchmarks.products import MODELS, Problem, products_of
    from linearize.ops import products_triton

    for product in dict.fromkeys(product for model in MODELS for product in products_of(model)):
        problem = Problem(product)
        for batch in (1, 5, 16):
            try:
                error: float | str = problem.error(products_triton, batch)
            except Exception as raised:
                error = said(raised)
            yield f"{product.kernel} {product.rows} x {product.columns}, {batch} rows", error


def random_inputs(B: int, KV: int, groups: int, D: int) -> list[Tensor]:
    """Heads, cos and sin of a step in bf16."""
    heads = torch.randn(B, KV * (groups + 2), D, device=DEVICE, dtype=torch.bfloat16)
    angles = torch.randn(B, D // 2, device=DEVICE).repeat(1, 2)
    return [heads, angles.cos().bfloat16(), angles.sin().bfloat16()]


def random_beyond(B: int, KV: int, groups: int, D: int) -> Beyond:
    """All there is, in bf16."""

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) / shape[-1] ** 0.5

    H, rank = KV * groups, min(RANK, D)
    maps = made(H, D, rank), made(H, rank, D), made(KV, D, rank), made(KV, rank, D)
    return Beyond(maps, made(B, KV, 2), made(B, H), EPSILON, (made(B, RANK), made(H * D, RANK)))


def doubled(more: Beyond) -> Beyond:
    """The same in float64."""
    maps: Any = more.maps and tuple(x.double() for x in more.maps)
    gate, mixing = (x if x is None else x.double() for x in (more.gate, more.mixing))
    opening: Any = more.opening and tuple(x.double() for x in more.opening)
    return Beyond(maps, gate, mixing, more.epsilon, opening)


def random_memory(B: int, KV: int, D: int, fixed: Settings) -> tuple[Clock, Held]:
    """As after a thousand tokens, in bf16."""
    rows = fixed.sinks + fixed.window
    keys, values = (torch.randn(B, KV, rows, D, device=DEVICE).bfloat16() for _ in range(2))
    held = Held(keys, values, torch.ones(B, fixed.window, dtype=torch.uint8, device=DEVICE),
                torch.randn(B, KV, D, D, device=DEVICE))  # fmt: skip
    clock = Clock(
        torch.full((1,), 1000, device=DEVICE), torch.full((B,), 1000, device=DEVICE),
        torch.ones(B, dtype=torch.bool, device=DEVICE), torch.arange(fixed.sinks, device=DEVICE).repeat(B, 1), {},
    )  # fmt: skip
    return clock, held


def graph_error(name: str, structure: str) -> dict[str, Any]:
    """Logits after a prompt by the graph and by the ordinary forward, relative errors in bf16 and fp32; what 3,000
    tokens leave allocated; tokens per second of `generate`."""
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        exact = {"mixing_weight": 0.3, "state_dtype": "float32"}  # a state's rounding would be all that is seen
        model = convert(random_model(name, dtype), **CONVERTED[structure] | exact)
        for mixer in mixers(model):
            for parameter in mixer.recurrence.parameters() if mixer.recurrence is not None else ():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)  # many start at 0 and would change nothing
        ids = torch.randint(0, model.config.vocab_size, (4, 220), device=DEVICE)
        mask = torch.ones_like(ids)
        mask[1, :37] = 0
        logits = []
        for ordinary in (True, False):
            cache, parts = DynamicCache(config=model.config), []
            with patch("linearize.convert.next_token", lambda *_: None) if ordinary else nullcontext():
                for begin, end in [(0, 200), *((t, t + 1) for t in range(200, 220))]:
                    positions = (mask[:, :end].cumsum(1) - 1).clamp(min=0)[:, begin:]
                    given = {"attention_mask": mask[:, :end], "position_ids": positions, "past_key_values": cache}
                    parts.append(model(ids[:, begin:end], logits_to_keep=1, **given).logits)
            logits.append(torch.cat(parts, 1).double())
        found[f"graph against ordinary forward, {dtype}"] = ((logits[1] - logits[0]).norm() / logits[0].norm()).item()
        same = logits[1].argmax(-1) == logits[0].argmax(-1)
        found[f"likeliest tokens that are the same, {dtype}"] = same.double().mean().item()
    cache, token = DynamicCache(config=model.config), ids[:, :1]
    model(ids, past_key_values=cache)
    held = []
    for index in range(3000 if GPU else 30):
        token = model(token, past_key_values=cache).logits.argmax(-1)
        if GPU and index % 500 == 499:
            held.append((torch.cuda.memory_allocated(), cache_bytes(cache)))
    found["bytes allocated and in the cache, every 500 tokens"] = held
    for batch in (1, 16):
        given = {"attention_mask": torch.ones(batch, 64, dtype=torch.long, device=DEVICE), "do_sample": False}
        for tokens in (8, 256 if GPU else 8):
            start = time.perf_counter()
            model.generate(ids[:1, :64].expand(batch, -1), max_new_tokens=tokens, min_new_tokens=tokens, **given)
            if GPU:
                torch.cuda.synchronize()
            found[f"seconds of generate, batch {batch}, {tokens} tokens"] = time.perf_counter() - start
    return found


@torch.no_grad()
def tune(out: Path, stop: float) -> None:
    """Microseconds of the step's kernel by how it is launched, and its error against float64: of the delta rule with
    all that the default recipe adds to it, whose programs have whole heads, then of gla. `floor` is what a copy of its
    bytes takes; calls go from layer to layer, as in a model, so that the GPU's cache does not hold large batches."""
    from linearize.ops.step_triton import program

    rows: list[dict[str, Any]] = []
    speed = copy_speed() if GPU else None
    shapes = ((128, 32, 8), (64, 32, 8), (64, 9, 3))
    for gate, (D, H, KV), B in itertools.product(("gated_deltanet", "gla"), shapes, BATCHES[::-1]):
        blocks = [D] if gate in DELTA else [block for block in (16, 32, 64, 128) if block <= D]
        chosen = program(B * KV, D, D, gate in DELTA)
        launches = dict.fromkeys([chosen, *itertools.product(blocks, (1, 2, 4, 8, 16))])
        if time.perf_counter() > stop:
            break
        problem = Stepped(gate, D, H, KV, B)
        for launch in launches:
            if time.perf_counter() > stop:
                break
            row: dict[str, Any] = {"gate": gate, "B": B, "H": H, "KV": KV, "D": D}
            row |= {"block": launch[0], "warps": launch[1], "chosen": launch == chosen}
            row["floor"] = None if speed is None else 1e6 * problem.bytes / speed
            try:
                row |= {"error": problem.error(launch), "micro": problem.microseconds(launch)}
            except Exception as error:
                row["failed"] = said(error)
            rows.append(row)
            print(*(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
                    for name, value in row.items()), flush=True)  # fmt: skip
            write(out, {**provenance(), "rows": rows})


class Stepped:
    """A step of up to 64 layers, together 256 MB where that is enough of them."""

    def __init__(self, gate: str, D: int, H: int, KV: int, B: int) -> None:
        whole, groups = gate in DELTA, H // KV
        self.mixing = torch.rand(H, device=DEVICE)
        self.fixed = Settings(gate, D**-0.5, feature_map="linear" if whole else "softmax")
        self.heads, cos, sin = random_inputs(B, KV, groups, D)
        self.turn = cos, sin
        self.layers: list[tuple[Clock, Held, Beyond]] = []
        self.bytes, count = 0, 2
        while len(self.layers) < count:
            more = random_beyond(B, KV, groups, D)._replace(opening=None) if whole else step.NOTHING
            clock, held = random_memory(B, KV, D, self.fixed)
            if whole:
                held = held._replace(state=held.state.half())  # the default recipe's
            self.layers.append((clock, held, more))
            self.bytes = moved(self.heads, held, more)
            count = min(64, max(2, 2**28 // self.bytes)) if GPU else 2
        self.first = [x.clone() for x in self.layers[0][1][:4]]
        self.expected: tuple[Tensor, Tensor] | None = None

    def run(self, layer: int, launch: tuple[int, int]) -> Tensor:
        """One layer's step."""
        from linearize.ops.step_triton import run

        clock, held, more = self.layers[layer]
        return run(self.heads, self.mixing, self.fixed, self.turn, self.turn, clock, held, None, more, launch)

    def error(self, launch: tuple[int, int]) -> float:
        """The larger relative error of output and state, of the first layer as it was at first."""
        clock, held, more = self.layers[0]
        for x, y in zip(held[:4], self.first, strict=True):
            x.copy_(y)
        if self.expected is None:
            truth = Held(held.keys.double(), held.values.double(), held.valid.clone(), held.state.double())
            cos, sin = (x.double() for x in self.turn)
            given = self.heads.double(), self.mixing.double(), self.fixed, (cos, sin), (cos, sin)
            output = step.plain(*given, clock._replace(shared={}), truth, None, doubled(more))
            self.expected = output, truth.state
        found = self.run(0, launch), held.state
        return max(((x.double() - y).norm() / y.norm()).item() for x, y in zip(found, self.expected, strict=True))

    def microseconds(self, launch: tuple[int, int]) -> float:
        """Of one layer, the median of replays of a graph of all."""

        def call() -> None:
            for layer in range(len(self.layers)):
                self.run(layer, launch)

        return 1e6 * statistics.median(timed(graphed(call), 0.1)) / len(self.layers)


def moved(heads: Tensor, held: Held, more: Beyond) -> int:
    """Bytes that a step reads and writes: of `heads` as much comes as goes, as output and as key and value kept."""
    both_ways = (heads, held.state)
    return sum(x.nbytes for x in (held.keys, held.values, *(more.maps or ()), *both_ways, *both_ways))
