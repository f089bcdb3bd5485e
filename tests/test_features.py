"""Feature maps are what their names say."""

import pytest
import torch
from tiny import assert_close

from linearize.features import FEATURE_MAPS, SIGNED, feature_map, feature_size

X = 3 * torch.randn(2, 50, 3, 8, generator=torch.Generator().manual_seed(0))


def test_maps_without_parameters():
    assert_close(FEATURE_MAPS["softmax"](X).sum(-1), torch.ones(2, 50, 3))
    assert_close(FEATURE_MAPS["l2"](X).norm(dim=-1), torch.ones(2, 50, 3))
    assert_close(FEATURE_MAPS["elu"](X), torch.where(X > 0, X + 1, X.exp()))
    assert torch.equal(FEATURE_MAPS["relu"](X), X.clamp(min=0))
    assert torch.equal(FEATURE_MAPS["none"](X), X)
    for name in FEATURE_MAPS:
        assert (name in SIGNED) == bool((FEATURE_MAPS[name](X) < 0).any())


def test_hedgehog_starts_as_the_identity_and_has_a_map_for_each_head():
    hedgehog = feature_map("hedgehog", 3, 8)
    hedgehog.reset_parameters()
    assert_close(hedgehog(X), torch.cat([X.softmax(-1), (-X).softmax(-1)], dim=-1))
    assert hedgehog(X).shape[-1] == feature_size("hedgehog", 8) == 16
    hedgehog.weight.data.normal_()
    hedgehog.bias.data.normal_()
    for head in range(3):
        mapped = X[:, :, head] @ hedgehog.weight[head] + hedgehog.bias[head]
        assert_close(hedgehog(X)[:, :, head], torch.cat([mapped.softmax(-1), (-mapped).softmax(-1)], dim=-1))


def test_products_are_of_neighbours_and_do_not_hang_on_the_length():
    products, linear = feature_map("products", 3, 8, shifts=1), feature_map("linear", 3, 8)
    for learned in (products, linear):
        learned.reset_parameters()
    products.up.data.normal_()
    linear.load_state_dict(products.state_dict())
    y = linear(X)
    y = y / y.square().mean(-1, keepdim=True).sqrt()
    pairs = [y[..., i] * y[..., i - 1] for i in range(8)]
    assert_close(products(X), torch.cat([y, torch.stack(pairs, dim=-1)], dim=-1), 1e-4)
    assert products(X).shape[-1] == feature_size("products", 8, shifts=1) == 16
    products.up.data.zero_()
    assert_close(products(10 * X), products(X), 1e-4)


def test_products_with_channels_further_on():
    once, thrice = feature_map("products", 3, 8, shifts=1), feature_map("products", 3, 8, shifts=3)
    for learned in (once, thrice):
        learned.reset_parameters()
    found = thrice(X)
    assert found.shape[-1] == feature_size("products", 8, shifts=3) == 32
    assert torch.equal(found[..., :16], once(X))
    y = found[..., :8]
    for shift in (2, 3):
        pairs = [y[..., i] * y[..., i - shift] for i in range(8)]
        assert_close(found[..., 8 * shift : 8 * shift + 8], torch.stack(pairs, dim=-1), 1e-4)


@pytest.mark.parametrize(
    ("head_dim", "keys"), [(8, 40), (16, 144), (32, 256), (48, 240), (64, 256), (80, 80), (128, 128)]
)
def test_products_are_as_many_as_kernels_take(head_dim, keys):
    """Up to 256 keys, and a state of 128 x 128 numbers at most with both sides as kernels pad them; none twice."""
    assert feature_size("products", head_dim) == keys
