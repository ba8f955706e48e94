import pytest
import torch
from threestudio.systems.optimizers import Adan


def reference(grads, lr, betas, eps, decay, no_prox, start):
    """The algorithm of the paper, written out in scalars."""
    b1, b2, b3 = betas
    theta, m, v, n, previous = start, 0.0, 0.0, 0.0, grads[0]
    for k, g in enumerate(grads, start=1):
        d = g - previous
        previous = g
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * d
        n = b3 * n + (1 - b3) * (g + b2 * d) ** 2
        m_hat, v_hat, n_hat = m / (1 - b1**k), v / (1 - b2**k), n / (1 - b3**k)
        update = (m_hat + b2 * v_hat) / (n_hat**0.5 + eps)
        if no_prox:
            theta = theta * (1 - lr * decay) - lr * update
        else:
            theta = (theta - lr * update) / (1 + lr * decay)
    return theta


@pytest.mark.parametrize("no_prox", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_follows_the_paper(no_prox, decay):
    grads, start = [0.5, -1.0, 2.0, 0.25], 1.5
    param = torch.nn.Parameter(torch.tensor([start], dtype=torch.float64))
    optimizer = Adan([param], lr=0.1, weight_decay=decay, no_prox=no_prox)
    for grad in grads:
        param.grad = torch.tensor([grad], dtype=torch.float64)
        optimizer.step()
    expected = reference(grads, 0.1, (0.98, 0.92, 0.99), 1e-8, decay, no_prox, start)
    assert param.item() == pytest.approx(expected, rel=1e-12)


def test_first_step_has_the_size_of_the_learning_rate():
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = Adan([param], lr=0.01)
    param.grad = torch.tensor([5.0, -0.1, 1e3])
    optimizer.step()
    assert torch.allclose(param, torch.tensor([-0.01, 0.01, -0.01]))


def test_clipping_scales_all_groups_by_the_global_norm():
    first, second = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = Adan([{"params": [first]}, {"params": [second]}], max_grad_norm=1.0)
    first.grad, second.grad = torch.tensor([3.0]), torch.tensor([4.0])
    optimizer.step()
    assert optimizer.state[first]["previous_grad"].item() == pytest.approx(0.6)
    assert optimizer.state[second]["previous_grad"].item() == pytest.approx(0.8)


def test_minimizes_and_resumes_alike():
    def run(n_steps, state=None, param=None):
        param = torch.nn.Parameter(torch.tensor([3.0, -2.0]) if param is None else param.clone())
        optimizer = Adan([param], lr=0.05)
        if state is not None:
            optimizer.load_state_dict(state)
        for _ in range(n_steps):
            optimizer.zero_grad()
            loss = param.square().sum()
            loss.backward()
            optimizer.step()
        return param.detach(), optimizer.state_dict()

    whole, _ = run(200)
    half, state = run(100)
    assert torch.equal(run(100, state, half)[0], whole)
    assert whole.abs().max() < 0.5


def test_closure_and_missing_gradients():
    used, unused = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = Adan([used, unused])

    def closure():
        loss = (used * 2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2
    assert unused.item() == 1 and used.item() < 1


@pytest.mark.parametrize("args, sentence", [
    ({"betas": (0.9, 0.9)}, r"betas are \(0\.9, 0\.9\); expected three"),
    ({"betas": (0.9, 0.9, 1.0)}, r"expected three numbers in \[0, 1\)"),
    ({"lr": -1.0}, r"Adan lr is -1\.0; expected a number >= 0"),
])
def test_bad_coefficients(args, sentence):
    with pytest.raises(ValueError, match=sentence):
        Adan([torch.nn.Parameter(torch.ones(1))], **args)
