"""The sweep over the launch settings of products, as far as it needs no GPU."""

import json
import sys
from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is None or torch.cuda.is_available():
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

import interpreted  # noqa: F401

from benchmarks import documents_speed as speed
from benchmarks import products as benchmark
from benchmarks import results
from linearize.ops import products_triton
from linearize.ops.products_triton import LAUNCHES, Launch, launch_of

FOUND = [Launch(16, 64, 1, 4, 3), Launch(32, 32, 2, 2, 3)]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the command; its rows."""
    monkeypatch.setattr(benchmark, "candidates", lambda product: FOUND)
    monkeypatch.setattr(benchmark, "timed", lambda call: (call(), [2.0, 1.0, 3.0])[1])
    out = tmp_path / "products.json"
    monkeypatch.setattr(sys, "argv", ["products", "--model", "tiny", "--out", str(out)])

    def command() -> list[dict]:
        benchmark.main()
        return json.loads(out.read_text())["rows"]

    return command


def test_every_product_is_measured_once_and_told(run, capsys, monkeypatch, tmp_path):
    rows = run()
    assert len(rows) == 4 * (3 + 2 * 3 + 2 * 3)  # three batches: cuBLAS, two candidates, and these with overlap
    assert all(row["difference"] < 1e-5 and row["seconds"] == 1.0 for row in rows)
    printed = capsys.readouterr().out
    table = printed[printed.rindex("LAUNCHES:") :].split("=", 1)[1]
    made = eval(table, {"Launch": Launch})
    assert {kind: set(shapes) for kind, shapes in made.items()} == {
        "product": {(128, 64)}, "swiglu": {(96, 64)}, "add": {(64, 64), (64, 96)}
    }  # fmt: skip
    assert run() == rows
    (tmp_path / "products_h100.json").write_text((tmp_path / "products.json").read_text())
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert speed.products().count("| 1000000.0 | 1000000.0 | 1000000.0 |") == 4 * 3
    assert (128, 64) not in LAUNCHES["product"]


def test_failures_are_rows(run, monkeypatch):
    kernel = products_triton.product_kernel

    class Failing:
        fn = kernel.fn

        def __getitem__(self, grid):
            def launch(*args, **told):
                if told["SLICES"] == 2:
                    raise RuntimeError("no room\nat all")
                kernel[grid](*args, **told)
                if told["ADD"]:
                    args[4].mul_(2)

            return launch

    monkeypatch.setattr(products_triton, "product_kernel", Failing())
    rows = run()
    assert {row.get("error") for row in rows if row["launch"] == list(FOUND[1])} == {"RuntimeError: no room"}
    assert {row.get("error") for row in rows if row["launch"] == list(FOUND[0])} == {None, "other results"}


@pytest.mark.parametrize("model", benchmark.MODELS)
def test_candidates_begin_with_the_table(model):
    for product in benchmark.products_of(model):
        found = benchmark.candidates(product)
        assert launch_of(product.kernel, product.rows, product.columns)._replace(ahead=0) == found[0]
        assert (product.rows, product.columns) in LAUNCHES[product.kernel]
        assert len(set(found)) == len(found) > 10


def test_what_is_fetched_ahead():
    """Lines of 64 columns, a power of two of them for the kernel, no more than a row has."""
    for rows, columns, ahead in ((24, 2048, 8), (64, 2048, 4), (8, 576, 8), (8, 100, 2), (64, 64, 1)):
        launch = Launch(rows, 64, 1, 4, 3)
        assert benchmark.beginning_early(benchmark.Product("add", 640, columns), launch) == launch._replace(ahead=ahead)
    assert benchmark.beginning_early(benchmark.Product("swiglu", 640, 2048), launch).ahead == 2
