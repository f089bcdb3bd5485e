"""DeltaNet (arXiv 2406.06484) and Gated DeltaNet (arXiv 2412.06464): a key overwrites what was stored under it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.ops.gated_delta import gated_delta
from linearize.structures.base import DeltaInputs, Layer, Structure, per_head


def deltanet(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, layer: Layer) -> DeltaInputs:
    """`β = σ(P)`, twice that with `negative_eigenvalues` (arXiv 2411.12537); no decay."""
    beta = (1 + layer.config.negative_eigenvalues) * gate.sigmoid()
    return DeltaInputs(q, k, v, torch.zeros_like(beta), beta)


def gated_deltanet(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, layer: Layer) -> DeltaInputs:
    """As `deltanet`, with a decay for each head, `σ(P')^(1/temperature)`."""
    decay, write = gate.chunk(2, dim=-1)
    log_g = F.logsigmoid(decay) / layer.config.gate_temperature
    return deltanet(q, k, v, write, layer)._replace(log_g=log_g)


DELTANET = Structure(deltanet, gated_delta, per_head, decays=False, weighs=False, unit=True)
GATED_DELTANET = Structure(gated_deltanet, gated_delta, per_head, gates=2, weighs=False, unit=True)
