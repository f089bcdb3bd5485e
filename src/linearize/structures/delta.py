"""DeltaNet (arXiv 2406.06484) and Gated DeltaNet (arXiv 2412.06464): a key overwrites what was stored under it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.ops.gated_delta import gated_delta
from linearize.structures.base import DeltaInputs, Layer, Structure


def deltanet(q: Tensor, k: Tensor, v: Tensor, layer: Layer) -> DeltaInputs:
    """`β = σ(mean of k)`, twice that with `negative_eigenvalues` (arXiv 2411.12537); no decay; q and k of length 1."""
    pooled = k.float().mean(-1, keepdim=True)
    beta = (1 + layer.config.negative_eigenvalues) * pooled.sigmoid()
    q, k = (F.normalize(layer.feature_map(x), dim=-1) for x in (q, k))
    return DeltaInputs(q, k, v, torch.zeros_like(pooled), beta)


def gated_deltanet(q: Tensor, k: Tensor, v: Tensor, layer: Layer) -> DeltaInputs:
    """As `deltanet`, with a decay for each head, `σ(mean of k)^(1/temperature)`."""
    log_g = F.logsigmoid(k.float().mean(-1, keepdim=True)) / layer.config.gate_temperature
    return deltanet(q, k, v, layer)._replace(log_g=log_g)


DELTANET = Structure(deltanet, gated_delta)
GATED_DELTANET = DELTANET._replace(inputs=gated_deltanet)
