"""Tasks against plain Python, training that goes on where it stopped, and words for what is wrong."""

import json
import shlex
import subprocess
import sys

import pytest
import torch

from linearize import LinearizeError, cli
from linearize.evaluate import state_tracking, tracker
from linearize.evaluate.state_tracking import PRESETS, pairs, results, run, table
from linearize.evaluate.tasks import ELEMENTS, MODULUS, TASKS
from linearize.evaluate.tracker import IGNORED, Pair, Result, Settings, Step, Training, build, draw, encode

SIGNS = "01234+-*=()"
TINY = Settings(hidden_size=8, heads=2, layers=1, steps=4, batch=8, longest=12, block=2, tests=16)
PARITY = Pair("parity", "direct", "deltanet", True)


def sample(task: str, rows: int = 300, longest: int = 40, seed: int = 0):
    return draw(TASKS[task], 3, longest, rows, torch.Generator().manual_seed(seed))


def texts(task: str):
    """Each row as a string, with the states after its symbols."""
    symbols, states, lengths = sample(task)
    for row, after, length in zip(symbols.tolist(), states.tolist(), lengths.tolist(), strict=True):
        yield "".join(SIGNS[x] for x in row[:length]), after[:length]


def test_parity_counts_ones():
    for text, states in texts("parity"):
        assert states == [text[: i + 1].count("1") % 2 for i in range(len(text))]


@pytest.mark.parametrize("task", ["arithmetic", "brackets"])
def test_expressions_have_python_s_value(task):
    for text, states in texts(task):
        assert text.endswith("=")
        assert states[-1] == eval(text[:-1]) % MODULUS


def test_arithmetic_states_are_value_and_last_summand():
    for text, states in texts("arithmetic"):
        for i in range(0, len(text) - 1, 2):
            value, summand = divmod(states[i] - MODULUS, MODULUS)
            cut = max(text[: i + 1].rfind("+"), text[: i + 1].rfind("-"), 0)
            assert value == eval(text[: i + 1]) % MODULUS
            assert summand == eval(text[cut : i + 1]) % MODULUS
        assert states[1:-1:2] == states[0:-2:2]  # an operator changes nothing yet


def test_brackets_states_are_value_so_far_and_sign():
    for text, states in texts("brackets"):
        outer, sign, after_operand, value = [], 1, False, 0
        for symbol, state in zip(text[:-1], states, strict=False):
            base = outer[-1] if outer else 1
            if symbol in "01234":
                value += sign * int(symbol)
                assert (state - MODULUS) // 2 == value % MODULUS
            elif symbol == "(":
                outer.append(sign)
            elif symbol == ")":
                sign = outer.pop()
            else:
                sign = (base if after_operand else sign) * (1 if symbol == "+" else -1)
                assert (state - MODULUS) % 2 == (sign < 0)
            after_operand = symbol in "01234)"


def test_s5_composes_permutations():
    symbols, states, lengths = sample("s5")
    for row, after, length in zip(symbols.tolist(), states.tolist(), lengths.tolist(), strict=True):
        things = tuple(range(5))
        for symbol, state in zip(row[:length], after[:length], strict=True):
            things = tuple(ELEMENTS[symbol][x] for x in things)
            assert ELEMENTS[state] == things


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_in_range_padded_and_repeatable(task):
    symbols, states, lengths = sample(task, rows=2000, longest=20)
    past = torch.arange(symbols.shape[1]) >= lengths[:, None]
    assert symbols.shape == states.shape
    assert not symbols[past].any()
    assert not states[past].any()
    assert set(lengths.tolist()) == {int(TASKS[task].fit(torch.tensor(n))) for n in range(3, 21)}
    assert symbols.max() < TASKS[task].symbols
    assert states.max() < TASKS[task].states
    last = states.gather(1, lengths[:, None] - 1)
    assert set(last.flatten().tolist()) == set(range(TASKS[task].answers))
    for same, seed in ((True, 0), (False, 1)):
        again = sample(task, rows=2000, longest=20, seed=seed)
        assert all(map(torch.equal, again, (symbols, states, lengths))) == same


@pytest.mark.parametrize("scratchpad", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_encoding_asks_for_the_right_states(task, scratchpad):
    symbols, states, lengths = sample(task, rows=20, longest=12)
    tokens, targets = encode(TASKS[task], symbols, states, lengths, scratchpad)
    offset = 1 + TASKS[task].symbols
    for i, length in enumerate(lengths.tolist()):
        row, after = (1 + symbols[i, :length]).tolist(), (offset + states[i, :length]).tolist()
        if scratchpad:
            row = [token for both in zip(row, after, strict=True) for token in both][:-1]
            wanted = [x for state in after for x in (IGNORED, state)]
        else:
            wanted = [IGNORED, *([*after] if TASKS[task].every else [IGNORED] * (length - 1) + after[-1:])]
        assert tokens[i, : len(row) + 1].tolist() == [0, *row]
        assert targets[i, : len(wanted)].tolist() == wanted
        assert (targets[i, len(wanted) :] == IGNORED).all()


def test_scaled_accuracy_is_0_at_chance_and_1_when_right():
    for task in TASKS.values():
        assert task.scaled(1 / task.answers) == 0
        assert task.scaled(1.0) == 1


def test_a_few_steps_lower_the_loss(tmp_path):
    settings = TINY.model_copy(update={"steps": 60, "block": 20, "learning_rate": 1e-2, "longest": 3})
    training = Training(
        Pair("parity", "scratchpad", "deltanet", True), settings, tmp_path / "a.pt", torch.device("cpu"), False
    )
    while not training.done:
        training.block()
    losses = [loss for _, loss, _ in training.progress["checks"]]
    assert losses[-1] < losses[0] - 0.1


def trained(tmp_path, **settings):
    """Of a pair, after a block."""
    settings = TINY.model_copy(update=settings)
    training = Training(PARITY, settings, tmp_path / "a.pt", torch.device("cpu"), False)
    training.block()
    training.path.unlink()
    return training


def test_weights_decay_and_norms_do_not(tmp_path):
    plain, decayed = (dict(trained(tmp_path, weight_decay=x).model.named_parameters()) for x in (0.0, 100.0))
    for name, weight in plain.items():
        assert (decayed[name].norm() < 0.98 * weight.norm()) == ("norm" not in name), name


def test_the_model_is_as_wide_and_starts_as_it_is_told(tmp_path):
    weights = {
        initial: dict(build(PARITY, TINY.model_copy(update={"initial": initial, "mlp": 24})).named_parameters())
        for initial in (0.02, 0.002)
    }
    assert weights[0.02]["model.layers.0.mlp.up_proj.weight"].shape == (24, 8)
    assert build(PARITY, TINY).config.intermediate_size == 16
    for name in ("lm_head.weight", "model.layers.0.self_attn.q_proj.weight"):
        torch.testing.assert_close(weights[0.02][name], 10 * weights[0.002][name])


def test_products_are_in_the_given_precision(tmp_path):
    seen = {}
    for precision in ("fp32", "bf16"):
        training = trained(tmp_path, precision=precision)
        training.model.lm_head.register_forward_hook(
            lambda _, __, output, precision=precision: seen.setdefault(precision, set()).add(output.dtype)
        )
        training.accuracy(3, 12, 16, 0, free=True)
        training.step(*encode(TASKS["parity"], *sample("parity", rows=8, longest=12)))
        assert all(weight.dtype == torch.float32 for weight in training.model.parameters())
    assert seen == {"fp32": {torch.float32}, "bf16": {torch.bfloat16}}


def test_gradients_are_clipped(tmp_path):
    norms = {}
    for clip in (None, 0.01):
        gradients = [weight.grad.norm() for weight in trained(tmp_path, clip=clip).model.parameters()]
        norms[clip] = torch.stack(gradients).norm().item()
    assert norms[0.01] == pytest.approx(0.01, rel=1e-3)
    assert norms[None] > 0.1


def test_the_learning_rate_rises_and_falls_to_its_final_share(tmp_path):
    training = trained(tmp_path, steps=100, warmup=0.1, learning_rate=2.0, final=0.25)
    rates = [training._rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert training._rate(55) == pytest.approx(1.25)
    assert training._rate(100) == pytest.approx(0.5)


def test_the_schedule_ends_with_the_time(tmp_path):
    training = trained(tmp_path, steps=100, training_seconds=1000.0, curriculum=0.5, final=0.0)
    assert not training.done
    training.progress["seconds"] = 550.0
    assert training._rate(2) == pytest.approx(training.settings.learning_rate / 2)
    assert training._longest(2) == TINY.longest
    training.progress["seconds"] = 250.0
    assert training._longest(2) == (TINY.longest + TINY.shortest) // 2
    training.progress["seconds"] = 1000.0
    assert training.done


def test_what_comes_before_the_graph_does_not_count(tmp_path, monkeypatch):
    training = trained(tmp_path, steps=100)
    clock = iter([0.0, 50.0, 51.0])  # the block begins, its first step is compiled, it ends
    monkeypatch.setattr(tracker.time, "perf_counter", lambda: next(clock))
    ready = iter([False, True])
    monkeypatch.setattr(Step, "ready", property(lambda step: next(ready)))
    before = training.progress["seconds"]
    training.block()
    assert training.progress["seconds"] - before == pytest.approx(1.0)


COMPILED = """
import sys
from functools import partial
from pathlib import Path
import torch
from linearize.evaluate.tasks import TASKS
from linearize.evaluate.tracker import Pair, Settings, Step, Training, draw, encode

torch.compile = partial(torch.compile, backend="eager", fullgraph=True)
torch.set_num_threads(1)
pair, precision = Pair("parity", "direct", "deltanet", True), sys.argv[2]
settings = Settings(hidden_size=8, heads=2, layers=1, convolution=4, convolution_form="silu", precision=precision)
batch = encode(TASKS["parity"], *draw(TASKS["parity"], 3, 12, 8, torch.Generator().manual_seed(0)))
for compiled in (False, True):
    training = Training(pair, settings, Path(sys.argv[1]), torch.device("cpu"), False)
    step = Step(training.model, training.optimizer, settings, False, compiled)
    print(step(*batch).item(), step(*batch).item())
"""


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_is_compiled_as_one_graph(precision, tmp_path):
    """In a process of its own, since what pytest puts around functions to check shapes cannot be traced."""
    told = subprocess.check_output([sys.executable, "-c", COMPILED, str(tmp_path / "none.pt"), precision], text=True)
    eager, compiled = ([float(x) for x in line.split()] for line in told.splitlines())
    assert compiled == pytest.approx(eager, rel=1e-6)


@pytest.mark.parametrize("structure", ["gla", "mamba2", "deltanet"])
def test_writing_reads_back_what_was_written(structure, tmp_path):
    pair = Pair("arithmetic", "scratchpad", structure, False)
    training = Training(pair, TINY, tmp_path / "a.pt", torch.device("cpu"), False)
    symbols, _, lengths = sample("arithmetic", rows=4, longest=8)
    states = torch.zeros_like(symbols)
    for i in range(symbols.shape[1]):  # the whole row again for every symbol, without a cache
        states[:, i] = training._read(symbols, states, torch.full_like(lengths, i + 1))
    expected = states.gather(1, lengths[:, None] - 1)[:, 0]
    assert torch.equal(training.model.eval() and training._write(symbols, lengths), expected)


def test_an_interrupted_pair_ends_the_same(tmp_path, monkeypatch):
    chosen = [PARITY, PARITY._replace(task="s5", structure="gla", negative_eigenvalues=False)]
    assert run(chosen, TINY, tmp_path / "whole")
    assert not run(chosen, TINY, tmp_path / "parts", seconds=0.0)
    assert results(tmp_path / "parts") == []
    blocks, block = [], Training.block

    def killed(training):
        if len(blocks) == 1:
            raise KeyboardInterrupt
        blocks.append(block(training))

    monkeypatch.setattr(Training, "block", killed)
    with pytest.raises(KeyboardInterrupt):
        run(chosen, TINY, tmp_path / "parts")
    monkeypatch.setattr(Training, "block", block)
    assert (tmp_path / "parts" / f"{PARITY.name}.pt").exists()
    assert run(chosen, TINY, tmp_path / "parts")
    timeless = [
        [result.model_copy(update={"seconds": 0}) for result in results(tmp_path / name)] for name in ("whole", "parts")
    ]
    assert timeless[0] == timeless[1]
    assert len(timeless[0]) == 2
    assert not list((tmp_path / "parts").glob("*.pt"))


def test_a_stopped_run_says_how_far_it_came(tmp_path, monkeypatch, capsys):
    assert not run([PARITY], TINY, tmp_path, seconds=0.0)
    assert "parity-direct-deltanet-negative: no check yet" in capsys.readouterr().out
    clock = iter([0.0, 0.0, 2.0])  # the deadline is made, a block may begin, and then no other
    monkeypatch.setattr(state_tracking.time, "monotonic", lambda: next(clock))
    assert not run([PARITY], TINY, tmp_path, seconds=1.0)
    assert "step 2 of 4, loss " in capsys.readouterr().out


def test_a_finished_pair_is_kept(tmp_path, monkeypatch):
    assert run([PARITY], TINY, tmp_path)
    monkeypatch.setattr(Training, "block", None)
    assert run([PARITY], TINY, tmp_path)
    assert len(json.loads((tmp_path / "state-tracking.json").read_text())["results"]) == 1


def test_other_settings_are_refused(tmp_path):
    run([PARITY], TINY, tmp_path)
    with pytest.raises(LinearizeError, match=r"batch 8, not 9, seed 0, not 1\); give"):
        run([PARITY], TINY.model_copy(update={"batch": 9, "seed": 1}), tmp_path)


def test_pairs_have_both_ranges_of_eigenvalues_for_the_delta_rule():
    chosen = pairs(["deltanet", "gla", "gla"], ["parity"], ["direct"])
    assert [(p.structure, p.negative_eigenvalues) for p in chosen] == [
        ("deltanet", True),
        ("deltanet", False),
        ("gla", False),
    ]
    assert len({pair.name for pair in chosen}) == 3


def test_table_has_a_row_for_each_structure():
    shared = {"task": "parity", "format": "direct", "structure": "deltanet", "steps": 1, "seconds": 1.0, "checks": []}
    rows = [
        Result(**shared, negative_eigenvalues=False, trained=0.1, longer=0.0),
        Result(**shared, negative_eigenvalues=True, trained=1.0, longer=0.99),
        Result(**shared | {"task": "s5"}, negative_eigenvalues=True, trained=0.5, longer=0.25),
    ]
    assert table(rows).splitlines()[2:] == [
        "| deltanet | [0, 1] | 0.000 (0.100) | – |",
        "| deltanet | [-1, 1] | 0.990 (1.000) | 0.250 (0.500) |",
    ]


COMMAND = (
    "bench state-tracking --preset small --set hidden_size=8 --set longest=6 --set tests=4 --steps 2 --batch 4 "
    "--out out "
)
REFUSED = [
    ("--task foo", "task 'foo' valid: arithmetic, brackets, parity, s5"),
    ("--structure foo", "structure 'foo' valid: deltanet, gated_deltanet, gla"),
    ("--format foo", "format 'foo' valid: direct, scratchpad"),
    ("--preset foo", "preset 'foo' valid: full, small"),
    ("--steps 0", "steps 0 greater than or equal to 1"),
    ("--set foo=1", "'foo' hidden_size, heads, layers"),
    ("--set heads", "'heads' key=value hidden_size"),
    ("--set heads=3", "hidden_size 8 3 heads"),
    ("--set own={foo:{}}", "task 'foo' valid: arithmetic"),
    ("--set 'own={parity: {batch: 0}}'", "batch 0 greater than or equal to 1"),
    ("--set longest=4 --set shortest=5", "longest is 4 shortest 5"),
    ("--set convolution_form=silu", "convolution_form silu no effect"),
    ("--set precision=fp16", "precision 'fp16' 'fp32' or 'bf16'"),
    ("--out file", "file new, empty or linearize's"),
]


@pytest.mark.parametrize(("added", "words"), REFUSED)
def test_what_is_wrong_is_named(added, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert cli.main(shlex.split(COMMAND + added)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for word in words.split():
        assert word in said
    assert not (tmp_path / "out").exists()


def test_the_command_prints_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(shlex.split(COMMAND)) == 0
    printed = capsys.readouterr().out
    assert "| deltanet | [0, 1] |" in printed
    assert "| deltanet | [-1, 1] |" in printed
    assert (tmp_path / "out" / "state-tracking.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_parity_needs_negative_eigenvalues(seed, tmp_path):
    base = PRESETS["small"]
    settings = base.settings.model_copy(update={"seed": seed})
    assert run(pairs(base.structures, base.tasks, base.formats), settings, tmp_path)
    with_, without = sorted(results(tmp_path), key=lambda result: not result.negative_eigenvalues)
    assert abs(without.longer) < 0.15
    assert with_.longer >= 0.99


def test_presets_hold_together():
    for preset in PRESETS.values():
        assert state_tracking.pairs(preset.structures, preset.tasks, preset.formats)
        assert all(preset.settings.of(task).own == {} for task in TASKS)
    assert PRESETS["full"].settings.of("parity").layers == 1
    assert PRESETS["full"].settings.of("arithmetic").layers == 3


def test_parity_keeps_its_model_whatever_the_others_get():
    published = ["convolution_form=silu", "mlp=512", "precision=bf16", "initial=0.006", "weight_decay=0.1", "final=0"]
    changed, _ = state_tracking.choose("full", published, {}, [], [], [])
    assert changed.of("parity") == PRESETS["full"].settings.of("parity")
    assert changed.of("arithmetic").precision == "bf16"
