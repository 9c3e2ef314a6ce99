"""PConv, PConvPW and FasterNetBlock against the same parts as plain nn modules; the pack's life.

The plain module of each pair is written out below, with the state_dict keys of ours, and is the
rival and, in float64, the reference.
"""

import copy
import pickle
from functools import partial

import pytest
import torch
import wild
from cases import ACTS, randn
from torch import nn

import fasternet_kernels as fk

C, H, W = 24, 9, 7
ACT_MODULES = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
}


class PlainPConv(nn.Module):
    def __init__(self, dim, n_div=4):
        super().__init__()
        self.partial_conv3 = nn.Conv2d(dim // n_div, dim // n_div, 3, padding=1, bias=False)

    def forward(self, x):
        convolved, untouched = x.tensor_split([self.partial_conv3.in_channels], dim=1)
        return torch.cat((self.partial_conv3(convolved), untouched), dim=1)


class PlainPConvPW(PlainPConv):
    def __init__(self, dim, out_channels, n_div=4, act="relu"):
        super().__init__(dim, n_div)
        self.pw = nn.Conv2d(dim, out_channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.activation = ACT_MODULES[act]()

    def forward(self, x):
        return self.activation(self.bn(self.pw(super().forward(x))))


class PlainBlock(nn.Module):
    def __init__(self, dim, n_div=4, mlp_ratio=2.0, act="relu", drop_path=0.0, layer_scale=0.0):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        # Registered in timm's order, which is the order of the parameters in an optimizer's state.
        self.layer_scale = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale else None
        self.mlp = nn.Sequential(
            nn.Conv2d(dim, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            ACT_MODULES[act](),
            nn.Conv2d(hidden, dim, 1, bias=False),
        )
        self.spatial_mixing = PlainPConv(dim, n_div)
        self.drop_path = wild.DropPath(drop_path)

    def forward(self, x):
        branch = self.mlp(self.spatial_mixing(x))
        if self.layer_scale is not None:
            branch = self.layer_scale[:, None, None] * branch
        return x + self.drop_path(branch)


def block(**kwargs):
    ours = {name: value for name, value in kwargs.items() if name != "layer_scale"}
    if "layer_scale" in kwargs:
        ours["layer_scale_init_value"] = kwargs["layer_scale"]
    return fk.FasterNetBlock(C, **ours), PlainBlock(C, **kwargs)


def pconv_pw(out_channels=40, **kwargs):
    return fk.PConvPW(C, out_channels, **kwargs), PlainPConvPW(C, out_channels, **kwargs)


def pconv(**kwargs):
    return fk.PConv(C, **kwargs), PlainPConv(C, **kwargs)


PAIRS = {
    "pconv": pconv,
    "pconv n_div 1": partial(pconv, n_div=1),
    "pconv n_div 3": partial(pconv, n_div=3),
    "pconv_pw": pconv_pw,
    "pconv_pw narrow": partial(pconv_pw, out_channels=5),
    **{f"pconv_pw {act}": partial(pconv_pw, act=act) for act in ACTS},
    "block": block,
    **{f"block {act}": partial(block, act=act) for act in ACTS},
    "block n_div 2": partial(block, n_div=2),
    "block n_div 3": partial(block, n_div=3),
    "block n_div 8": partial(block, n_div=8),
    "block n_div 24": partial(block, n_div=24),
    "block ratio 3.3": partial(block, mlp_ratio=3.3),
    "block layer_scale": partial(block, layer_scale=0.3, act="gelu"),
    "block drop_path": partial(block, drop_path=0.4, act="gelu"),
    "block all": partial(block, layer_scale=0.3, drop_path=0.4, act="silu"),
}
KINDS = ["pconv", "pconv_pw gelu", "block all"]
PACKING = ["pconv_pw gelu", "block all"]


def pair(name, dtype=None):
    """(ours, plain) with the same random weights, in eval mode."""
    ours, plain = PAIRS[name]()
    wild.randomise(plain).to(dtype).eval()
    ours.to(dtype).eval().load_state_dict(plain.state_dict())
    return ours, plain


def image(batch=3, dtype=torch.float32, seed=1):
    return randn(batch, C, H, W, seed=seed, dtype=dtype)


def norms(*models):
    return [m for model in models for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


# ---- The same as the plain modules ---------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS)
def test_state_dict(name):
    ours, plain = PAIRS[name]()
    assert sorted(ours.state_dict()) == sorted(plain.state_dict())
    for key, value in plain.state_dict().items():
        assert ours.state_dict()[key].shape == value.shape
    assert {n for n, _ in ours.named_parameters()} == {n for n, _ in plain.named_parameters()}
    assert all(p.requires_grad for p in ours.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PAIRS)
def test_eval(name, dtype):
    """On packed weights without gradients, on the raw ones with."""
    ours, plain = pair(name, dtype)
    x = image(dtype=dtype)
    for grad in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with grad():
            wild.assert_agree(ours, plain, x)
            wild.assert_agree(ours, plain, x.to(memory_format=torch.channels_last))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_training_forward(name, grad):
    ours, plain = pair(name)
    ours.train(), plain.train()

    def run(model, x):
        torch.manual_seed(3)
        y = model(x)
        return [y, *(b for b in model.buffers() if b.is_floating_point())]

    with torch.set_grad_enabled(grad):
        wild.assert_agree(ours, plain, image(), run=run)
    assert all(m.num_batches_tracked == 1 for m in norms(ours))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_gradients(name, training):
    """Of x and of every parameter, in float64."""
    ours, plain = pair(name, torch.float64)
    ours.train(training), plain.train(training)
    assert_same_step(ours, plain, image(dtype=torch.float64))


def assert_same_step(ours, plain, x, **kwargs):
    """As wild's, whatever the order of registration."""
    order = list(dict(plain.named_parameters()) | dict(plain.named_buffers()))
    assert sorted(order) == sorted(dict(ours.named_parameters()) | dict(ours.named_buffers()))
    wild.assert_same_step(ours, plain, x, **kwargs)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", PACKING)
def test_gradcheck(name, training):
    ours, _ = pair(name, torch.float64)
    ours.train(training)
    x = image(2, torch.float64)[:, :, :3, :2].clone().requires_grad_()
    names, parameters = zip(*ours.named_parameters())

    def function(x, *values):
        torch.manual_seed(0)
        return torch.func.functional_call(ours, dict(zip(names, values)), (x,))

    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True)


UNUSUAL = {
    "no momentum": lambda m: setattr(m, "momentum", None),
    "all momentum": lambda m: setattr(m, "momentum", 1.0),
    "eps": lambda m: setattr(m, "eps", 0.1),
    "frozen": lambda m: m.eval(),
    "frozen weights": lambda m: m.requires_grad_(False),
}
REPLACED = {
    "no affine": {"affine": False},
    "no statistics": {"track_running_stats": False},
    "neither": {"affine": False, "track_running_stats": False},
    "no bias": {"bias": False},
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("unusual", [*UNUSUAL, *REPLACED])
@pytest.mark.parametrize("name", PACKING)
def test_unusual_norms(name, unusual, training):
    ours, plain = pair(name, torch.float64)
    for model in (ours, plain):
        model.train(training)
        for path, m in list(model.named_modules()):
            if not isinstance(m, nn.BatchNorm2d):
                continue
            if unusual in UNUSUAL:
                UNUSUAL[unusual](m)
            else:
                new = wild.randomise(nn.BatchNorm2d(m.num_features, **REPLACED[unusual]), seed=7)
                parent, _, child = path.rpartition(".")
                setattr(model.get_submodule(parent), child, new.double().train(training))
    for seed in (1, 2):
        x = image(dtype=torch.float64, seed=seed)
        assert_same_step(ours, plain, x)
        plain.load_state_dict(ours.state_dict())
    with torch.no_grad():
        torch.manual_seed(0)
        wild.assert_agree(ours.eval(), plain.eval(), x)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_statistics_that_are_lost_stay_so(value):
    """As in nn.BatchNorm2d: an infinite running statistic does not become a number, or another."""
    models = ours, plain = pair("block")
    for model in models:
        for m in model.train().modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.fill_(value), m.running_var.fill_(abs(value))
        model(image())
    for got, expected in zip(ours.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", PACKING)
def test_sync_batch_norm_in_one_process(name, training):
    ours, plain = pair(name, torch.float64)
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    assert any(type(m) is nn.SyncBatchNorm for m in ours.modules())
    x = image(dtype=torch.float64)
    with torch.no_grad():
        wild.assert_agree(ours, plain, x)
    assert_same_step(ours.train(training), plain.train(training), x)


def test_drop_path_follows_the_seed():
    ours, _ = pair("block drop_path")
    ours.train()
    x = image(8)

    def run(seed):
        torch.manual_seed(seed)
        return ours(x).detach()

    assert torch.equal(run(0), run(0))
    results = [run(seed) for seed in range(8)]
    assert any(not torch.equal(y, results[0]) for y in results)
    # A dropped sample is its input, to the bit; with probability 0.4, some are and some are not.
    dropped = [bool(torch.equal(y[i], x[i])) for y in results for i in range(8)]
    assert any(dropped)
    assert not all(dropped)


# ---- The pack ------------------------------------------------------------------------------------


@pytest.fixture(params=PACKING)
def packed(request):
    """(ours, plain, x): a module with a warm pack."""
    ours, plain = pair(request.param)
    x = image()
    with torch.no_grad():
        ours(x)
    assert ours._pack is not None
    return ours, plain, x


def test_pack_is_kept(packed):
    ours, _, x = packed
    pack = ours._pack[1]
    for grad in (torch.no_grad, torch.inference_mode, torch.no_grad):
        with grad():
            ours(x)
            ours(x[:1])
        assert ours._pack[1] is pack
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours(x)
    assert ours._pack[1] is pack


@pytest.mark.parametrize(
    "event",
    [
        lambda m, x: m.train(),
        lambda m, x: m.eval(),
        lambda m, x: m.to(torch.float32),
        lambda m, x: m.to(memory_format=torch.channels_last),
        lambda m, x: m.half(),
        lambda m, x: m.load_state_dict(m.state_dict()),
        lambda m, x: m(x),
        lambda m, x: fk.repack(m),
    ],
    ids=["train", "eval", "to", "memory_format", "half", "load_state_dict", "grad", "repack"],
)
def test_pack_is_dropped(packed, event):
    ours, _, x = packed
    event(ours, x)
    assert ours._pack is None


@pytest.mark.parametrize("how", ["in place", "new parameter", "functional", "inference_mode"])
def test_pack_follows_the_weights(packed, how):
    """Every parameter and statistic, one after another."""
    ours, plain, x = packed
    state = dict(ours.named_parameters()) | dict(ours.named_buffers())
    for name, t in state.items():
        if not t.is_floating_point():
            continue
        with torch.no_grad():
            old = ours(x)
            value = t * 1.25 + 0.125
            plain.load_state_dict({**ours.state_dict(), name: value})
            run = wild.call
            if how == "functional":
                weights = {name: value}
                run = lambda m, x, w=weights: (  # noqa: E731
                    torch.func.functional_call(m, w, (x,)) if m is ours else m(x)
                )
            elif how == "in place":
                t.copy_(value)
            elif how == "inference_mode":
                with torch.inference_mode():
                    t.copy_(value)
            elif isinstance(t, nn.Parameter):
                parent, _, child = name.rpartition(".")
                setattr(ours.get_submodule(parent), child, nn.Parameter(value))
            else:
                parent, _, child = name.rpartition(".")
                setattr(ours.get_submodule(parent), child, value)
            (got,) = wild.assert_agree(ours, plain, x, f"after a change of {name}:", run)
            assert not torch.equal(got, old)
            if how == "functional":
                assert torch.equal(ours(x), old)


def test_pack_of_a_freed_weight(packed):
    """New weights may lie where the old ones lay: the address alone says nothing."""
    ours, plain, x = packed
    path = next(n for n, p in ours.named_parameters() if p.dim() == 4)
    parent, _, child = path.rpartition(".")
    module = ours.get_submodule(parent)
    shape = getattr(module, child).shape
    for seed in range(8):
        with torch.no_grad():
            ours(x)
            setattr(module, child, None)
            module._parameters[child] = nn.Parameter(torch.full(shape, 0.01 * (seed + 1)))
            plain.load_state_dict(ours.state_dict())
            wild.assert_agree(ours, plain, x)


def test_part_in_half_and_back(packed):
    """Conversions of a child, which the module is not told of."""
    ours, plain, x = packed
    for module in (*ours.modules(), *plain.modules()):
        if not module._modules:
            module.half().float()
    with torch.no_grad():
        wild.assert_agree(ours, plain, x)


def test_fused_optimizer_between_calls(packed):
    ours, plain, x = packed
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1, fused=True)
    ours.train()
    ours(x).square().mean().backward()
    optimizer.step()
    ours.eval()
    plain.load_state_dict(ours.state_dict())
    with torch.no_grad():
        wild.assert_agree(ours, plain, x)


def test_data_edit_needs_repack(packed):
    ours, plain, x = packed
    for t in ours.parameters():
        t.data.mul_(1.25)
    plain.load_state_dict(ours.state_dict())
    assert fk.repack(nn.Sequential(ours))[0] is ours
    with torch.no_grad():
        wild.assert_agree(ours, plain, x)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("name", KINDS)
def test_copies(name, copy_of):
    ours, plain = pair(name)
    x = image()
    with torch.no_grad():
        expected = ours(x)
        twin = copy_of(ours)
        assert torch.equal(twin(x), expected)
        for t in twin.parameters():
            t.mul_(1.25)
        plain.load_state_dict(twin.state_dict())
        wild.assert_agree(twin, plain, x)
        assert torch.equal(ours(x), expected)


@pytest.mark.parametrize("name", KINDS)
def test_hooks(name):
    """Hooks on every part see what they see in the plain module, and may change it."""
    ours, plain = pair(name, torch.float64)
    paths = [p for p, m in plain.named_modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]

    def run(model, x, path):
        seen = []
        handle = model.get_submodule(path).register_forward_hook(
            lambda m, inputs, y: seen.append(y) or y * 1.25
        )
        try:
            return [model(x), *seen]
        finally:
            handle.remove()

    with torch.no_grad():
        for path in paths:
            x = image(dtype=torch.float64)
            got = wild.assert_agree(ours, plain, x, f"hook on {path}", partial(run, path=path))
            assert len(got) == 2
            wild.assert_agree(ours, plain, x, f"after the hook on {path}")


# ---- Autocast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["eval", "eval with gradients", "train"])
@pytest.mark.parametrize("name", KINDS)
def test_autocast(name, mode, dtype):
    ours, plain = pair(name)
    ours.train(mode == "train"), plain.train(mode == "train")

    def run(model, x):
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype, enabled=x.dtype != torch.float64):
            return model(x)

    with torch.set_grad_enabled(mode != "eval"):
        wild.assert_agree(ours, plain, image(), run=run, computed_in=dtype)


@pytest.mark.parametrize("mode", ["eval", "eval with gradients", "train"])
@pytest.mark.parametrize("layer_scale", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_of_a_block_s_dtypes(dtype, layer_scale, mode):
    """layer_scale is float32 and widens the sum; without it a 16-bit image stays one."""
    ours, plain = block(layer_scale=layer_scale)
    wild.randomise(plain)
    ours.load_state_dict(plain.state_dict())
    x = image().to(dtype)
    outputs, gradients = [], []
    for model in (ours.train(mode == "train"), plain.train(mode == "train")):
        leaf = x.clone().requires_grad_(mode != "eval")
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(mode != "eval"):
            outputs.append(model(leaf))
        if mode != "eval":
            outputs[-1].float().square().sum().backward()
            gradients.append([leaf.grad.dtype, *(p.grad.dtype for p in model.parameters())])
    assert outputs[0].dtype == outputs[1].dtype
    assert gradients[:1] == gradients[1:]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_autocast_gradients(name, training):
    ours, plain = pair(name)
    ours.train(training), plain.train(training)
    assert_same_step(ours, plain, image(), autocast=torch.bfloat16)


# ---- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_div", [25, 0, -1])
@pytest.mark.parametrize(
    "make", [fk.PConv, lambda dim, n_div: fk.PConvPW(dim, 8, n_div), fk.FasterNetBlock]
)
def test_n_div_without_a_channel(make, n_div):
    with pytest.raises(ValueError, match=rf"n_div is {n_div}, .* 24 .*; expected 1 to 24"):
        make(24, n_div=n_div)


@pytest.mark.parametrize("act", ["tanh", "ReLU", None, 3, nn.ReLU])
@pytest.mark.parametrize("make", [partial(fk.PConvPW, 24, 8), partial(fk.FasterNetBlock, 24)])
def test_unknown_act(make, act):
    with pytest.raises(ValueError, match=r"act is .*, expected one of identity, relu, gelu"):
        make(act=act)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "x, error, message",
    [
        (torch.zeros(2, C, H), ValueError, r"x has 3 dimensions \(2, 24, 9\), expected 4"),
        (
            torch.zeros(2, C, H, W).double(),
            TypeError,
            r"has dtype torch\.float(32|64), expected .* torch\.float(32|64)",
        ),
        (torch.zeros(2, C, H, W).int(), TypeError, r"x has dtype torch\.int32"),
        (None, TypeError, r"x is of type NoneType, expected a torch\.Tensor"),
        (torch.zeros(2, C, H, W, device="meta"), ValueError, r"meta.*cpu|cpu.*meta"),
    ],
    ids=["rank", "float64", "int32", "None", "meta"],
)
def test_bad_input(name, training, x, error, message):
    ours, _ = pair(name)
    ours.train(training)
    before = copy.deepcopy(ours.state_dict())
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
            ours(x)
    assert all(torch.equal(a, before[key]) for key, a in ours.state_dict().items())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("channels", [1, C - 1, C + 1])
@pytest.mark.parametrize("name", PACKING)
def test_wrong_number_of_channels(name, channels, training):
    ours, _ = pair(name)
    ours.train(training)
    for grad in (False, True):
        with (
            torch.set_grad_enabled(grad),
            pytest.raises(ValueError, match=f"x has {channels} channels, expected 24"),
        ):
            ours(torch.zeros(2, channels, H, W))


def test_fewer_channels_than_pconv_convolves():
    with pytest.raises(ValueError, match="convolves 6 channels, expected 1 to x's 5"):
        fk.PConv(24)(torch.zeros(2, 5, 4, 4))


@pytest.mark.parametrize("name", PACKING)
def test_batch_statistics_of_one_value(name):
    ours, plain = pair(name)
    ours.train(), plain.train()
    before = copy.deepcopy(ours.state_dict())
    for model in (plain, ours):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            model(torch.zeros(1, C, 1, 1))
    assert all(torch.equal(a, before[key]) for key, a in ours.state_dict().items())
    ours.eval(), plain.eval()
    with torch.no_grad():
        wild.assert_agree(ours, plain, randn(1, C, 1, 1, seed=1))


@pytest.mark.parametrize("name", KINDS)
def test_empty_batch(name):
    ours, plain = pair(name)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert ours(image(0)).shape == plain(image(0)).shape


def test_device_and_dtype_arguments():
    for make in (fk.PConv, partial(fk.PConvPW, out_channels=8), fk.FasterNetBlock):
        for p in make(24, device="meta", dtype=torch.float16).parameters():
            assert (p.device.type, p.dtype) == ("meta", torch.float16)
