"""Whether decoding steps are right on a GPU, and the launch settings of their kernel: `benchmarks.decode --smoke` and
`--tune`."""

import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.decode import BATCHES, CONVERTED, DEVICE, GPU, graphed, random_model, said, timed
from benchmarks.results import provenance, write
from linearize import convert
from linearize.cache import cache_bytes
from linearize.convert import mixers
from linearize.ops import step
from linearize.ops.liger import GATES, Settings
from linearize.ops.step import Clock, Held


@torch.no_grad()
def smoke(out: Path) -> None:
    """The kernel against the PyTorch code in float64, the graph against the ordinary forward, memory over 3,000
    tokens."""
    found: dict[str, Any] = {}
    for D, groups in ((64, 3), (128, 4), (80, 1)):
        for gate in (*GATES, "none"):
            found[f"kernel {gate} D={D} groups={groups}"] = kernel_error(gate, D, groups)
    for structure in CONVERTED:
        try:
            errors = graph_error("SmolLM2-135M" if GPU else "tiny", structure)
        except Exception as error:
            errors = {"failed": said(error)}
        found |= {f"{structure}: {name}": value for name, value in errors.items()}
        write(out, {**provenance(), "found": found})
    for name, value in found.items():
        print(f"{name}: {value}", flush=True)


def kernel_error(gate: str, D: int, groups: int) -> float:
    """The relative error of ten steps in bf16, output and state."""
    B, KV, fixed = 3, 2, Settings(gate, D**-0.5)
    mixing, decay = torch.rand(KV * groups, device=DEVICE), -torch.rand(KV, device=DEVICE)
    given = [random_inputs(B, KV, groups, D) for _ in range(10)]
    clock, held = random_memory(B, KV, D, fixed)
    truth = Held(held.keys.double(), held.values.double(), held.valid.clone(), held.state.double())
    worst = 0.0
    for heads, cos, sin in given:
        ours = step.step(heads, mixing, fixed, (cos, sin), (cos, sin), clock, held, decay).double()
        turn = cos.double(), sin.double()
        alike = clock._replace(marks={})  # which are in the dtype of the cache
        expected = step.plain(heads.double(), mixing.double(), fixed, turn, turn, alike, truth, decay)
        worst = max(worst, ((ours - expected).norm() / expected.norm()).item())
        step.advance(clock)
    return max(worst, ((held.state - truth.state).norm() / truth.state.norm()).item())


def random_inputs(B: int, KV: int, groups: int, D: int) -> list[Tensor]:
    """Heads, cos and sin of a step in bf16."""
    heads = torch.randn(B, KV * (groups + 2), D, device=DEVICE, dtype=torch.bfloat16)
    angles = torch.randn(B, D // 2, device=DEVICE).repeat(1, 2)
    return [heads, angles.cos().bfloat16(), angles.sin().bfloat16()]


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
        model = convert(random_model(name, dtype), **CONVERTED[structure] | {"mixing_weight": 0.3})
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
    """Microseconds of the step's kernel, by value channels and warps of a program."""
    from linearize.ops.step_triton import run, value_block

    rows: list[dict[str, Any]] = []
    for D, H, KV in ((128, 32, 8), (64, 32, 8), (64, 9, 3)):
        fixed, mixing = Settings("gla", D**-0.5), torch.rand(H, device=DEVICE)
        for B in BATCHES:
            clock, held = random_memory(B, KV, D, fixed)
            heads, cos, sin = random_inputs(B, KV, H // KV, D)
            for block in (8, 16, 32, 64, 128):
                for warps in (1, 2, 4, 8):
                    if block > D or time.perf_counter() > stop:
                        continue

                    def call(block: int = block, warps: int = warps) -> None:
                        for _ in range(10):
                            run(heads, mixing, fixed, (cos, sin), (cos, sin), clock, held, None, block, warps)  # noqa: B023

                    try:
                        micro = 1e5 * statistics.median(timed(graphed(call)))
                    except Exception as error:
                        print(B, D, block, warps, said(error))
                        continue
                    rows.append({"B": B, "H": H, "KV": KV, "D": D, "block": block, "warps": warps, "micro": micro})
            here = [row for row in rows if (row["B"], row["H"], row["D"]) == (B, H, D)]
            chosen = [row for row in here if row["block"] == value_block(B * KV, D) and row["warps"] == 4]
            print(f"B={B} H={H} KV={KV} D={D}: chosen {chosen}", flush=True)
            for row in sorted(here, key=lambda row: row["micro"])[:4]:
                print("   ", row, flush=True)
            write(out, {**provenance(), "rows": rows})
