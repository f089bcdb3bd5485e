"""What can be seen on a CPU of whether a CUDA graph could hold some operations."""

from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NeverWaiting(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: values that the CPU needs or brings, and sizes that depend on values. What
    a recurrence does with values where nothing has to be waited for, it does not do here either."""

    def __enter__(self) -> Any:
        self.looking = patch("linearize.ops.gated_linear.may_look", lambda x: False)
        self.looking.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.looking.stop()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "is_nonzero"), name
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            assert not any(x is not None and x.dtype == torch.bool for x in args[1] if hasattr(x, "dtype")), name
        return function(*args, **(kwargs or {}))
