"""Callers that do more than call: transforms, tracers, other modes, other threads. A fused forward
that cannot serve one steps aside or says so; it never drops anything without a word."""

import copy
import threading

import pytest
import torch
import wild
from cases import Case, image, randn, weights
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import fasternet_kernels as fk


def twins():
    """(plain, fast) small networks in float64 and eval mode, with the same weights."""
    plain = fk.models.FasterNet(embed_dim=16, depths=(1, 1), num_classes=7, feature_dim=24)
    plain = wild.randomise(plain).double().eval()
    return plain, fk.accelerate(copy.deepcopy(plain))


X = randn(2, 3, 32, 48, seed=5, dtype=torch.float64)


def near(a, b):
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_forward_mode_differentiation():
    """Modules run unfused and keep the tangent; the functions refuse."""
    plain, fast = twins()
    for p in (*plain.parameters(), *fast.parameters()):
        p.requires_grad_(False)
    direction = randn(*X.shape, seed=6, dtype=torch.float64)
    for a, b in zip(
        torch.func.jvp(fast, (X,), (direction,)), torch.func.jvp(plain, (X,), (direction,))
    ):
        near(a, b)
    w = weights(Case(1, 16, 1, 1))
    calls = {
        "pconv3x3": lambda x: fk.pconv3x3(x, w["w_partial"]),
        "pconv3x3_": lambda x: fk.pconv3x3_(x, w["w_partial"]),
        "pconv_pw": lambda x: fk.pconv_pw(x, w["w_partial"], w["w_pw1"]),
        "block": lambda x: fk.fasternet_block(x, w["w_partial"], w["w_pw1"], w["w_pw2"]),
    }
    for call in calls.values():
        with forward_ad.dual_level():
            x = image(Case(1, 16, 4, 4))
            with pytest.raises(RuntimeError, match="forward-mode"):
                call(forward_ad.make_dual(x, torch.ones_like(x)))


def test_functional_transforms():
    plain, fast = twins()
    with torch.no_grad():
        near(torch.func.vmap(fast)(X[:, None]), torch.func.vmap(plain)(X[:, None]))
    state = dict(fast.named_parameters())

    def loss(model):
        return lambda p: torch.func.functional_call(model, p, (X,)).square().sum()

    ours, theirs = torch.func.grad(loss(fast))(state), torch.func.grad(loss(plain))(state)
    for name, gradient in theirs.items():
        near(ours[name], gradient)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_jit_trace(grad):
    plain, fast = twins()
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(fast, X)
        near(traced(X.flip(0)), plain(X.flip(0)))
        near(fast(X), plain(X))


def test_fake_tensors_leave_nothing_behind():
    plain, fast = twins()
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert fast(mode.from_tensor(X)).shape == (2, 7)
        make_fx(fast, tracing_mode="fake", _allow_non_fake_inputs=True)(X)
        y = fast(X)
        assert type(y) is torch.Tensor
        near(y, plain(X))


def test_shallow_copies_run_their_own_modules():
    """copy.copy and DataParallel's replicas share children with the model they came from."""
    plain, fast = twins()
    with torch.no_grad():
        near(fast(X), plain(X))
        near(copy.copy(fast)(X), plain(X))
        replica = fast._replicate_for_data_parallel()
        near(replica(X), plain(X))


@pytest.mark.parametrize("arguments", [{"x": X}, {"x": X, "extra": True}], ids=["keyword", "more"])
def test_other_signatures(arguments):
    class Network(fk.models.FasterNet):
        def forward(self, x, extra=False):
            return super().forward(x) * (3 if extra else 1)

    plain = Network(embed_dim=16, depths=(1, 1), num_classes=7, feature_dim=24)
    plain = wild.randomise(plain).double().eval()
    fast = fk.accelerate(copy.deepcopy(plain))
    assert any(row.kind == "network" for row in fk.report(fast).swapped)
    with torch.no_grad():
        near(fast(**arguments), plain(**arguments))


class Padding(fk.models.FasterNet):
    def forward(self, x):
        return super().forward(nn.functional.pad(x, (0, -x.shape[3] % 8, 0, -x.shape[2] % 8)))


class Clamping(fk.models.FasterNet):
    def forward(self, x):
        return super().forward(x.clamp(-10, 10))


@pytest.mark.parametrize("network", [Padding, Clamping])
def test_what_a_network_does_besides_its_chain_is_seen(network):
    plain = network(embed_dim=16, depths=(1, 1), num_classes=7, feature_dim=24)
    plain = wild.randomise(plain).double().eval()
    fast = fk.accelerate(copy.deepcopy(plain))
    assert [row.kind for row in fk.report(fast).refused] == ["network"]
    x = 100 * randn(1, 3, 33, 29, seed=7, dtype=torch.float64)
    with torch.no_grad():
        near(fast(x), plain(x))


def test_a_network_that_cannot_run_as_one_op_is_refused():
    class TwoPools(fk.models.FasterNet):
        def forward_head(self, x, pre_logits=False):
            x = torch.cat((x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)), dim=1)
            return self.classifier(self.act(self.conv_head(x)).flatten(1))

    plain = TwoPools(embed_dim=16, depths=(1, 1), num_classes=7, feature_dim=24)
    plain.conv_head = nn.Conv2d(64, 24, 1, bias=False)
    plain = wild.randomise(plain).double().eval()
    fast = fk.accelerate(copy.deepcopy(plain))
    assert [row.kind for row in fk.report(fast).refused] == ["network"]
    with torch.no_grad():
        near(fast(X), plain(X))


def test_an_in_place_call_is_counted():
    """Autograd notices that a tensor saved for backward has been overwritten."""
    x, w = image(Case(1, 16, 5, 5)), weights(Case(1, 16, 1, 1))
    leaf = w["w_pw1"].clone().requires_grad_()
    y = nn.functional.conv2d(x, leaf)
    version = x._version
    fk.pconv3x3_(x, w["w_partial"])
    assert x._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_raw_in_place_op_refuses_gradients():
    x, w = image(Case(1, 16, 5, 5)), weights(Case(1, 16, 1, 1))["w_partial"].requires_grad_()
    before = x.clone()
    with pytest.raises(RuntimeError, match="the raw op carries no gradient"):
        torch.ops.fasternet_kernels.pconv3x3_(x, w)
    assert torch.equal(x, before)


def test_python_threads_with_and_without_gradients():
    """One thread drops packs while another uses them: both stay right."""
    plain, fast = twins()
    expected = plain(X).detach()
    failures = []

    def call(grad):
        try:
            for _ in range(40):
                with torch.set_grad_enabled(grad):
                    near(fast(X).detach(), expected)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=call, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_images_smaller_than_a_patch():
    plain, fast = twins()
    for x in (X[:, :, :3], X[:, :, :6, :6]):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                with pytest.raises(RuntimeError):
                    plain(x)
                with pytest.raises(ValueError, match="expected at least one patch"):
                    fast(x)


class Gain(fk.models.FasterNet):
    """A network whose forward reads a default of its class."""

    gain = 1.0

    def forward(self, x):
        return super().forward(x) * self.gain


class GainBlock(fk.models.Block):
    gain = 1.0

    def forward(self, x):
        return super().forward(x) * self.gain


def test_attributes_that_a_forward_reads():
    """Set after accelerate, on a network and on a block: the answer follows."""
    plain = Gain(embed_dim=16, depths=(1, 1), num_classes=7, feature_dim=24)
    plain.stages[0].blocks[0] = GainBlock(16, 4, 2.0, 0.0, 0.0, "relu")
    plain = wild.randomise(plain).double().eval()
    fast = fk.accelerate(copy.deepcopy(plain))
    assert any(row.kind == "network" for row in fk.report(fast).swapped)
    with torch.no_grad():
        near(fast(X), plain(X))
        for at in (lambda m: m.stages[0].blocks[0], lambda m: m):
            at(plain).gain = at(fast).gain = 3.0
            for _ in range(2):
                near(fast(X), plain(X))
