"""What tests of kernels share."""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch


@pytest.fixture
def checked_kernels() -> Iterator[None]:
    """What is allocated and not written is NaN; in the interpreter, launches are checked too."""
    gpu = torch.cuda.is_available()
    if not gpu and find_spec("triton") is not None:
        import interpreted

        with interpreted.checked():
            yield
    else:
        torch.use_deterministic_algorithms(True, warn_only=gpu)
        yield
        torch.use_deterministic_algorithms(False)
