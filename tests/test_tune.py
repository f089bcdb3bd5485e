"""The sweep over launch settings, as far as it needs no GPU."""

from concurrent.futures import Future
from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is None or torch.cuda.is_available():
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

import interpreted  # noqa: F401

from benchmarks import tune
from linearize.ops.liger_fused import LAUNCHES, Launch

SHAPE = (1, 70, 2, 1, 16)


def test_a_candidate_is_run_checked_and_timed(monkeypatch):
    problem = tune.Problem(SHAPE, "gla", "cpu", torch.float32)
    timed = []
    monkeypatch.setattr(tune, "seconds_of", lambda tasks: (timed.append(tasks), [2.0, 1.0, 3.0])[1])
    row, expected = tune.tried(problem, "output", 16, Launch(2, 1), None)
    assert row == {"difference": 0.0, "seconds": 2.0}
    (tasks,) = timed
    assert [task.kernel.split(":")[1] for task in tasks] == ["output_kernel"]
    assert tasks[0].told["num_warps"] == 2
    assert LAUNCHES["output"][16].num_warps != 2  # the table is as before
    wrong = [2 * x for x in expected]
    row, _ = tune.tried(problem, "output", 16, Launch(2, 1), wrong)
    assert row["error"] == "other results"


@pytest.mark.parametrize(
    ("gate", "kernel"),
    [
        ("gla", "output"),
        ("gla", "window_gradients"),
        ("gated_deltanet", "window"),
        ("gated_deltanet", "delta_output"),
        ("given-key", "read"),
        ("given-value", "read_gradients"),
        ("given-head", "write_gradients"),
    ],
)
def test_timing_leaves_what_the_first_candidate_computed(monkeypatch, gate, kernel):
    """Launches write to the results of the pass that they are from, or add to them."""
    monkeypatch.setattr(tune, "seconds_of", lambda tasks: (tune.replay(tasks), [1.0])[1])
    problem, launch, expected = tune.problem_of(SHAPE, gate, "cpu", torch.float32), LAUNCHES[kernel][16], None
    for _ in range(2):
        row, expected = tune.tried(problem, kernel, 16, launch, expected)
        assert row == {"difference": 0.0, "seconds": 1.0}


def test_heads_of_a_group_at_once(monkeypatch):
    monkeypatch.setattr("linearize.ops.liger_fused.MULTIPROCESSORS", 1)
    monkeypatch.setattr(tune, "seconds_of", lambda tasks: [float(tasks[0].told["HEADS"])])
    problem, expected = tune.Problem((1, 70, 4, 1, 16), "gla", "cpu", torch.float32), None
    for heads, at_once in ((1, 1), (2, 2), (3, 1)):
        row, expected = tune.tried(problem, "group_output", 16, Launch(2, 1, heads=heads), expected)
        assert row["difference"] < 1e-5
        assert row["seconds"] == at_once
    with tune.recording(runs=False) as tasks:
        problem.run()
    assert {task.kernel.split(":")[1] for task in tasks} >= {"group_output_kernel", "query_gradients_kernel"}
    (task,) = tune.tasks_of("group_output", tasks)[:1]
    assert tune.with_settings(task, Launch(2, 1, heads=2)).told["HEADS"] == 2


def test_launches_belong_to_the_kernel_before(monkeypatch):
    from linearize.ops import liger_fused

    monkeypatch.setattr(liger_fused, "segments_of", lambda call, blocks: (2, 1))
    with tune.recording(runs=False) as tasks:
        tune.Problem(SHAPE, "gla", "cpu", torch.float32).run()
    names = [task.kernel.split(":")[1] for task in tune.tasks_of("states", tasks)]
    assert names == ["states_kernel", "carry_kernel", "states_kernel"]


def test_passes_of_the_delta_rule_in_segments(monkeypatch):
    from linearize.ops import liger_delta

    monkeypatch.setattr(liger_delta, "segments_of", lambda call, blocks: (2, 1))
    with tune.recording(runs=False) as tasks:
        tune.Problem(SHAPE, "deltanet", "cpu", torch.float32).run()
    for kernel, launches in (("delta_states", 2), ("delta_carry", 2), ("delta_state_gradients", 2)):
        mine = tune.tasks_of(kernel, tasks)
        assert [task.kernel.split(":")[1] for task in mine] == [f"{kernel}_kernel"] * launches
    told = tune.with_settings(mine[0], Launch(2, 4, 8)).told
    assert (told["num_warps"], told["num_stages"], told["STAGES"], told["BV"]) == (2, 4, 4, 8)


@pytest.mark.parametrize("kernel", [kernel for kernel, sizes in LAUNCHES.items() if 128 in sizes])
def test_candidates_begin_with_the_table(kernel):
    found = tune.candidates(kernel, 128)
    assert found[0] == LAUNCHES[kernel][128]
    assert len(set(found)) == len(found) > 1


def test_settings_as_in_the_source():
    assert tune.shown(Launch(4, 1)) == "Launch(4, 1)"
    assert tune.shown(Launch(4, 1, 64, 128)) == "Launch(4, 1, 64, 128)"
    assert eval(tune.shown(Launch(4, 1, 32))) == Launch(4, 1, 32)


def test_a_row_is_told():
    row = {"D": 16, "kernel": "output", **Launch(4, 1)._asdict()}
    assert "2.000 ms" in tune.described(row | {"seconds": 2e-3})
    assert "out of memory" in tune.described(row | {"error": "out of memory"})


def test_programs_are_the_same_for_other_lengths_and_numbers():
    found = []
    for T, scale in ((70, 0.25), (130, 0.5)):
        problem = tune.Problem((1, T, 2, 1, 16), "gla", "cpu", torch.float32)
        problem.settings = problem.settings._replace(scale=scale, temperature=scale)
        with tune.recording(runs=False) as tasks:
            problem.run()
        found.append([tune.program_key(task) for task in tasks])
    assert found[0] == found[1]
    assert len({key[0] for key in found[0]}) == len(found[0])


def test_what_does_not_compile_is_told():
    jobs = {(f"module:{name}",): Future() for name in ("good", "bad", "crashed", "slow")}
    good, bad, crashed, _ = jobs.values()
    good.set_result({"compile_seconds": 1.0, "shared": 0})
    bad.set_result({"error": "too large"})
    crashed.set_exception(RuntimeError("gone"))
    assert tune.failures(jobs, stop=0.0) == ["module:bad: too large", "module:crashed: gone"]
