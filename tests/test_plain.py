"""Estimators in a plain loop: what lands in `.grad` is what `loss.backward()` or autograd's jvp says it must be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spryfl import estimators, noise, plain
from spryfl.hooks import seeded
from spryfl.tree import size


class Net(nn.Module):
    """With a frozen map, a tied one, a buffer and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 4)
        self.out.weight = self.inner.weight
        self.frozen = nn.Linear(3, 4).requires_grad_(False)
        self.drop = nn.Dropout(0.3)
        self.register_buffer("shift", torch.full((4,), 0.1))

    def forward(self, x):
        return self.out(self.drop(torch.tanh(self.inner(self.frozen(x) + self.shift))))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


X = torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(5, 3)
Y = torch.tensor([0, 1, 2, 3, 0])


def loss(module, batch):
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def truth(net, seed) -> dict[str, torch.Tensor]:
    """By PyTorch alone, the dropout masks from the seed."""
    with seeded(seed):
        value = loss(net, (X, Y))
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(value, list(named.values())), strict=True))


def given(net) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_backprop_is_loss_backward(net, training, checkpoint):
    net.train(training)
    made = plain.backward(estimators.backprop(checkpoint), plain.PlainLoss(net, loss), (X, Y), seed=7)
    torch.testing.assert_close(given(net), truth(net, 7), rtol=1e-12, atol=1e-12)
    with seeded(7):
        assert made == pytest.approx(float(loss(net, (X, Y)).detach()), abs=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_as_many_orthogonal_directions_as_values_are_the_gradient(net, training):
    net.train(training)
    loss_fn = plain.PlainLoss(net, loss)
    estimator = estimators.forward(directions=size(loss_fn.params), distribution="orthogonal")
    plain.backward(estimator, loss_fn, (X, Y), seed=3)
    torch.testing.assert_close(given(net), truth(net, 3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["forward", "central_difference", "forward_difference"])
def test_one_direction_is_its_derivative_times_itself(kind, net):
    net.train()
    loss_fn = plain.PlainLoss(net, loss)
    options = {} if kind == "forward" else {"mu": 1e-6}
    plain.backward(estimators.ESTIMATORS[kind](directions=1, **options), loss_fn, (X, Y), seed=11)
    along = noise.direction(noise.child_seed(11, "direction", 0), loss_fn.params)
    slope = sum(float((truth(net, 11)[name] * v).sum()) for name, v in along.items())
    expected = {name: slope * v.double() for name, v in along.items()}
    torch.testing.assert_close(given(net), expected, rtol=1e-4, atol=1e-6)


def test_gradients_add_up_and_the_module_stays(net):
    net.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    loss_fn = plain.PlainLoss(net, loss)
    for seed in (1, 2):
        plain.backward(estimators.backprop(), loss_fn, (X, Y), seed)
    torch.testing.assert_close(given(net), {name: 2 * g for name, g in truth(net, 0).items()})
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert set(given(net)) == {"inner.weight", "inner.bias", "out.bias"}  # what is frozen has none, what is tied one


def test_the_loop_of_torch_optim(net):
    """An optimizer steps along it as along autograd's own gradient."""
    import copy

    net.eval()
    other = copy.deepcopy(net)
    one, two = (torch.optim.Adam(m.parameters(), lr=0.05) for m in (net, other))
    loss_fn = plain.PlainLoss(net, loss)
    for seed in range(5):
        one.zero_grad()
        plain.backward(estimators.backprop(), loss_fn, (X, Y), seed)
        one.step()
        two.zero_grad()
        loss(other, (X, Y)).backward()
        two.step()
    torch.testing.assert_close(net.state_dict(), other.state_dict(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "estimator", [estimators.forward(exact_head=True), estimators.forward(exact_top=1), estimators.two_block()]
)
def test_what_needs_a_cut_is_said(estimator, net):
    with pytest.raises(ValueError, match="a plain loss cannot be cut"):
        plain.backward(estimator, plain.PlainLoss(net, loss), (X, Y), 0)


def test_nothing_to_move_is_said(net):
    with pytest.raises(ValueError, match="nothing to move"):
        plain.backward(estimators.backprop(), plain.PlainLoss(net.requires_grad_(False), loss), (X, Y), 0)
