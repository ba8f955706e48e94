"""Adan, the adaptive Nesterov momentum optimizer (Xie et al., arXiv:2208.06677)."""

import torch
from torch import Tensor
from torch.optim import Optimizer


class Adan(Optimizer):
    """Adan with bias correction and decoupled weight decay.

    With g_k the gradient and d_k = g_k - g_{k-1} (d_1 = 0), the paper's Algorithm 1 reads, the
    coefficients written as decay rates b_i = 1 - beta_i:

        m_k = b1 m_{k-1} + (1 - b1) g_k
        v_k = b2 v_{k-1} + (1 - b2) d_k
        n_k = b3 n_{k-1} + (1 - b3) (g_k + b2 d_k)^2
        theta_k = (theta_{k-1} - lr (m_k' + b2 v_k') / (sqrt(n_k') + eps)) / (1 + lr weight_decay)

    where ' divides by 1 - b_i^k.

    Args:
        params: parameters or parameter groups.
        lr: step size.
        betas: (b1, b2, b3), each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled decay coefficient.
        max_grad_norm: clip the gradient to this global norm first; 0 does not clip.
        no_prox: multiply by (1 - lr weight_decay) before the step, as AdamW does, instead of
            the proximal division after it.
        foreach: accepted for configs written for other implementations; has no effect.

    Raises:
        ValueError: if a coefficient is outside its range.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        no_prox: bool = False,
        foreach: bool = True,
    ) -> None:
        if len(betas) != 3 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"Adan betas are {tuple(betas)}; expected three numbers in [0, 1).")
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay),
                            ("max_grad_norm", max_grad_norm)):
            if value < 0.0:
                raise ValueError(f"Adan {name} is {value}; expected a number >= 0.")
        defaults = dict(
            lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay,
            max_grad_norm=max_grad_norm, no_prox=no_prox, foreach=foreach,
        )
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step; returns the closure's loss, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale = self._clip_scale()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    grad = param.grad if scale is None else param.grad * scale
                    self._update(param, grad, group)
        return loss

    def _clip_scale(self) -> Tensor | None:
        max_norm = self.defaults["max_grad_norm"]
        grads = [p.grad for group in self.param_groups for p in group["params"]
                 if p.grad is not None]
        if max_norm == 0.0 or not grads:
            return None
        norm = torch.nn.utils.get_total_norm(grads)
        return torch.clamp(max_norm / (norm + self.defaults["eps"]), max=1.0)

    def _update(self, param: Tensor, grad: Tensor, group: dict) -> None:
        state = self.state[param]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_diff"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
            state["previous_grad"] = grad.clone()
        state["step"] += 1
        b1, b2, b3 = group["betas"]
        diff = grad - state["previous_grad"]
        state["previous_grad"].copy_(grad)
        state["exp_avg"].lerp_(grad, 1 - b1)
        state["exp_avg_diff"].lerp_(diff, 1 - b2)
        nesterov = grad + b2 * diff
        state["exp_avg_sq"].mul_(b3).addcmul_(nesterov, nesterov, value=1 - b3)

        c1, c2, c3 = (1 - beta ** state["step"] for beta in (b1, b2, b3))
        update = state["exp_avg"] / c1 + state["exp_avg_diff"] * (b2 / c2)
        update /= (state["exp_avg_sq"] / c3).sqrt_().add_(group["eps"])
        decay = group["lr"] * group["weight_decay"]
        if group["no_prox"]:
            param.mul_(1 - decay).add_(update, alpha=-group["lr"])
        else:
            param.add_(update, alpha=-group["lr"]).div_(1 + decay)
