# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
A CUDA device for machines that have none: tensors on the CPU that say they are elsewhere, and operations that refuse
to mix them with others, as an accelerator does. Lists as indices do not work, as torch makes tensors of them unseen.
"""

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda:0")
# Indices may be on the CPU, and copies lead from one device to the other.
MIXING = ("index", "index_put", "index_put_", "_index_put_impl_", "copy_", "_to_copy")


class Far(torch.Tensor):
    """`near`, a tensor of the CPU, as one of the device."""

    near: torch.Tensor

    @staticmethod
    def __new__(cls, near: torch.Tensor):
        place = {"strides": near.stride(), "storage_offset": near.storage_offset(), "dtype": near.dtype}
        far = torch.Tensor._make_wrapper_subclass(cls, near.shape, device="meta", **place)
        far.near = near
        return far

    @property
    def device(self):
        return CUDA

    def tolist(self):
        return self.near.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func.name()} outside of `on_device`")


def _is_cuda(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE  # so that naming CUDA does not start it

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        far = any(isinstance(tensor, Far) for tensor in tensors)
        near = any(not isinstance(tensor, Far) and tensor.ndim > 0 for tensor in tensors)
        name = func.name().removeprefix("aten::").partition(".")[0]
        if far and near and name not in MIXING:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        device = kwargs.get("device")
        if device is not None:
            far, kwargs["device"] = _is_cuda(device), torch.device("cpu")
        args, kwargs = tree_map(lambda leaf: leaf.near if isinstance(leaf, Far) else leaf, (tuple(args), kwargs))
        result = func(*args, **kwargs)
        if func._schema.is_mutable and isinstance(result, torch.Tensor):
            return next((tensor for tensor in tensors if getattr(tensor, "near", tensor) is result), result)
        return tree_map(lambda leaf: Far(leaf) if far and isinstance(leaf, torch.Tensor) else leaf, result)


class _Constants(TorchFunctionMode):
    """Tensors made of lists, which no operation makes."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.new_tensor:
            kwargs = {"device": args[0].device, "dtype": args[0].dtype, **kwargs}
            func, args = torch.tensor, args[1:]
        if func is torch.tensor and _is_cuda(kwargs.get("device")):
            return Far(func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)


@contextlib.contextmanager
def on_device() -> Iterator[None]:
    with torch.no_grad(), _Constants(), _Operations():
        yield


def to_device(model: nn.Module) -> nn.Module:
    """A copy of the model that is on the device."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: Far(one.detach()) for name, one in tensors.items() if one is not None})
    return model
