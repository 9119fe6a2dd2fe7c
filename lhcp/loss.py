"""Cross-entropy against a large vocabulary without the N x vocabulary logits.

Shape suffixes: M rows (positions), E model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lhcp.data import IGNORE

LossAndGradient = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""See `loss_and_gradient`."""


def loss_and_gradient(logits_MV: Tensor, labels_M: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of rows of logits, and its gradient with respect to them.

    Computed in float32 (float64 of float64). Compiled, it reads the logits twice and writes the gradient once.

    Returns:
        The loss in nats, a scalar in the dtype it is computed in; the gradient in the logits' dtype.
    """
    x = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
    counts = labels_M != IGNORE
    labels_M1 = labels_M.where(counts, 0).unsqueeze(-1)
    lse_M1 = x.logsumexp(-1, keepdim=True)
    loss = (lse_M1 - x.gather(-1, labels_M1)).squeeze(-1).where(counts, 0).sum()
    is_label = torch.arange(x.shape[-1], device=x.device) == labels_M1
    gradient = ((x - lse_M1).exp() - is_label.to(x.dtype)).where(counts.unsqueeze(-1), 0)
    return loss, gradient.to(logits_MV.dtype)


def linear_cross_entropy(
    hidden_BNE: Tensor,
    weight_VE: Tensor,
    labels_BN: Tensor,
    chunk: int = 8192,
    softmax: LossAndGradient = loss_and_gradient,
) -> Tensor:
    """Sum of the cross-entropies, in nats, of `hidden @ weight.T` against the labels that are not `IGNORE`.

    Logits exist for `chunk` positions at a time, and their gradient is computed along with the loss, so that nothing is
    computed again in backward. The weight's gradient is summed over chunks in float32, and rounded once.
    (`F.linear_cross_entropy` would return the sum in the input's dtype: three digits in bfloat16.)

    Args:
        hidden_BNE: normalised hidden states.
        weight_VE: of the output layer.
        labels_BN: int64.
        chunk: positions at a time.
        softmax: `loss_and_gradient`, or that compiled.

    Returns:
        A scalar in float32 (float64 of float64); 0 when no label counts. Its backward can run once.
    """
    out: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_BNE.flatten(0, 1), weight_VE, labels_BN.flatten(), softmax, chunk
    )
    return out


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ME: Tensor, weight_VE: Tensor, labels_M: Tensor, softmax: LossAndGradient, chunk: int
    ) -> Tensor:
        to_hidden, to_weight, *_ = ctx.needs_input_grad
        sums = torch.promote_types(hidden_ME.dtype, torch.float32)
        total = hidden_ME.new_zeros((), dtype=sums)
        hidden_grad = torch.empty_like(hidden_ME) if to_hidden else None
        weight_grad = torch.zeros_like(weight_VE, dtype=sums) if to_weight else None
        for start in range(0, len(hidden_ME), chunk):
            rows = hidden_ME[start : start + chunk]
            loss, gradient = softmax(F.linear(rows, weight_VE), labels_M[start : start + chunk])
            total += loss
            if hidden_grad is not None:
                torch.mm(gradient, weight_VE, out=hidden_grad[start : start + chunk])
            if weight_grad is not None:
                _add_product(weight_grad, gradient.T, rows)
            del gradient  # before the next chunk's is made
        ctx.save_for_backward(hidden_grad, weight_grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = (None if x is None else x.mul_(grad) for x in ctx.saved_tensors)
        return hidden_grad, weight_grad, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b`, in the dtype of `total`."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
