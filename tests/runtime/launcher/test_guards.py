from types import SimpleNamespace

import pytest
import torch
from threestudio.launcher.guards import NonFiniteGuard, SeedGlobalGenerators
from threestudio.utils.checkpoint_schedule import NonFiniteError

TRAINER = SimpleNamespace(
    global_step=7, world_size=1, precision_plugin=SimpleNamespace(scaler=None)
)
MODULE = SimpleNamespace(_last_logged={"train/loss_sds": torch.tensor(float("nan")),
                                       "train/loss_sparsity": 0.25})


def step(guard, loss=1.0, grad=1.0, trainer=TRAINER):
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([{"params": [param]}, {"params": [torch.nn.Parameter(
        torch.ones(1))]}], lr=0.1)
    guard.on_before_backward(trainer, MODULE, torch.tensor(loss))
    param.grad = torch.tensor([0.0, grad, 0.0])
    guard.on_before_optimizer_step(trainer, MODULE, optimizer)
    optimizer.step()
    return param.detach()


def test_finite_steps_pass():
    assert step(NonFiniteGuard()).tolist() == pytest.approx([1.0, 0.9, 1.0])


@pytest.mark.parametrize("bad", [{"loss": float("nan")}, {"loss": float("inf")},
                                 {"grad": float("nan")}, {"grad": -float("inf")}])
def test_a_fault_names_the_step_and_the_terms(bad):
    with pytest.raises(NonFiniteError, match=(
            r"not finite at step 7; the update was not made\. Loss terms: train/loss_sds=nan, "
            r"train/loss_sparsity=0\.25\. Lower their weights")):
        step(NonFiniteGuard(), **bad)


def test_skipping_is_counted_and_limited():
    guard = NonFiniteGuard("skip", max_skips=2)
    for _ in range(2):
        assert step(guard, loss=float("nan")).tolist() == [1.0, 1.0, 1.0]
    assert step(guard)[1] < 1
    with pytest.raises(NonFiniteError, match="It was update 3 to be left out"):
        step(guard, grad=float("nan"))


def test_a_fault_of_another_rank_is_ours():
    strategy = SimpleNamespace(
        root_device=torch.device("cpu"), reduce=lambda bad, reduce_op: bad + 1.0
    )
    trainer = SimpleNamespace(**{**vars(TRAINER), "world_size": 2, "strategy": strategy})
    assert torch.equal(step(NonFiniteGuard("skip"), trainer=trainer), torch.ones(3))


def test_a_gradient_scaler_looks_after_gradients_but_not_after_the_loss():
    scaler = SimpleNamespace(scaler=object())
    scaled = SimpleNamespace(**{**vars(TRAINER), "precision_plugin": scaler})
    step(NonFiniteGuard(), grad=float("inf"), trainer=scaled)
    with pytest.raises(NonFiniteError):
        step(NonFiniteGuard(), loss=float("inf"), trainer=scaled)


def test_terms_that_were_never_logged():
    guard = NonFiniteGuard()
    guard.on_before_backward(TRAINER, object(), torch.tensor(float("nan")))
    with pytest.raises(NonFiniteError, match="Loss terms: none was logged"):
        guard.on_before_optimizer_step(TRAINER, object(), torch.optim.SGD(
            [torch.nn.Parameter(torch.ones(1))], lr=0.1))


def test_unknown_policy():
    with pytest.raises(ValueError, match=r"non_finite_policy is 'warn'; expected 'stop' or 'skip'"):
        NonFiniteGuard("warn")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_device_the_update_is_skipped_and_reported_later():
    guard, param = NonFiniteGuard(), torch.nn.Parameter(torch.ones(3, device="cuda"))
    optimizer = torch.optim.Adam([param], lr=0.1, fused=True)
    guard.on_before_backward(TRAINER, MODULE, torch.tensor(1.0, device="cuda"))
    param.grad = torch.full_like(param, float("nan"))
    guard.on_before_optimizer_step(TRAINER, MODULE, optimizer)
    optimizer.step()
    assert param.tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(NonFiniteError):
        guard.on_train_end(TRAINER, MODULE)


def test_each_batch_and_step_has_its_own_global_stream():
    seeds = SeedGlobalGenerators(None)

    def draw(hook, global_step, *args):
        getattr(seeds, hook)(SimpleNamespace(global_step=global_step), None, *args)
        return float(torch.rand(()))

    # The batch drawn after step k - 1 is that of step k + 1 (one batch ahead).
    assert draw("on_train_batch_end", 4, None, None, 0) == draw("on_train_start", 4)
    assert draw("on_train_batch_end", 4, None, None, 0) == draw("on_validation_end", 4)
    assert draw("on_train_batch_start", 4, None, 0) != draw("on_train_batch_start", 5, None, 0)
    assert draw("on_train_batch_start", 4, None, 0) != draw("on_train_start", 3)
    assert draw("on_validation_start", 4) != draw("on_test_start", 4)
