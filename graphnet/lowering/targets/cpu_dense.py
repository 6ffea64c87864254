"""Linear layers and losses of the cpu target, each in one call with what follows it."""

from __future__ import annotations

from typing import Any

import torch

from graphnet.ir.graph import Eqn
from graphnet.lowering.targets.cpu_task import Call, Env, Slot, Task

_aten: Any = torch.ops.aten


def linear_relu(eqn: Eqn, relu: Eqn) -> Task:
    dtype = relu.out.type.dtype.torch

    def make(slot: Slot) -> Call:
        ins, at = [slot(v) for v in eqn.inputs], slot(relu.out)

        def call(env: Env) -> None:
            x, w, *rest = (env[i] for i in ins)
            bias = rest[0].to(x.dtype) if rest else None
            env[at] = torch.nn.functional.linear(x, w, bias).relu_().to(dtype)

        return call

    return Task(eqn.inputs, (relu.out,), make, (eqn, relu))


def cross_entropy(loss: Eqn, grad: Eqn) -> Task:
    """The loss and its gradient from one log-softmax of the live rows."""
    smoothing = loss.attrs.label_smoothing  # type: ignore[attr-defined]
    of_all = loss.inputs[3:]  # the live rows of all ranks
    dtype, mean, ignored = loss.inputs[0].type.dtype.torch, 1, -100
    one = torch.ones((), dtype=dtype)

    def make(slot: Slot) -> Call:
        iz, il, iv, *ia = (slot(v) for v in loss.inputs)
        ol, og = slot(loss.out), slot(grad.out)

        def call(env: Env) -> None:
            z, labels, live = env[iz], env[il], int(env[iv])
            rows, (n, classes) = labels[:live], z.shape
            if not live:
                env[ol], env[og] = z.new_zeros(()), torch.zeros_like(z)
                return
            logp = torch.log_softmax(z[:live], 1)
            nll, count = _aten.nll_loss_forward(logp, rows, None, mean, ignored)
            g = _aten.nll_loss_backward(one, logp, rows, None, mean, ignored, count)
            if smoothing:
                nll = (1.0 - smoothing) * nll - logp.mean() * smoothing
                g.mul_(1.0 - smoothing).sub_(smoothing / (classes * live))
            g = _aten._log_softmax_backward_data(g, logp, 1, dtype)
            if of_all and (rows_of_all := int(env[ia[0]])) != live:
                nll, g = nll * (live / rows_of_all), g.mul_(live / rows_of_all)
            env[ol] = nll
            env[og] = g if live == n else torch.cat((g, g.new_zeros(n - live, classes)))

        return call

    return Task(loss.inputs, (loss.out, grad.out), make, (loss, grad))
