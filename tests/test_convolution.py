"""A short causal convolution."""

import torch
from tiny import assert_close

from linearize.convolution import ShortConvolution


def filled(size: int) -> ShortConvolution:
    convolution = ShortConvolution(size, 3, 8)
    convolution.weight.data.normal_()
    return convolution


def test_it_starts_as_the_identity():
    convolution, x = filled(4), torch.randn(2, 9, 3, 8)
    convolution.reset_parameters()
    assert torch.equal(convolution(x, None, None, None)[0], x)


def test_with_silu_it_starts_at_random_by_its_seed():
    weights = []
    for seed in (0, 0, 1):
        convolution = ShortConvolution(4, 3, 8, silu=True, seed=seed)
        convolution.reset_parameters()
        weights.append(convolution.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert 0.4 < weights[0].abs().max() <= 0.5
    assert weights[0].std() > 0.2


def test_silu_comes_last():
    linear, x = filled(4), torch.randn(2, 9, 3, 8)
    silu = ShortConvolution(4, 3, 8, silu=True)
    silu.load_state_dict(linear.state_dict())
    output, past = linear(x, None, None, None)
    assert_close(silu(x, None, None, None)[0], output * output.sigmoid())
    assert torch.equal(silu(x, None, None, None)[1], past)


def test_it_is_the_convolution_of_each_channel_in_parts_or_whole():
    convolution, x = filled(4), torch.randn(2, 9, 3, 8)
    channels, kernel = x.flatten(2).mT, convolution.weight.flatten(1).T.flip(1)[:, None]
    expected = torch.nn.functional.conv1d(torch.nn.functional.pad(channels, (3, 0)), kernel, groups=24)
    whole, _ = convolution(x, None, None, None)
    assert_close(whole, expected.mT.unflatten(2, (3, 8)))
    past, parts = None, []
    for part in x.split([1, 2, 5, 1], dim=1):
        output, past = convolution(part, past, None, None)
        parts.append(output)
    assert_close(torch.cat(parts, dim=1), whole)
