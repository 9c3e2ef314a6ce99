"""torch.compile, torch.export, AOTInductor and autocast around the ops and accelerated networks."""

import copy

import pytest
import torch
from cases import Case, assert_right, double, image, randn, slow_if, weights
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import fasternet_kernels as fk

OPS = torch.ops.fasternet_kernels


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def small_model(seed=0, **kwargs):
    """A FasterNet with every kind of layer, small enough to compile in seconds."""
    torch.manual_seed(seed)
    model = fk.models.FasterNet(
        embed_dim=16, depths=(1, 1), num_classes=7, feature_dim=24, **kwargs
    )
    for name, t in model.state_dict().items():
        if name.endswith("running_mean"):
            t.normal_(0, 0.1)
        elif name.endswith("running_var"):
            t.uniform_(0.5, 1.5)
    return model.eval()


def public_calls(w):
    return {
        "pconv3x3": lambda x: fk.pconv3x3(x, w["w_partial"]),
        "pconv_pw": lambda x: fk.pconv_pw(
            x, w["w_partial"], w["w_pw1"], w["scale"], w["shift"], "gelu"
        ),
        "block": lambda x: fk.fasternet_block(
            x,
            w["w_partial"],
            w["w_pw1"],
            w["w_pw2"],
            w["scale"],
            w["shift"],
            "gelu",
            w["layer_scale"],
        ),
        "in_place": lambda x: fk.pconv3x3_(x * 2, w["w_partial"]),
    }


@pytest.mark.parametrize("name", public_calls(weights(Case(1, 16, 1, 1))))
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_functions_compile_fullgraph(name, grad, dynamic):
    """Same values, strides and gradients; with dynamic shapes one graph serves every batch."""
    w = {
        k: v.requires_grad_(grad) if k.startswith("w_") else v
        for k, v in weights(Case(1, 16, 1, 1)).items()
    }
    call = public_calls(w)[name]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    frames = []
    for batch in (2, 3, 5):
        x = image(Case(batch, 16, 5, 6)).requires_grad_(grad)
        expected, got = call(x), compiled(x)
        assert torch.equal(got, expected) and got.stride() == expected.stride()
        if grad:
            leaves = [x, *(v for v in w.values() if v.requires_grad)]
            g = randn(*got.shape, seed=3)
            for a, b in zip(
                torch.autograd.grad(got, leaves, g, allow_unused=True),
                torch.autograd.grad(expected, leaves, g, allow_unused=True),
            ):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(a, b)
        frames.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    if dynamic:
        assert frames[-1] == frames[0], "a new batch size compiled a new graph"


def assert_near(got, model, *inputs):
    """``got`` is right for ``model``, which is eager and not accelerated."""
    with torch.no_grad():
        eager = model(*inputs)
        exact = copy.deepcopy(model).double()(*double(inputs))
    assert_right(got.detach(), exact, eager)


@pytest.mark.parametrize("mode", slow_if(lambda i, _: i == 1, ["inference", "eval_grad", "train"]))
def test_accelerated_network_compiles_fullgraph(mode):
    eager = small_model()
    model = fk.accelerate(copy.deepcopy(eager))
    model.train(mode == "train")
    eager.train(mode == "train")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.set_grad_enabled(mode != "inference"):
        for batch in (2, 3):
            x = randn(batch, 3, 64, 96, seed=batch)
            y, expected = compiled(x), eager(x)
            torch.testing.assert_close(y, expected)
            if mode == "inference":
                assert_near(y, eager, x)
            else:
                y.square().sum().backward()
                expected.square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), eager.parameters()):
        if mode != "inference":
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4, msg=name)
    for (name, a), b in zip(model.named_buffers(), eager.buffers()):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize(
    "mode", slow_if(lambda i, _: i % 2, ["inference", "eval_grad", "train", "lean"])
)
def test_compiled_graphs_hold_the_fused_ops(mode):
    """Not the modules that they stand for: right answers alone would not tell."""
    model = fk.accelerate(small_model(), lean=mode == "lean")
    blocks = sum(row.kind == "block" for row in fk.report(model).swapped)
    model.train(mode in ("train", "lean"))
    called = {"forward": [], "backward": []}

    def compiler(which):
        def compile_graph(graph, inputs):
            called[which] += [str(n.target).removesuffix(".default") for n in graph.graph.nodes]
            return make_boxed_func(graph)

        return compile_graph

    backend = aot_autograd(fw_compiler=compiler("forward"), bw_compiler=compiler("backward"))
    with torch.set_grad_enabled(mode != "inference"):
        y = torch.compile(model, fullgraph=True, backend=backend)(randn(2, 3, 64, 64, seed=1))
    if mode != "inference":
        y.sum().backward()
    expected = {
        "inference": ["block_packed"],
        "eval_grad": ["block", "block_backward"],
        "train": ["pw_stats", "act_pw_residual", "act_pw_residual_backward", "pw_stats_backward"],
        "lean": ["pw_stats", "act_pw_residual_recompute_backward", "pw_stats_backward"],
    }[mode]
    for op in expected:
        where = "backward" if op.endswith("backward") else "forward"
        assert called[where].count(f"fasternet_kernels.{op}") == blocks, op
        assert (
            f"fasternet_kernels.{op}" not in called[{"forward": "backward"}.get(where, "forward")]
        )


def test_compiled_network_sees_new_weights():
    """Packing is part of the graph, so a compiled network follows every edit."""
    eager = small_model()
    model = fk.accelerate(copy.deepcopy(eager))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = randn(1, 3, 64, 64, seed=1)
    with torch.no_grad():
        before = compiled(x)
        for p in (*model.parameters(), *eager.parameters()):
            p.data.mul_(1.25)  # even through .data
        after = compiled(x)
        assert_near(after, eager, x)
        assert_near(fk.repack(model)(x), eager, x)
        assert not torch.allclose(before, after)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_export_round_trip(dynamic, tmp_path):
    eager = small_model()
    model = fk.accelerate(copy.deepcopy(eager))
    x = randn(2, 3, 64, 96, seed=1)
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=64)}} if dynamic else None
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=shapes)
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        assert_near(loaded(x), eager, x)
        if dynamic:
            y = randn(5, 3, 64, 96, seed=2)
            assert_near(loaded(y), eager, y)
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"fasternet_kernels.pack.default", "fasternet_kernels.block_packed.default"} <= targets


def test_every_forward_op_exports(tmp_path):
    """Each public function and module survives export, save and load."""
    w = weights(Case(1, 16, 1, 1))

    class Calls(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pconv = fk.PConv(16)
            self.pconv_pw = fk.PConvPW(16, 24)
            self.block = fk.FasterNetBlock(16, act="gelu", layer_scale_init_value=0.5)

        def forward(self, x):
            y = self.pconv(x) * 1.0
            if (
                not torch.is_grad_enabled()
            ):  # export drops autograd.Functions, and with it gradients
                y = fk.pconv3x3_(y, w["w_partial"])
            z = fk.fasternet_block(
                self.block(y), w["w_partial"], w["w_pw1"], w["w_pw2"], act="silu"
            )
            return self.pconv_pw(z), fk.pconv_pw(z, w["w_partial"], w["w_pw1"], act="hardswish")

    calls = Calls().eval()
    x = image(Case(2, 16, 5, 7))
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            program = torch.export.export(calls, (x,))
            torch.export.save(program, tmp_path / "calls.pt2")
            for got, expected in zip(
                torch.export.load(tmp_path / "calls.pt2").module()(x), calls(x)
            ):
                torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("op", [name for name in fk.ops.SCHEMAS if name != "pconv3x3_"])
def test_every_op_compiles_fullgraph(op):
    from test_ops import OPCHECK

    function = getattr(OPS, op)
    args = OPCHECK[op][0]
    compiled = torch.compile(lambda *a: function(*a), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        got, expected = compiled(*args), function(*args)
    got, expected = ([r] if isinstance(r, torch.Tensor) else list(r) for r in (got, expected))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()


@pytest.mark.slow
def test_inductor_with_freezing():
    """Inductor runs the same ops; freezing folds the packs into constants."""
    import torch._inductor.config as config

    eager = small_model()
    model = fk.accelerate(copy.deepcopy(eager))
    x = randn(2, 3, 64, 64, seed=1)
    with torch.no_grad():
        assert_near(torch.compile(model, fullgraph=True)(x), eager, x)
        torch.compiler.reset()
        with config.patch(freezing=True):
            assert_near(torch.compile(model, fullgraph=True)(x), eager, x)


@pytest.mark.slow
def test_aot_inductor(tmp_path):
    eager = small_model()
    model = fk.accelerate(copy.deepcopy(eager))
    x = randn(2, 3, 64, 64, seed=1)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        path = str(tmp_path / "model.pt2")
        path = torch._inductor.aoti_compile_and_package(program, package_path=path)
        assert_near(torch._inductor.aoti_load_package(path)(x), eager, x)


# ---- Autocast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_functions_under_autocast(x_dtype, grad):
    """Weights and operands in bfloat16, residual and result as eager promotes them."""
    case = Case(2, 16, 5, 6, act="gelu")
    x, w = image(case, x_dtype), weights(case)
    leaves = [t.requires_grad_(grad) for t in (x, w["w_partial"], w["w_pw1"], w["w_pw2"])]

    def eager(x, partial, pw1, pw2, act="gelu"):
        conv = torch.nn.functional.conv2d
        u = torch.cat((conv(x[:, :4], partial, padding=1), x[:, 4:]), dim=1)
        z = torch.nn.functional.batch_norm(
            conv(u, pw1), torch.zeros(32), torch.ones(32), w["scale"], w["shift"], eps=0.0
        )
        return x + conv(torch.nn.functional.gelu(z), pw2)

    with torch.autocast("cpu", torch.bfloat16):
        y = fk.fasternet_block(*leaves, w["scale"], w["shift"], "gelu")
        rival = eager(*leaves)
        compiled = torch.compile(
            lambda *a: fk.fasternet_block(*a, w["scale"], w["shift"], "gelu"),
            fullgraph=True,
            backend="aot_eager",
        )(*leaves)
        z = fk.pconv_pw(x, w["w_partial"], w["w_pw1"])
    assert y.dtype == rival.dtype and z.dtype == torch.bfloat16 and torch.equal(compiled, y)
    exact_leaves = [t.detach().double().requires_grad_(grad) for t in leaves]
    w["scale"], w["shift"] = double([w["scale"], w["shift"]])
    exact = fk.fasternet_block(*exact_leaves, w["scale"], w["shift"], "gelu")
    assert_right(y.detach(), exact.detach(), rival.detach())
    if grad:
        g = randn(*y.shape, seed=5)
        ours = torch.autograd.grad(y, leaves, g.to(y.dtype))
        theirs = torch.autograd.grad(rival, leaves, g.to(y.dtype))
        for a, e, r in zip(
            ours, torch.autograd.grad(exact, exact_leaves, g.to(y.dtype).double()), theirs
        ):
            assert_right(a, e, r)
