"""Muon for the matrices of the blocks, AdamW for the rest, over two processes.

Muon: Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
"""

import torch
from torch import Tensor, distributed, nn

MUON_RATE, MUON_MOMENTUM, MUON_DECAY = 0.02, 0.95, 0.01
ADAM_RATE, ADAM_BETAS = 0.003, (0.9, 0.98)
_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalized(matrix: Tensor) -> Tensor:
    """The nearest matrix with singular values around 1: five Newton-Schulz steps."""
    a, b, c = _QUINTIC
    x: Tensor = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).float()


class Optimizer:
    """One step from summed gradients; each process orthogonalizes its share of the matrices."""

    def __init__(self, model: nn.Module, rank: int, world: int) -> None:
        self.parameters = list(model.parameters())
        names = [name for name, _ in model.named_parameters()]
        self._matrices = [
            weight
            for name, weight in zip(names, self.parameters, strict=True)
            if weight.ndim == 2 and name != "token_embd"
        ]
        others = [weight for weight in self.parameters if not self._is_matrix(weight)]
        self._adam = torch.optim.AdamW(others, lr=ADAM_RATE, betas=ADAM_BETAS, weight_decay=0.0)
        self._momenta = [torch.zeros_like(weight) for weight in self._matrices]
        self._rank, self._world = rank, world

    def _is_matrix(self, weight: Tensor) -> bool:
        return any(weight is matrix for matrix in self._matrices)

    def reduce(self, loss: float, count: int) -> float:
        """Add the gradients of all processes, divide by the count of graded tokens; mean loss."""
        grads = [weight.grad for weight in self.parameters if weight.grad is not None]
        flat = torch.cat([*(grad.flatten() for grad in grads), torch.tensor([loss, float(count)])])
        distributed.all_reduce(flat)
        total = float(flat[-1])
        start = 0
        for grad in grads:
            grad.copy_(flat[start : start + grad.numel()].view_as(grad) / total)
            start += grad.numel()
        return float(flat[-2]) / total

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Update all weights with the learning rates times `factor`."""
        for group in self._adam.param_groups:
            group["lr"] = ADAM_RATE * factor
        self._adam.step()
        updates = []
        for number, (weight, momentum) in enumerate(
            zip(self._matrices, self._momenta, strict=True)
        ):
            grad = weight.grad
            assert grad is not None
            momentum.lerp_(grad, 1 - MUON_MOMENTUM)
            if number % self._world == self._rank:
                update = orthogonalized(grad.lerp(momentum, MUON_MOMENTUM))
                updates.append(update * max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5)
            else:
                updates.append(torch.zeros_like(weight))
        flat = torch.cat([update.flatten() for update in updates])
        distributed.all_reduce(flat)
        start = 0
        for weight in self._matrices:
            update = flat[start : start + weight.numel()].view_as(weight)
            start += weight.numel()
            weight.mul_(1 - MUON_RATE * MUON_DECAY * factor).sub_(update, alpha=MUON_RATE * factor)
        for weight in self.parameters:
            weight.grad = None

    def state(self) -> dict[str, object]:
        """Everything that a continued run needs."""
        return {"adam": self._adam.state_dict(), "momenta": self._momenta}

    def load(self, state: dict[str, object]) -> None:
        """The inverse of `state`."""
        self._adam.load_state_dict(state["adam"])  # type: ignore[arg-type]
        for mine, saved in zip(self._momenta, state["momenta"], strict=True):  # type: ignore[call-overload]
            mine.copy_(saved)
