"""The delta rule's kernels with given gates against the equation: output, final state and every gradient.

Without a GPU the kernels run in Triton's interpreter, in fp32.
"""

import pytest
import torch
import torch.nn.functional as F
from tiny import assert_close
from torch import Tensor

from linearize.ops.gated_delta import fused, gated_delta, reference

pytest.importorskip("triton", reason="the kernels are Triton's")
GPU = torch.cuda.is_available()

needs_interpreter = pytest.mark.skipif(GPU, reason="Triton's interpreter is for machines without a GPU")

DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.usefixtures("checked_kernels")


def inputs(T: int, B: int = 1, KV: int = 1, groups: int = 2, D: int = 16, correlation: float = 0.0) -> list[Tensor]:
    """q, k, v, log_g, beta in [0, 2] and a state; queries and keys of length 1, keys that share a direction."""
    q, k, v = torch.randn(B, T, KV * groups, D), torch.randn(B, T, KV, D), torch.randn(B, T, KV, D)
    k = (1 - correlation) * k + correlation * torch.randn(D)
    log_g, beta = -torch.rand(B, T, KV, 1), 2 * torch.rand(B, T, KV, 1)
    return [F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, log_g, beta, torch.randn(B, KV, D, D)]


def documents(T: int, *rows: list[int]) -> Tensor:
    """Numbers, from where documents begin."""
    return torch.stack([(torch.arange(T) >= torch.tensor(begins)[:, None]).sum(0) for begins in rows])


def assert_is_the_equation(
    given: list[Tensor], document: Tensor | None = None, dtype: torch.dtype = torch.float32, tolerance: float = 1e-5
) -> None:
    """`dtype` is that of the values and can hold queries and keys, which are in fp32, as structures make them."""
    given = [*(x.to(dtype).float() for x in given[:2]), given[2].to(dtype), *given[3:]]
    there = None if document is None else document.to(DEVICE)
    ours = [x.detach().to(DEVICE, copy=True).requires_grad_() for x in given]
    truth = [x.double().requires_grad_() for x in given]
    with torch.no_grad():  # keeps nothing
        alone = fused(*ours, there)
    results, expected = fused(*ours, there), reference(*truth, document)
    assert [x.dtype for x in results] == [torch.float32, torch.float32]
    for result, other in zip((*results, *alone), expected * 2, strict=True):
        assert_close(result.cpu(), other, tolerance)
    weights = [torch.randn_like(x) for x in expected]
    sum((w * x.cpu().double()).sum() for w, x in zip(weights, results, strict=True)).backward()
    sum((w * x).sum() for w, x in zip(weights, expected, strict=True)).backward()
    for x, other in zip(ours, truth, strict=True):
        assert x.grad is not None
        assert x.grad.dtype == x.dtype
        assert_close(x.grad.cpu(), other.grad, tolerance)


@needs_interpreter
@pytest.mark.parametrize(("T", "groups"), [(1, 3), (63, 1), (64, 3), (65, 3), (200, 1)])
def test_lengths_and_groups(T, groups):
    assert_is_the_equation(inputs(T, groups=groups))


@needs_interpreter
def test_sequences_heads_and_head_sizes():
    assert_is_the_equation(inputs(70, B=2, KV=2, D=24))


def with_values(given: list[Tensor], V: int) -> list[Tensor]:
    """The same with values of size V."""
    q, k, v, log_g, beta, state = given
    return [q, k, torch.randn(*v.shape[:3], V), log_g, beta, torch.randn(*state.shape[:3], V)]


@needs_interpreter
@pytest.mark.parametrize(("K", "V"), [(32, 12), (256, 20)])
def test_values_of_another_size_than_keys(K, V):
    assert_is_the_equation(with_values(inputs(70, KV=2, D=K), V))


@needs_interpreter
def test_wide_keys_with_groups_and_documents():
    assert_is_the_equation(with_values(inputs(130, B=2, groups=3, D=140), 24), documents(130, [20, 23, 100], [64]))


@needs_interpreter
def test_wide_keys_without_decay():
    given = with_values(inputs(70, D=140), 24)
    given[3] = torch.zeros_like(given[3])
    assert_is_the_equation(given)


@needs_interpreter
def test_segments_with_values_of_another_size(monkeypatch):
    cut(monkeypatch, 1)
    assert_is_the_equation(with_values(inputs(180, D=24), 40), documents(180, [20, 23, 100]))


@needs_interpreter
def test_segments_of_wide_keys(monkeypatch):
    """What a segment does to a state is then read in parts."""
    cut(monkeypatch, 1)
    assert_is_the_equation(with_values(inputs(180, D=140), 20), documents(180, [20, 23, 100]))


@needs_interpreter
@pytest.mark.parametrize("log_decay", [0.0, -0.01, -8.0, -20.0, -1e4])
def test_any_decay(log_decay):
    given = inputs(130)
    given[3][:, ::3] = log_decay
    assert_is_the_equation(given)


@needs_interpreter
@pytest.mark.parametrize("log_decay", [0.0, -0.01, -1e4])
def test_the_same_decay_everywhere(log_decay):
    given = inputs(130)
    given[3][:] = log_decay
    assert_is_the_equation(given)


@needs_interpreter
@pytest.mark.parametrize("correlation", [0.5, 0.9, 0.999])
def test_correlated_keys_and_eigenvalues_of_minus_one(correlation):
    given = inputs(130, correlation=correlation)
    given[4][:] = 2.0
    assert_is_the_equation(given)


@needs_interpreter
@pytest.mark.parametrize(("beta", "correlation"), [(1.0, 0.95), (2.0, 0.5)])
def test_correlated_keys_without_decay_in_half_precision(beta, correlation):
    """What nearly cancels, what the tokens of a chunk write, is not rounded."""
    given = inputs(200, D=64, correlation=correlation)
    given[3][:], given[4][:] = 0.0, beta
    assert_is_the_equation(given, None, torch.bfloat16, 1.5e-2)


@needs_interpreter
def test_gradient_of_a_beta_of_nothing_in_half_precision():
    given = inputs(200, D=64, correlation=0.95)
    given[3][:], given[4][:, ::3] = 0.0, 0.0
    given[4][:, 1::3] = 1e-6
    assert_is_the_equation(given, None, torch.bfloat16, 1.5e-2)


@needs_interpreter
def test_documents_do_not_see_each_other():
    assert_is_the_equation(inputs(130, B=2, groups=1), documents(130, [20, 23, 100], [64]))


def cut(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Sequences into segments of so many chunks."""
    from linearize.ops import liger_delta

    monkeypatch.setattr(liger_delta, "segments_of", lambda call, blocks: (-(-call.chunks // size), size))


@needs_interpreter
@pytest.mark.parametrize(
    ("size", "correlation", "log_decay"),
    [(1, 0.0, None), (2, 0.999, 0.0), (3, 0.9, None), (2, 0.9, -0.01), (1, 0.0, -20.0), (2, 0.0, -1e4)],
)
def test_segments(monkeypatch, size, correlation, log_decay):
    """The last one is shorter; the last chunk too."""
    cut(monkeypatch, size)
    given = inputs(300, groups=1, correlation=correlation)
    if log_decay is not None:
        given[3][:, ::3], given[4][:] = log_decay, 2.0
    assert_is_the_equation(given)


@needs_interpreter
def test_segments_of_documents_heads_and_head_sizes(monkeypatch):
    """Documents begin within segments, and with one."""
    cut(monkeypatch, 2)
    given = inputs(200, KV=2, groups=1, D=24)
    assert_is_the_equation(given, documents(200, [20, 23, 128]))


@needs_interpreter
def test_segments_in_half_precision(monkeypatch):
    """What goes from segment to segment is not rounded."""
    cut(monkeypatch, 1)
    given = inputs(200, D=64, groups=1, correlation=0.5)
    given[3][:], given[4][:] = 0.0, 2.0
    assert_is_the_equation(given, None, torch.bfloat16, 1.5e-2)


@pytest.mark.parametrize(
    ("B", "T", "KV", "D", "expected"),
    [
        (16, 2048, 3, 64, (1, 32)),
        (1, 2048, 3, 64, (1, 32)),
        (4, 8192, 8, 128, (1, 128)),
        (1, 4200, 1, 64, (11, 6)),
        (1, 32768, 3, 64, (22, 24)),
        (1, 32768, 8, 128, (8, 64)),
        (1, 2**20, 1, 64, (66, 249)),
        (1, 32768, 3, 256, (22, 24)),
        (16, 2048, 3, 256, (1, 32)),
    ],
)
def test_into_how_many_segments(B, T, KV, D, expected):
    """By shapes alone: long sequences of few heads, so that a pass has a program for each multiprocessor. Values are
    of 64 channels where keys have more than 128."""
    from linearize.ops import liger_delta
    from linearize.ops.gated_delta_fused import _call

    V = D if D <= 128 else 64
    q, v, state = (torch.empty(*shape, device="meta") for shape in ((B, T, KV, D), (B, T, KV, V), (B, KV, D, V)))
    blocks = V // min(V, liger_delta.LAUNCHES["delta_states"][D].block)
    assert liger_delta.segments_of(_call(q, q, v, state, None), blocks) == expected


@needs_interpreter
def test_padding_neither_writes_nor_decays():
    given = inputs(80, B=2)
    real = (torch.arange(80) >= torch.tensor([[70], [5]]))[:, :, None, None]
    given[1], given[3] = given[1] * real, given[3] * real
    assert_is_the_equation(given)


@needs_interpreter
def test_views_and_gradients_of_some():
    q, k, v, log_g, beta, state = inputs(65, KV=2)
    q, k, v = (F.pad(x, (0, 3))[..., :-3] for x in (q, k, v))
    beta.requires_grad_()
    fused(q, k, v, log_g, beta, state)[0].sum().backward()
    again = beta.detach().double().requires_grad_()
    reference(q, k, v, log_g, again, state)[0].sum().backward()
    assert_close(beta.grad, again.grad)


# --- on a GPU, in bf16 ---


@pytest.mark.gpu
@pytest.mark.parametrize("T", [2, 65, 1000])
@pytest.mark.parametrize("D", [16, 32, 64, 96, 128])
def test_gpu_lengths(T, D):
    """Of few tokens there are more sequences, since in few numbers rounding does not even out."""
    assert_is_the_equation(inputs(T, B=max(2, 32 // T), KV=2, groups=3, D=D), None, torch.bfloat16, 5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(("K", "V"), [(128, 64), (256, 64), (200, 48), (32, 64)])
def test_gpu_values_of_another_size_than_keys(K, V):
    given = with_values(inputs(300, B=2, KV=2, groups=3, D=K), V)
    assert_is_the_equation(given, documents(300, [20, 23, 100], [64]), torch.bfloat16, 5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(("K", "V"), [(256, 64), (200, 48)])
def test_gpu_wide_keys(K, V):
    given = with_values(inputs(300, B=2, KV=2, groups=3, D=K), V)
    assert_is_the_equation(given, documents(300, [20, 23, 100], [64]), torch.bfloat16, 5e-3)


@pytest.mark.gpu
def test_gpu_documents():
    given = inputs(300, B=2, groups=3, D=64)
    assert_is_the_equation(given, documents(300, [20, 23, 100], [64]), torch.bfloat16, 5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(("D", "begins"), [(64, [700, 1100, 4000]), (128, []), (256, [700, 1100, 4000]), (200, [])])
def test_gpu_segments(D, begins):
    given, document = inputs(4200, groups=1, D=D), documents(4200, begins) if begins else None
    given = with_values(given, 64) if D > 128 else given
    assert_is_the_equation(given, document, torch.bfloat16, 5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("log_decay", [0.0, -8.0, -1e4])
def test_gpu_any_decay(log_decay):
    given = inputs(200, D=64)
    given[3][:, ::3] = log_decay
    assert_is_the_equation(given, None, torch.bfloat16, 5e-3)


@pytest.mark.gpu
def test_gpu_picks_kernels_where_half_the_precision_is_asked_for(monkeypatch):
    calls = []
    monkeypatch.setattr("linearize.ops.gated_delta.fused", lambda *given: calls.append(given) or fused(*given))
    given = [x.cuda() for x in inputs(70, D=64)]
    gated_delta(*given)
    assert not calls
    with torch.autocast("cuda", torch.bfloat16):
        gated_delta(*given)
    assert [given[2].dtype for given in calls] == [torch.bfloat16]
    with torch.autocast("cuda", torch.bfloat16), pytest.warns(match="keys of size 256 and values of size 128"):
        gated_delta(*(x.cuda() for x in with_values(inputs(70, D=256), 128)))
    assert len(calls) == 1


@pytest.mark.gpu
def test_gpu_graph():
    """Nothing waits for the GPU, forward or backward."""
    given = [x.cuda().requires_grad_() for x in inputs(130, D=64)]
    document = documents(130, [50]).cuda()

    def run() -> list[Tensor]:
        with torch.autocast("cuda", torch.bfloat16):
            output, state = gated_delta(*given, document)
        return [output.detach(), *torch.autograd.grad(output.sum() + state.sum(), given)]

    expected = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    graph.replay()
    for result, other in zip(results, expected, strict=True):
        assert_close(result, other)
