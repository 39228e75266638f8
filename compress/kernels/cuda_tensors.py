"""Tensors at the boundary of the CUDA kernels: which module runs, where, and what it accepts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.kernels.dispatch import load_extension

if TYPE_CHECKING:
    import torch

EXTENSION = "compress.kernels._cuda"
BUILD_HINT = "build it in a source tree with `make cuda` (needs nvcc)"
KINDS = {"float32": 0, "float16": 1, "bfloat16": 2}  # the codes of csrc/kernels.h
HALF_DTYPES = ("float16", "bfloat16")
MATRIX = 2


@dataclass(frozen=True)
class Availability:
    """Whether the CUDA kernels can run here, and why (not)."""

    available: bool
    reason: str


class _State:
    """The module of this process; `loaded` tells "not built" from "not looked for"."""

    loaded = False
    module: Any | None = None


def find_module() -> Any | None:
    """The extension module, or None where it was never built.

    Raises CompressError where it is there and does not load.
    """
    if not _State.loaded:
        hint = f"remove it, or {BUILD_HINT}"
        _State.module = load_extension(EXTENSION, "the CUDA kernels", hint)
        _State.loaded = True
    return _State.module


def availability() -> Availability:
    """Whether the CUDA kernels are built and a device is there."""
    module = find_module()
    if module is None:
        return Availability(False, f"the CUDA kernels are not built: {BUILD_HINT}")
    if module.device_type == "cpu":
        return Availability(True, "emulated on the CPU, for tests")
    import torch

    if torch.version.cuda is None:
        return Availability(False, "this torch has no CUDA: install one that has")
    if not torch.cuda.is_available():
        return Availability(False, "torch sees no CUDA device")
    return Availability(True, torch.cuda.get_device_name())


def module() -> Any:
    """The extension module. Raises CompressError where it was never built."""
    found = find_module()
    if found is None:
        raise CompressError("the CUDA kernels are not built", hint=BUILD_HINT)
    return found


def dtype_name(tensor: torch.Tensor) -> str:
    """The dtype without `torch.`: float32 and the like."""
    return str(tensor.dtype).removeprefix("torch.")


class Arguments:
    """The tensors of one call, checked one by one: of one device, dense, of the right kind.

    Errors name the argument: TypeError for what is no tensor or has the wrong dtype, ValueError for
    the rest.
    """

    def __init__(self) -> None:
        self.module = module()
        self._device: torch.device | None = None

    def tensor(
        self,
        name: str,
        value: Any,
        dtypes: tuple[str, ...],
        shape: tuple[int, ...] | None = None,
    ) -> int:
        """The address of a tensor of one of `dtypes` and of `shape` (None: any)."""
        import torch

        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a torch tensor, not {type(value).__name__}")
        if dtype_name(value) not in dtypes:
            raise TypeError(f"{name} must be {' or '.join(dtypes)}, not {dtype_name(value)}")
        wanted = self.module.device_type
        if value.device.type != wanted:
            raise ValueError(f"{name} must be on a {wanted} device, not on {value.device}")
        if self._device is None:
            self._device = value.device
        if value.device != self._device:
            raise ValueError(f"{name} is on {value.device}, other arguments are on {self._device}")
        if shape is not None and tuple(value.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, not {tuple(value.shape)}")
        if not value.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
        address = int(value.data_ptr())
        if address % max(1, value.element_size()):
            raise ValueError(f"{name} must be aligned to its items")
        return address

    def kind(self, name: str, value: Any, dtypes: tuple[str, ...] = tuple(KINDS)) -> int:
        """The kind code of a floating-point tensor; checks the tensor, too."""
        self.tensor(name, value, dtypes)
        return KINDS[dtype_name(value)]

    def place(self) -> tuple[int, int]:
        """(device index, the caller's current stream) of the tensors seen so far."""
        if self._device is None or self._device.type != "cuda":
            return 0, 0
        import torch

        index = torch.cuda.current_device() if self._device.index is None else self._device.index
        return index, int(torch.cuda.current_stream(index).cuda_stream)

    def empty(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """A new tensor on the device of the tensors seen so far."""
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), device=self._device)


def matrix(name: str, value: torch.Tensor) -> tuple[int, int]:
    """The two sizes of a matrix."""
    if value.ndim != MATRIX:
        raise ValueError(f"{name} must have two axes, not {value.ndim}")
    return int(value.shape[0]), int(value.shape[1])


def check_bits(bits: int) -> None:
    """Codes have 2 to 8 bits."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2 to 8, not {bits}")


def count_groups(columns: int, group_size: int) -> int:
    """How many groups a row has."""
    if not 1 <= group_size < 1 << 62:
        raise ValueError(f"group_size must be positive (and below 2^62), not {group_size}")
    return -(-columns // group_size)
