"""The products of a decoding step against float64: in PyTorch, and by the kernels, without a GPU in Triton's
interpreter."""

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from tiny import assert_close
from torch import Tensor

if find_spec("triton") is None:
    pytest.skip("the kernels are Triton's", allow_module_level=True)

if not torch.cuda.is_available():
    import interpreted  # noqa: F401

from triton.runtime.errors import OutOfResources

from linearize.ops import dispatch, products, products_triton
from linearize.ops.products import Linear, Norm
from linearize.ops.products_triton import LAUNCHES, Launch, launch_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
RUNS = [products, products_triton]
SHAPES = [(576, 40), (16, 16), (80, 100), (304, 33)]  # columns and rows of the weight: whole tiles, and odd ones
pytestmark = pytest.mark.usefixtures("checked_kernels")


def tensors(B: int, K: int, rows: int, bias: bool, dtype: torch.dtype, device: str = DEVICE) -> tuple:
    """x, a norm whose epsilon is felt, and a linear layer."""
    x, weight = torch.randn(B, K) * torch.logspace(-1, 1, B)[:, None], torch.randn(rows, K) / K**0.5
    norm = Norm((1 + 0.3 * torch.randn(K)).to(device, dtype), 0.1)
    linear = weight.to(device, dtype), torch.randn(rows).to(device, dtype) if bias else None
    return x.to(device, dtype), norm, linear


def doubled(x: Tensor, norm: Norm, linear: Linear) -> tuple[Tensor, Tensor]:
    """linear(norm(x)) and linear(x) in float64."""
    x, scale, (weight, bias) = x.double(), norm.weight.double(), linear
    normed = x / (x.square().mean(1, keepdim=True) + norm.epsilon).sqrt() * scale
    bias = None if bias is None else bias.double()
    return F.linear(normed, weight.double(), bias), F.linear(x, weight.double(), bias)


@pytest.mark.parametrize(
    ("rows", "cores", "blocks"),
    [
        (576, 1, 1),
        (576, 2, 2),
        (976, 6, 8),
        (976, 7, 8),
        (41, 2, 1),
        (576, 64, 36),
        (1008, 64, 63),
        (49152, 64, 64),
        (9, 4, 1),
    ],
)
def test_what_each_core_gets(rows, cores, blocks):
    assert products.cores_share(rows, cores) == blocks


@pytest.mark.skipif(DEVICE == "cuda", reason="of a CPU's cores")
@pytest.mark.parametrize("cores", [1, 2, 3, 5])
@pytest.mark.parametrize("bias", [False, True])
def test_shared_among_cores(cores, bias, monkeypatch):
    """Blocks of the weight's rows, where there are enough of them and few rows of x."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    few, many = torch.randn(16, 16), torch.randn(17, 16)
    assert products.blocks_of(few, torch.randn(240, 16)) == cores
    assert products.blocks_of(many, torch.randn(240, 16)) == 1
    for B, K, N in ((1, 80, 96), (5, 33, 240), (16, 16, 41), (17, 16, 96)):
        x, norm, linear = tensors(B, K, N, bias, torch.float32)
        expected, unnormed = doubled(x, norm, linear)
        assert_close(products.product(x, linear), unnormed)
        assert_close(products.normed_product(x, norm, linear), expected)
        hidden = torch.randn(B, N)
        expected = hidden.double() + unnormed
        products.add_product(hidden, x, linear)
        assert_close(hidden, expected)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("run", RUNS, ids=["plain", "kernel"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("K", "N"), SHAPES)
def test_each_product(K, N, bias, run, dtype):
    tolerance = TOLERANCE[dtype] * (
        1 if run is products_triton else 2
    )  # PyTorch rounds between norm, product and SwiGLU
    for B in (1, 5, 16):
        x, norm, linear = tensors(B, K, N, bias, dtype)
        expected, unnormed = doubled(x, norm, linear)
        normed = run is products or dtype != torch.float16
        if normed:
            result = run.normed_product(x, norm, linear)
            assert result.dtype == dtype
            assert_close(result, expected, tolerance)

        hidden = torch.randn(B, N).to(DEVICE, dtype)
        expected = hidden.double() + unnormed
        run.add_product(hidden, x, linear)
        assert_close(hidden, expected, tolerance)

        x, norm, linear = tensors(B, K, 2 * N + 7, bias, dtype)  # rows of zeros may follow
        gate, up = doubled(x, norm, linear)[0][:, : 2 * N].chunk(2, dim=1)
        if normed:
            assert_close(run.normed_swiglu(x, norm, linear, N), F.silu(gate) * up, tolerance)


@pytest.mark.parametrize(
    "launch",
    [Launch(16, 64, 1, 4, 3), Launch(24, 64, 2, 4, 3), Launch(32, 32, 8, 8, 2), Launch(64, 128, 4, 4, 2)],
    ids=str,
)
def test_any_launch_settings(launch, monkeypatch):
    for kind in LAUNCHES:
        monkeypatch.setitem(LAUNCHES, kind, {(1, 1): Launch(*launch)})
    x, norm, linear = tensors(3, 304, 40, True, torch.float32)
    assert_close(products_triton.normed_product(x, norm, linear), doubled(x, norm, linear)[0])
    gate, up = doubled(x, norm, linear)[0].chunk(2, dim=1)
    assert_close(products_triton.normed_swiglu(x, norm, linear, 20), F.silu(gate) * up)


@pytest.mark.parametrize("size", [60_000, 1e-3])
def test_large_and_small_activations_in_fp16(size):
    """Before the norm has divided them, products may be more than fp16 holds, or less."""
    x, norm, linear = tensors(2, 64, 32, False, torch.float16)
    x, norm = (x / x.abs().amax() * size).contiguous(), Norm(norm.weight * (20 if size > 1 else 0.05), 1e-12)
    expected, _ = doubled(x, norm, linear)
    assert_close(products.normed_product(x, norm, linear), expected, 2e-3)


def test_a_norm_by_itself():
    for K in (576, 1000):
        x, norm, linear = tensors(5, K, 1, False, torch.float32)
        expected = F.rms_norm(x.double(), (K,), norm.weight.double(), norm.epsilon)
        for run in RUNS:
            assert_close(run.normed(x, norm), expected)


def test_swiglu_by_itself():
    gate_up = torch.randn(3, 2 * 1030 + 4, device=DEVICE)
    gate, up = gate_up[:, :2060].double().chunk(2, dim=1)
    for run in RUNS:
        assert_close(run.swiglu(gate_up, 1030), F.silu(gate) * up, 1e-5)


def test_as_many_stages_as_fit(monkeypatch):
    """Into a device's shared memory."""
    tried = []

    class Kernel:
        def __getitem__(self, grid):
            return self

        def __call__(self, *_, num_stages, **__):
            tried.append(num_stages)
            if num_stages > 2 or only:
                raise OutOfResources(120_000, 101_376, "shared memory")

    monkeypatch.setattr(products_triton, "product_kernel", Kernel())
    monkeypatch.setitem(LAUNCHES, "product", {(1, 1): Launch(16, 64, 1, 4, 4)})
    x, norm, linear = tensors(3, 64, 32, False, torch.float32)
    only = False
    products_triton.normed_product(x, norm, linear)
    assert tried == [4, 3, 2]
    only = True
    with pytest.raises(OutOfResources):
        products_triton.normed_product(x, norm, linear)
    assert tried[3:] == [4, 3, 2, 1]


def test_the_nearest_settings_in_the_table():
    for kind, table in LAUNCHES.items():
        for shape, launch in table.items():
            assert launch_of(kind, *shape) == launch
            assert launch.ahead & (launch.ahead - 1) == 0  # a kernel's range of lines
    assert launch_of("add", 600, 500) == LAUNCHES["add"][576, 576]
    assert launch_of("add", 4000, 20000) == LAUNCHES["add"][4096, 14336]


def test_what_has_no_kernel(monkeypatch):
    monkeypatch.setattr(dispatch, "no_device", lambda x: None)
    x, weight = torch.zeros(16, 64, dtype=torch.bfloat16), torch.zeros(32, 64, dtype=torch.bfloat16)
    assert products.why_not_fused(x, weight) is None
    for given, reason in (
        ((x.repeat(2, 1), weight), "32 rows"),
        ((x[:, :40].contiguous(), weight), "40 columns"),
        ((x.float(), weight.float()), "torch.float32 by torch.float32"),
        ((x, weight.half()), "torch.bfloat16 by torch.float16"),
        ((x, weight.t().contiguous().t()), "tensors that are not contiguous"),
    ):
        assert products.why_not_fused(*given) == f"no kernel for {reason}"
    half = x.half(), weight.half()
    assert products.why_not_fused(*half) is None
    assert products.why_not_fused(*half, normed=True) == "no kernel for a norm in torch.float16"
