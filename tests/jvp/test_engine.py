"""What `jvp` promises beside its numbers: errors, sharing, and that nothing outlives the call."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils.checkpoint import checkpoint

from spryfl.jvp import jvp, rule_for
from spryfl.jvp.dual import Dual, promoted
from spryfl.jvp.memory import pool
from spryfl.jvp.registry import OWN, Op

X = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64).view(3, 4)
W = torch.linspace(-0.7, 0.9, 20, dtype=torch.float64).view(5, 4)


def difference(f, params, d, k: int, eps: float = 1e-5) -> Tensor:
    """Central difference of f itself along direction k."""
    up, down = ({n: p + s * d[n][k] if n in d else p for n, p in params.items()} for s in (eps, -eps))
    return (f(up) - f(down)) / (2 * eps)


def directions(params, k: int = 3):
    return {n: torch.randn(k, *p.shape, dtype=p.dtype) for n, p in params.items()}


def agrees(f, params, k: int = 3, rtol: float = 1e-6) -> None:
    d = directions(params, k)
    value, tangents = jvp(f, params, d)
    torch.testing.assert_close(value, f(params))
    expected = torch.stack([difference(f, params, d, i) for i in range(k)])
    torch.testing.assert_close(tangents, expected, rtol=rtol, atol=1e-8)
    assert tangents.abs().max() > 1e-3


# --- arguments


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        ({}, "directions is empty"),
        ({"v": torch.ones(1, 5, 4).double()}, "that params lacks: v"),
        ({"w": torch.ones(5, 4).double()}, "K >= 1"),
        ({"w": torch.ones(0, 5, 4).double()}, "K >= 1"),
        ({"w": torch.ones(2, 5, 4).double(), "x": torch.ones(3, 3, 4).double()}, "the same for all names"),
        ({"i": torch.ones(1, 2)}, "only floating-point"),
    ],
)
def test_bad_directions(directions, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jvp(lambda p: p["x"].sum(), {"w": W, "x": X, "i": torch.ones(2, dtype=torch.long)}, directions)


def test_bad_chunk_output_and_nesting() -> None:
    d = {"w": torch.ones(2, 5, 4).double()}
    with pytest.raises(ValueError, match="chunk = 0"):
        jvp(lambda p: p["w"].sum(), {"w": W}, d, chunk=0)
    with pytest.raises(ValueError, match="f returned dict"):
        jvp(lambda p: {"a": p["w"]}, {"w": W}, d)
    with pytest.raises(ValueError, match="second derivatives"):
        jvp(lambda p: jvp(lambda q: q["w"].sum(), p, d)[0], {"w": W}, d)


# --- values and tangents


def test_basis_directions_give_the_gradient() -> None:
    w = W.clone().requires_grad_()
    loss = lambda p: F.gelu(X @ p["w"].t()).square().mean()  # noqa: E731
    (gradient,) = torch.autograd.grad(loss({"w": w}), w)
    _, tangents = jvp(loss, {"w": W}, {"w": torch.eye(20, dtype=torch.float64).view(20, 5, 4)})
    torch.testing.assert_close(tangents.view(5, 4), gradient, rtol=1e-12, atol=1e-12)


def test_tuples_and_outputs_that_do_not_depend() -> None:
    d = {"w": torch.randn(2, 5, 4).double()}
    (a, b, c), (da, db, dc) = jvp(lambda p: (p["w"].sum(), X + 1, p["w"] > 0), {"w": W}, d)
    torch.testing.assert_close((a, da), (W.sum(), d["w"].sum((1, 2))))
    torch.testing.assert_close((b, db), (X + 1, torch.zeros(2, 3, 4).double()))
    assert c.dtype == torch.bool
    assert dc.shape == (2, 5, 4)


def test_chunks_agree_and_share_one_run() -> None:
    runs = []
    params, d = {"w": W}, {"w": torch.randn(5, 5, 4).double()}

    def f(p):
        runs.append(1)
        return torch.tanh(X @ p["w"].t())

    whole = jvp(f, params, d)
    assert len(runs) == 1
    torch.testing.assert_close(jvp(f, params, d, chunk=2), whole, rtol=0, atol=0)
    assert len(runs) == 1 + 3


def test_stages_compose() -> None:
    """The tangents of one stage are the directions of the next: the cut that an exact head or a kept prefix needs."""
    params = {"a": W, "b": torch.randn(2, 5).double()}
    d = directions(params)
    lower = lambda p: torch.tanh(F.linear(X, p["a"]))  # noqa: E731
    upper = lambda p: F.softmax(F.linear(p["h"], p["b"]), -1)  # noqa: E731
    h, dh = jvp(lower, {"a": W}, {"a": d["a"]})
    staged = jvp(upper, {"h": h, "b": params["b"]}, {"h": dh, "b": d["b"]})
    whole = jvp(lambda p: upper({"h": lower(p), "b": p["b"]}), params, d)
    torch.testing.assert_close(staged, whole, rtol=1e-12, atol=1e-12)


def test_what_precedes_the_perturbed_unit_stays_plain() -> None:
    layers = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    seen: list[bool] = []
    layers[1].register_forward_hook(lambda module, args, out: seen.append(isinstance(out, Dual)))
    params = dict(layers.named_parameters())
    jvp(lambda p: functional_call(layers, p, (X,)), params, {"2.weight": torch.ones(1, 2, 4).double()})
    jvp(lambda p: functional_call(layers, p, (X,)), params, {"0.bias": torch.ones(1, 4).double()})
    assert seen == [False, True]


# --- randomness


def seeded(f, seed: int = 7):
    def run(p):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return f(p)

    return run


@pytest.mark.parametrize("k", [1, 3])
def test_dropout_has_one_mask(k: int) -> None:
    heads = {n: torch.randn(2, 2, 6, 4).double() for n in "qkv"}
    f = lambda p: F.dropout(torch.tanh(p["w"]), 0.5, True).sum() ** 2  # noqa: E731
    agrees(seeded(f), {"w": W}, k)
    g = lambda p: F.scaled_dot_product_attention(*p.values(), dropout_p=0.4).square().sum()  # noqa: E731
    agrees(seeded(g), heads, k)
    h = lambda p: F.alpha_dropout(p["w"], 0.5, True).square().sum()  # noqa: E731 - no rule: torch's own forward mode
    agrees(seeded(h), {"w": W}, k)


def test_attention_dropout_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the limit of one mask each block draws its own; the value and all tangents share it still."""
    monkeypatch.setattr("spryfl.jvp.attention.MASK_LIMIT", 1)
    monkeypatch.setattr("spryfl.jvp.attention.BLOCK", 60)
    q = torch.randn(2, 2, 6, 4).double()
    f = seeded(lambda p: F.scaled_dot_product_attention(p["q"], p["q"], q, dropout_p=0.4).square().sum())
    params = {"q": torch.randn(2, 2, 6, 4).double()}
    d = directions(params)
    value = lambda p: jvp(f, p, d)[0]  # noqa: E731
    torch.testing.assert_close(jvp(f, params, d)[1], torch.stack([difference(value, params, d, k) for k in range(3)]))


# --- in place


def accumulate(p):
    total = torch.zeros(3, 5, dtype=torch.float64)
    total[:, :2] = F.linear(X, p["w"])[:, :2]
    total.index_add_(1, torch.tensor([3, 4]), F.linear(X, p["w"])[:, 2:4])
    total += 1
    return total.square().sum()


def through_a_view(p):
    y = torch.tanh(p["w"])
    y.view(-1)[3:9].mul_(2.0).add_(p["w"].sum())
    y[0] *= p["w"][1]
    y[1].zero_()
    y[2, :2].copy_(p["w"][3, :2])
    return (y**3).sum()


def in_place_modules(p):
    y = nn.Sequential(nn.ReLU(inplace=True), nn.SiLU(inplace=True), nn.Dropout(0.0, inplace=True))(p["w"] * 1.5)
    z = p["w"] * 2
    y = y + z * F.elu(z, 1.0, True) + F.leaky_relu(z, 0.2, inplace=True)
    y = y.masked_fill_(torch.eye(5, 4).bool(), 0.3).clamp_(max=0.8)
    return y.exp_().sum()


def constant_added(p):
    y = p["w"] + X[0]  # its tangent must not be w's own memory
    y.mul_(2)
    return (y * p["w"]).sum()


@pytest.mark.parametrize("f", [accumulate, through_a_view, in_place_modules, constant_added])
@pytest.mark.parametrize("k", [1, 3])
def test_in_place(f, k: int) -> None:
    agrees(f, {"w": W}, k)


# --- what is refused


def test_lost_tangents_are_errors() -> None:
    d = {"w": torch.ones(1, 5, 4).double()}
    with pytest.raises(NotImplementedError, match=r"out= is not supported"):
        jvp(lambda p: torch.add(p["w"], 1, out=torch.zeros(5, 4).double()), {"w": W}, d)
    with pytest.raises(NotImplementedError, match="into a view"):
        jvp(lambda p: torch.zeros(9, 4).double()[:5].copy_(p["w"]), {"w": W}, d)
    with pytest.raises(NotImplementedError, match=r"no forward-mode rule for .*cdist"):
        jvp(lambda p: torch.cdist(p["w"], X), {"w": W}, d)


def test_an_operator_that_drops_its_tangent_is_an_error() -> None:
    """Torch gives no tangent, and no error, for a library's operator without derivatives."""
    with torch.library._scoped_library("spryfl_tests", "FRAGMENT") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x.detach() * 2, "CPU")
        with pytest.raises(NotImplementedError, match=r"no forward-mode rule for .*twice"):
            jvp(lambda p: torch.ops.spryfl_tests.twice(p["w"]), {"w": W}, {"w": torch.ones(1, 5, 4).double()})


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_compiled_code_is_refused() -> None:
    script = torch.jit.script(twice)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"compiled code|TorchScript"):
        jvp(lambda p: script(p["w"]), {"w": W}, {"w": torch.ones(1, 5, 4).double()})


def twice(x: Tensor) -> Tensor:
    return x * 2


def test_the_callers_own_errors_pass() -> None:
    with pytest.raises(RuntimeError, match=r"shape|size|mat1"):
        jvp(lambda p: p["w"] @ p["w"], {"w": W}, {"w": torch.ones(1, 5, 4).double()})
    with pytest.raises(RuntimeError, match="number of columns"):
        jvp(lambda p: torch.cdist(p["w"], X[:, :2]), {"w": W}, {"w": torch.ones(1, 5, 4).double()})


# --- other machinery


class Cube(torch.autograd.Function):
    """A function with no forward-mode rule of its own: its forward is ordinary code, which the engine follows."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x * x

    @staticmethod
    def backward(ctx, g):
        return g * 3 * ctx.saved_tensors[0] ** 2


def test_autograd_functions_checkpointing_and_modes() -> None:
    agrees(lambda p: Cube.apply(p["w"]).sum(), {"w": W})
    agrees(lambda p: checkpoint(torch.tanh, p["w"], use_reentrant=False).sum(), {"w": W})
    agrees(lambda p: p["w"].topk(2, dim=1).values.sum() + p["w"].max(0)[0].square().sum(), {"w": W})
    agrees(lambda p: F.huber_loss(p["w"], W + 0.5), {"w": W})  # torch's own forward mode
    with torch.inference_mode():
        _, tangents = jvp(lambda p: p["w"].square().sum(), {"w": W}, {"w": torch.ones(1, 5, 4).double()})
    torch.testing.assert_close(tangents, 2 * W.sum().view(1))


@pytest.mark.parametrize("norm_first", [False, True])
def test_torch_transformer_layer(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=norm_first).double().eval()
    x = torch.randn(2, 5, 8).double()
    params = {n: p.detach() for n, p in layer.named_parameters()}
    agrees(lambda p: functional_call(layer, p, (x,)).square().sum(), params)


def test_half_precision_and_autocast() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 3))
    x, target = torch.randn(32, 8), torch.randint(0, 3, (32,))
    params = {n: p.detach() for n, p in model.named_parameters()}
    d = directions(params)
    loss = lambda p: F.cross_entropy(functional_call(model, p, (x,)).float(), target)  # noqa: E731
    _, exact = jvp(loss, params, d)

    def mixed(p):
        with torch.autocast("cpu", torch.bfloat16):
            return loss(p)

    half = {n: p.bfloat16() for n, p in params.items()}
    lower = lambda p: F.cross_entropy(functional_call(model, p, (x.bfloat16(),)).float(), target)  # noqa: E731
    for f, at in ((mixed, params), (lower, half)):
        value, tangents = jvp(f, at, d)
        assert value.dtype == tangents.dtype == torch.float32
        torch.testing.assert_close(tangents, exact, rtol=0.05, atol=0.05 * exact.abs().max().item())


# --- after the call


def test_nothing_outlives_the_call() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh()).double().eval()
    names = {n: id(p) for n, p in model.named_parameters()}
    functions = {
        n: id(getattr(F, n)) for n in ("linear", "layer_norm", "scaled_dot_product_attention", "cross_entropy")
    }
    buffer, state = torch.zeros(3, 5).double(), torch.get_rng_state()

    def f(p):
        buffer.copy_(functional_call(model, p, (X,)))
        return buffer.sum()

    params = {n: p.detach() for n, p in model.named_parameters()}
    _, tangents = jvp(f, params, directions(params))
    after = {n: id(p) for n, p in model.named_parameters()}
    assert after == names
    assert functions == {n: id(getattr(F, n)) for n in functions}
    assert type(buffer) is Tensor
    assert not tangents.requires_grad
    assert pool.get() is None
    with pytest.raises(LookupError):
        promoted.get()
    state_after_directions = torch.get_rng_state()
    jvp(f, params, {n: torch.ones(2, *p.shape).double() for n, p in params.items()})
    assert torch.equal(torch.get_rng_state(), state_after_directions)
    assert state.shape == state_after_directions.shape


def test_an_error_inside_leaves_nothing_behind() -> None:
    buffer = torch.zeros(5, 4).double()

    def f(p):
        buffer.add_(p["w"])
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        jvp(f, {"w": W}, {"w": torch.ones(1, 5, 4).double()})
    assert type(buffer) is Tensor
    assert pool.get() is None


class Factor(NamedTuple):
    value: float


def cube(x: torch.Tensor, factor: Factor) -> torch.Tensor:
    """What no tangent could follow: through numpy, and with an argument that is no tensor."""
    if has_torch_function((x,)):
        return handle_torch_function(cube, (x,), x, factor)
    return torch.from_numpy(factor.value * x.detach().numpy() ** 3)


@pytest.mark.parametrize("listed", [False, True])
def test_a_rule_for_a_function_of_ones_own(listed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(OWN, cube, raising=False)

    @rule_for(cube)
    def body(op: Op, x: torch.Tensor, factor: Factor) -> Any:
        slope = 3 * factor.value * x**2
        tangents = [args[0] * slope for args, _ in op.directions]
        return op.func(x, factor), tangents if listed else (lambda d, _: d * slope)

    x, d = torch.randn(4), torch.randn(3, 4)
    found = jvp(lambda p: cube(p["x"].sin(), Factor(2.0)).sum(), {"x": x}, {"x": d})
    truth = jvp(lambda p: (2.0 * p["x"].sin() ** 3).sum(), {"x": x}, {"x": d})
    torch.testing.assert_close(found, truth)
