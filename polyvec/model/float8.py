"""Linear layers in 8-bit floating point (e4m3, arXiv 2209.05433), as tensor cores from compute capability 8.9 multiply.

Each row of the weight, and each token's row of the input, is divided by what brings its largest magnitude to that of
the type; the product is multiplied by both again. Adapters stay as they are: their update is small beside the rounding.

Shape letters: N packed tokens, I and O inner widths, A adapters, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polyvec.errors import InputError
from polyvec.model.encoder import Encoder
from polyvec.model.lora import AdaptedLinear, low_rank_columns

FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FLOAT8).max
_CAPABILITY = (8, 9)  # Ada, Hopper and later


def check_device(device: torch.device) -> None:
    """Raise ``InputError`` for a device whose tensor cores do not multiply 8-bit floats."""
    if device.type != "cuda":
        raise InputError(f"dtype 'float8' needs a GPU of compute capability 8.9, got {device}; use another dtype")
    if (found := torch.cuda.get_device_capability(device)) < _CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise InputError(
            f"dtype 'float8' needs compute capability 8.9, got {found[0]}.{found[1]} ({name}); use torch.bfloat16"
        )


def to_float8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows (N, I) in 8 bits and the (N, 1) float32 scales that they are to be multiplied by."""
    rows = rows.float()
    scales = rows.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * _LARGEST) / _LARGEST
    return (rows / scales).to(FLOAT8), scales


def scaled_product(rows: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor) -> Tensor:
    """Return (N, O) in the bias's type for (N, I) and (O, I) in 8 bits, with (N, 1) and (1, O) scales.

    Where there are no such tensor cores it is the same arithmetic in float32.
    """
    if rows.is_cuda:
        return torch._scaled_mm(
            rows, weight.t(), scales, weight_scales, bias=bias, out_dtype=bias.dtype, use_fast_accum=True
        )
    return ((rows.float() @ weight.float().t()) * scales * weight_scales + bias.float()).to(bias.dtype)


class Float8Linear(nn.Module):
    """Stands in for an ``AdaptedLinear``, for inference."""

    def __init__(self, linear: AdaptedLinear) -> None:
        super().__init__()
        weight, scales = to_float8(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales.t().contiguous())
        self.bias = linear.bias
        for name, factor in zip(("first", "second"), linear.factors(), strict=True):
            self.register_buffer(name, factor.detach().contiguous())

    def forward(self, x: Tensor, gate: Tensor | None) -> Tensor:
        """Return (N, O) for (N, I) rows; ``gate`` (N, ``num_columns``) is None when no row has an adapter."""
        y = scaled_product(*to_float8(x), self.weight, self.scales, self.bias)  # type: ignore[arg-type]
        if gate is None:
            return y
        return y.addmm_(low_rank_columns(x, gate, self.first), self.second.t())  # type: ignore[arg-type, operator]

    @property
    def num_columns(self) -> int:
        """C of ``AdaptedLinear``."""
        return len(self.first)  # type: ignore[arg-type]


@torch.no_grad()
def to_float8_layers(encoder: Encoder) -> None:
    """Replace the four linear layers of every layer in place; embeddings, norms and adapters keep their type."""
    for layers in encoder.all_layers:
        for path, module in list(layers.named_modules()):
            if isinstance(module, AdaptedLinear):
                layers.set_submodule(path, Float8Linear(module))
