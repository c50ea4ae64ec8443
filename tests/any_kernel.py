"""
A plugin that stands for other processors: `pytest -p tests.any_kernel tests/...`.

Matrix products of a library round by shapes, strides and the alignment of their factors, and how, depends on the
processor. Here they do so on any processor and by more than any of them: a test that passes compares bits only where
the same computation runs on the same layout.
"""

import zlib
from collections.abc import Generator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


PRODUCTS = {"addmm", "addmv", "baddbmm", "bmm", "convolution", "dot", "linear", "mm", "mv"}
PRODUCTS |= {"_scaled_dot_product_flash_attention_for_cpu"}
LARGEST = 48  # units in the last place


class AnyKernel(TorchDispatchMode):
    """Changes the last bits of each product by a hash of how its factors lie in memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        product = output[0] if isinstance(output, tuple) else output
        if func.overloadpacket.__name__ in PRODUCTS and type(product) is torch.Tensor and product.dtype.itemsize >= 4:
            layout = [_layout(factor) for factor in args if isinstance(factor, torch.Tensor)]
            share = zlib.crc32(repr(layout).encode()) % 4 / 3
            product.data.mul_(1 + share * LARGEST * torch.finfo(product.dtype).eps)
        return output


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.data_ptr() % 64 if type(tensor) is torch.Tensor else 0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, Any, Any]:
    """Around every test, its fixtures excepted."""
    with AnyKernel():
        return (yield)
