"""fk.accelerate: the answers, what stays the same, what is never stale, and what is refused.

`plain` is a network that was never accelerated, `fast` an accelerated one with the same weights.
Every value is held to the criterion in cases.py, with eager PyTorch on `plain` as the rival.
"""

import copy
import gc
import pickle
import re
import threading
from functools import partial

import pytest
import torch
import wild
from cases import generator, randn, slow_if, taking_turns
from torch import nn
from torch.nn.utils import parametrizations, prune

import fasternet_kernels as fk
from bench import zoo
from fasternet_kernels.networks import network_of

timm = zoo.import_timm()

VARIANTS = [f"fasternet_{size}" for size in ("t0", "t1", "t2", "s", "m", "l")]
SIZES = [(224, 224), (192, 256), (97, 131)]


def image(batch=2, height=64, width=96, dtype=torch.float32):
    return randn(batch, 3, height, width, seed=11, dtype=dtype)


def small(act=nn.GELU, **kwargs):
    """timm's FasterNet with all its parts, narrow: C_partial is 6, 12, 24 and 48.

    The outputs are many, so that the largest error is not a matter of luck.
    """
    network = {
        "embed_dim": 24,
        "depths": (1, 2, 1, 1),
        "feature_dim": 160,
        "num_classes": 160,
        "drop_path_rate": 0.0,
    }
    return timm.models.fasternet.FasterNet(act_layer=act, **(network | kwargs))


shallow = partial(small, depths=(1, 2))


def twins(make=small, dtype=None):
    """(plain, fast): the same weights, in eval mode."""
    plain = wild.randomise(make()).to(dtype).eval()
    return plain, fk.accelerate(copy.deepcopy(plain))


def exact_twins(make=small):
    """In float64, where a handful of values already tells right from wrong."""
    return twins(make, torch.float64)


def rows(model):
    """What is swapped, as {kind: paths}."""
    kinds = {}
    for row in fk.report(model).swapped:
        kinds.setdefault(row.kind, []).append(row.path)
    return kinds


def features(model, x):
    return model.forward_intermediates(x, intermediates_only=True)


def is_wrong(old, plain, x):
    """Whether `old` fails as the answer of `plain`."""
    with torch.no_grad():
        try:
            wild.assert_agree(lambda _: old, plain, x)
        except AssertionError:
            return True
    return False


# ---- The six networks ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def t0():
    return twins(partial(timm.create_model, "fasternet_t0"))


@pytest.mark.parametrize(
    "name", [*VARIANTS[:3], *(pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS[3:])]
)
def test_timm_in_eval(name):
    plain, fast = twins(partial(timm.create_model, name))
    depth = sum(len(stage.blocks) for stage in plain.stages)
    assert {kind: len(paths) for kind, paths in rows(fast).items()} == {
        "block": depth,
        "patch_conv": 4,
        "network": 1,
    }
    assert not fk.report(fast).refused
    with torch.no_grad():
        for batch in (1, 5):
            wild.assert_agree(fast, plain, image(batch), "logits")
        assert len(wild.assert_agree(fast, plain, image(2), "feature", features)) == 4


@pytest.mark.parametrize(
    "name", [VARIANTS[1], *(pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS[2:])]
)
def test_fast_tier(name, threads):
    """A network's error against float64 is within the documented 2e-5, as one op and module by
    module; copies keep the choice, and restoring it, training and gradients are as without it."""
    plain, default = twins(partial(timm.create_model, name))
    fast = fk.accelerate(copy.deepcopy(plain), fast=True)
    assert fk.report(fast).fast and "fast tier" in str(fk.report(fast))
    assert not fk.report(default).fast and "fast tier" not in str(fk.report(default))
    x = image(1, 224, 224)
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()(x.double())
        logits = fast(x)
        assert not torch.equal(logits, default(x))
        copies = [copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))]
        for model in copies:
            assert torch.equal(model(x), logits)
        outputs = [(logits, exact)]
        exact_features = features(copy.deepcopy(plain).double(), x.double())
        outputs += zip(features(fast, x), exact_features)
        for got, expected in outputs:
            assert float((got.double() - expected).norm() / expected.norm()) <= 2e-5
        assert torch.equal(fk.restore(copies[0])(x), plain(x))
        assert torch.equal(fk.accelerate(copies[1])(x), default(x))
        small = image(1)
        assert torch.equal(fast.bfloat16()(small.bfloat16()), default.bfloat16()(small.bfloat16()))
        fast, default = fast.float(), default.float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(fast(small), default(small))
        several = image(3, 224, 224)
        assert torch.equal(fast(several[1:2]), fast(several)[1:2])
        logits = fast(x)
        threads(1)
        assert torch.equal(fast(x), logits)
    assert torch.equal(fast(small), default(small))  # with gradients on
    torch.manual_seed(0)
    expected = default.train()(image(2))
    torch.manual_seed(0)
    assert torch.equal(fast.train()(image(2)), expected)


@pytest.mark.parametrize("name", VARIANTS[:2])
def test_timm_in_training(name):
    """GELU networks: a ReLU's gradient jumps where a value near 0 rounds to its other side."""
    plain, fast = twins(partial(timm.create_model, name))
    wild.assert_same_step(fast.train(), plain.train(), image(2))


def test_timm_in_float64(t0):
    plain, fast = (copy.deepcopy(model).double() for model in t0)
    x = image(2, dtype=torch.float64)
    with torch.no_grad():
        wild.assert_agree(fast, plain, x, "logits")
        wild.assert_agree(fast, plain, x, "feature", features)
    wild.assert_same_step(fast.train(), plain.train(), x)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_image_sizes(t0, size, batch):
    plain, fast = t0
    with torch.no_grad():
        wild.assert_agree(fast, plain, image(batch, *size), "logits")
        wild.assert_agree(fast, plain, image(batch, *size), "feature", features)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_layouts(t0, memory_format):
    """Any strides in; the feature maps come out as channels_last, whatever came in."""
    plain, fast = t0
    x = image(3).to(memory_format=memory_format)
    with torch.no_grad():
        for inputs in (x, x[:, :, 1:-1, ::2], x.flip(3).transpose(2, 3)):
            before = inputs.clone()
            wild.assert_agree(fast, plain, inputs)
            assert torch.equal(inputs, before)
        assert all(y.is_contiguous(memory_format=torch.channels_last) for y in features(fast, x))


def test_no_images(t0):
    _, fast = t0
    with torch.no_grad():
        assert fast(image(0)).shape == (0, 1000)


def test_same_bits_whatever_the_batch_and_the_threads(t0, threads):
    _, fast = t0
    x = image(5)
    with torch.no_grad():
        expected = fast(x)
        assert torch.equal(fast(x), expected)
        assert torch.equal(torch.cat([fast(one) for one in x.split(1)]), expected)
        threads(1)
        assert torch.equal(fast(x), expected)
        threads(3)
        assert torch.equal(fast(x), expected)


def feature_network(name):
    return partial(timm.create_model, name, features_only=True)


def assert_features(name, x):
    plain, fast = twins(feature_network(name))
    depth = sum(isinstance(m, timm.models.fasternet.MLPBlock) for m in plain.modules())
    assert {kind: len(paths) for kind, paths in rows(fast).items()} == {
        "block": depth,
        "patch_conv": 4,
        "network": 1,
    }
    with torch.no_grad():
        assert len(wild.assert_agree(fast, plain, x, "feature")) == 4
    return plain, fast


def test_features_only():
    plain, fast = assert_features("fasternet_t0", image(2))
    wild.assert_same_step(fast.train(), plain.train(), image(2))


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    """(the classifier's twins, the feature network's twins); tests leave them in eval mode."""
    make = partial(timm.create_model, request.param)
    return twins(make), twins(partial(make, features_only=True))


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_timm_in_eval_at_all_sizes(variant, size, batch):
    with torch.no_grad():
        for (plain, fast), outputs in zip(variant, (1, 4), strict=True):
            assert len(wild.assert_agree(fast, plain, image(batch, *size))) == outputs


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_timm_in_training_at_all_sizes(variant, size, batch):
    # In float32 a whole step's gradients are rounding noise grown over all layers: a fifth of those
    # of T0 and T1 have maximum errors that differ by more than twice between eager's own two
    # layouts. Each op holds float32 by itself; here it is the wiring.
    plain, fast = (copy.deepcopy(model).double().train() for model in variant[0])
    wild.assert_same_step(fast, plain, image(batch, *size, dtype=torch.float64))


# ---- What stays the same -------------------------------------------------------------------------


def tensors(model):
    return dict(model.named_parameters()) | dict(model.named_buffers())


def test_the_state_is_the_model_s_own():
    plain = wild.randomise(small(drop_path_rate=0.2, layer_scale_init_value=0.1)).eval()
    model = copy.deepcopy(plain)
    names, keys, types = (
        list(tensors(model)),
        list(model.state_dict()),
        [type(m) for m in model.modules()],
    )
    order = [n for n, _ in model.named_parameters()]
    before = tensors(model)

    def assert_unchanged():
        assert list(model.state_dict()) == keys
        assert list(tensors(model)) == names
        assert [n for n, _ in model.named_parameters()] == order
        assert all(a is b for a, b in zip(tensors(model).values(), before.values(), strict=True))
        assert all(
            torch.equal(a, b)
            for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True)
        )

    assert fk.accelerate(model) is model
    assert_unchanged()
    with torch.no_grad():
        model(image())
    assert_unchanged()
    assert fk.restore(model) is model
    assert_unchanged()
    assert [type(m) for m in model.modules()] == types
    assert vars(model).keys() == vars(plain).keys()
    with torch.no_grad():
        assert torch.equal(model(image()), plain(image()))
    a, b = step_bits(model.train()), step_bits(plain.train())
    assert all(torch.equal(a[name], b[name]) for name in b)


def step_bits(model):
    return wild.step(model, image(3), seed=5)


def test_restore_keeps_what_has_happened_since():
    plain, fast = twins()
    fast.train()
    wild.step(fast, image())
    plain.load_state_dict(fast.state_dict())
    fk.restore(fast)
    assert all(m.training for m in fast.modules())
    fast.eval(), plain.eval()
    with torch.no_grad():
        assert torch.equal(fast(image()), plain(image()))


def test_accelerate_twice():
    _, fast = twins()
    modules, report, forward = list(fast.modules()), fk.report(fast), fast(image())
    fk.accelerate(fast)
    assert all(a is b for a, b in zip(fast.modules(), modules, strict=True))
    assert fk.report(fast) == report
    with torch.no_grad():
        first = fast(image())
    fk.accelerate(fast)
    with torch.no_grad():
        assert torch.equal(fast(image()), first)
    assert torch.equal(fast(image()), forward)
    fk.restore(fk.restore(fast))
    assert fk.report(fast).rows == ()
    assert "forward" not in vars(fast)


def test_accelerate_again_after_restore():
    plain, fast = twins()
    fk.accelerate(fk.restore(fast))
    assert len(rows(fast)["block"]) == 5
    with torch.no_grad():
        wild.assert_agree(fast, plain, image())


def test_accelerate_takes_in_new_modules():
    plain, fast = twins()
    block = wild.randomise(copy.deepcopy(plain.stages[1].blocks[0]), seed=1)
    for model in (plain, fast):
        model.stages[1].blocks[1] = copy.deepcopy(block)
    fk.accelerate(fast)
    with torch.no_grad():
        wild.assert_agree(fast, plain, image())
    paths = [row.path for row in fk.report(fast).rows if row.kind == "block"]
    assert sorted(paths) == ALL_ROWS["block"]
    fk.restore(fast)
    assert [type(m) for m in fast.modules()] == [type(m) for m in plain.modules()]


ALL_ROWS = {
    "block": [f"stages.{s}.blocks.{b}" for s, b in ((0, 0), (1, 0), (1, 1), (2, 0), (3, 0))],
    "patch_conv": ["patch_embed", *(f"stages.{s}.downsample" for s in (1, 2, 3))],
    "network": [""],
}


def test_report():
    _, fast = twins()
    report = fk.report(fast)
    assert report.rows == report.swapped
    assert rows(fast) == ALL_ROWS
    text = str(report).splitlines()
    assert text[0] == "10 swapped, 0 refused"
    assert re.fullmatch(r" +swapped +block +stages\.0\.blocks\.0", text[1])
    assert re.fullmatch(r" +swapped +network +\(model\)", text[-1])
    assert fk.report(nn.Linear(2, 2)).rows == ()


# ---- Never stale ---------------------------------------------------------------------------------


def image_for(model, batch=2):
    return image(batch, dtype=next(model.parameters()).dtype)


def train_step(make_optimizer, model):
    model.train()
    optimizer = make_optimizer(model.parameters())
    wild.step(model, image_for(model))
    optimizer.step()
    model.eval()


def train_step_with_frozen_norms(make_optimizer, model):
    """Nothing but the optimizer touches the weights, and a fused one leaves no trace in them."""
    model.train()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    optimizer = make_optimizer(model.parameters())
    wild.step(model, image_for(model))
    optimizer.step()
    model.eval()


def step_in_eval(make_optimizer, model):
    optimizer = make_optimizer(model.parameters())
    wild.step(model, image_for(model))
    optimizer.step()


def tune_with_frozen_statistics(make_optimizer, model):
    """A step in eval mode, the model being called without gradients before and after it."""
    optimizer = make_optimizer(model.parameters())
    wild.step(model, image_for(model))
    with torch.no_grad():
        model(image_for(model))
    optimizer.step()


def new_parameters(model):
    """Each parameter replaced; the old is freed first, so that the new may get its address."""
    g = generator(3)
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            shape, module._parameters[name] = p.shape, None
            dtype = p.dtype
            del p
            module._parameters[name] = nn.Parameter(
                torch.empty(shape, dtype=dtype).uniform_(-0.4, 0.4, generator=g)
            )


def convert_and_back(model):
    dtype = next(model.parameters()).dtype
    for module in model.modules():
        if not module._modules:
            module.half().to(dtype)


def inference_edit(model):
    with torch.inference_mode():
        model.stages[2].blocks[0].mlp[0].weight.mul_(1.5)


def learn_direction_and_length(model):
    conv = parametrizations.weight_norm(model.stages[1].blocks[0].mlp[0])
    with torch.no_grad():
        conv.parametrizations.weight.original0.mul_(1.5)


def foreach_edit(model):
    with torch.no_grad():
        torch._foreach_mul_(list(model.parameters()), 1.2)


def update_statistics(model):
    torch.optim.swa_utils.update_bn([image_for(model, n) for n in (3, 4)], model)


def replace(path, make):
    def edit(model):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, make(model.get_submodule(path)))

    return edit


def seeded(make):
    """Replaces a module by one made with arguments of the old one and random weights."""
    return lambda old: wild.randomise(make(old), seed=9).to(old.weight.dtype).eval()


class Doubled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


SGD, ADAMW = (
    partial(torch.optim.SGD, lr=1e-3, fused=True),
    partial(torch.optim.AdamW, lr=1e-3, fused=True),
)
EDITS = {
    "load_state_dict": lambda m: m.load_state_dict(wild.randomise(small(), seed=4).state_dict()),
    "load_state_dict assign": lambda m: m.load_state_dict(
        wild.randomise(small(), seed=4).state_dict(), assign=True
    ),
    "load into a part": lambda m: m.stages[1].load_state_dict(
        wild.randomise(small(), seed=4).stages[1].state_dict()
    ),
    "sgd": partial(train_step, SGD),
    "adamw": partial(train_step, ADAMW),
    "sgd, frozen norms": partial(train_step_with_frozen_norms, SGD),
    "adamw, frozen norms": partial(train_step_with_frozen_norms, ADAMW),
    "sgd in eval": partial(step_in_eval, SGD),
    "adamw in eval": partial(step_in_eval, ADAMW),
    "sgd in eval after a call": partial(tune_with_frozen_statistics, SGD),
    "half and back": lambda m: m.half().float(),
    "parts half and back": convert_and_back,
    "bfloat16 and back": lambda m: m.bfloat16().float(),
    "new parameters": new_parameters,
    "inference_mode edit": inference_edit,
    "foreach edit": foreach_edit,
    "update_bn": update_statistics,
    "reset_classifier": lambda m: (m.reset_classifier(10), wild.randomise(m.classifier, 5)),
    "no classifier": lambda m: m.reset_classifier(0),
    "max pooling": lambda m: setattr(m, "global_pool", nn.AdaptiveMaxPool2d(1)),
    "new classifier": replace("classifier", seeded(lambda old: nn.Linear(old.in_features, 3))),
    "new head": replace(
        "conv_head", seeded(lambda old: nn.Conv2d(old.in_channels, old.out_channels, 1, bias=True))
    ),
    "other activation of the head": replace("act", lambda old: nn.SiLU()),
    "other activation": replace("stages.1.blocks.0.mlp.2", lambda old: nn.SiLU()),
    "unknown activation": replace("stages.1.blocks.0.mlp.2", lambda old: nn.Tanh()),
    "no norm": replace("stages.1.blocks.1.mlp.1", lambda old: nn.Identity()),
    "no norm in the stem": replace("patch_embed.norm", lambda old: nn.Identity()),
    "new norm": replace(
        "stages.1.blocks.1.mlp.1",
        seeded(lambda old: nn.BatchNorm2d(old.num_features, affine=False)),
    ),
    "group norm": replace(
        "stages.1.blocks.1.mlp.1", seeded(lambda old: nn.GroupNorm(2, old.num_features))
    ),
    "new convolution": replace(
        "stages.2.blocks.0.mlp.3",
        seeded(lambda old: nn.Conv2d(old.in_channels, old.out_channels, 1, bias=False)),
    ),
    "convolution with a bias": replace(
        "stages.2.blocks.0.mlp.3",
        seeded(lambda old: nn.Conv2d(old.in_channels, old.out_channels, 1)),
    ),
    "expansion with a bias": replace(
        "stages.2.blocks.0.mlp.0",
        seeded(lambda old: nn.Conv2d(old.in_channels, old.out_channels, 1)),
    ),
    "merging with a bias": replace(
        "stages.1.downsample.reduction",
        seeded(lambda old: nn.Conv2d(old.in_channels, old.out_channels, 2, stride=2)),
    ),
    "other class of the classifier": lambda m: setattr(m.classifier, "__class__", Halved),
    "biased 3x3": replace(
        "stages.2.blocks.0.spatial_mixing.partial_conv3",
        seeded(lambda old: nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1)),
    ),
    "dilated 3x3": replace(
        "stages.2.blocks.0.spatial_mixing.partial_conv3",
        seeded(
            lambda old: nn.Conv2d(
                old.in_channels, old.out_channels, 3, padding=2, dilation=2, bias=False
            )
        ),
    ),
    "strided reduction": replace(
        "stages.1.downsample.reduction",
        seeded(
            lambda old: nn.Conv2d(
                old.in_channels, old.out_channels, 4, stride=2, padding=1, bias=False
            )
        ),
    ),
    "wrapped mixing": replace("stages.2.blocks.0.spatial_mixing", Doubled),
    "wrapped mlp": replace("stages.2.blocks.0.mlp", Doubled),
    "wrapped block": replace("stages.2.blocks.0", Doubled),
    "wrapped stage": replace("stages.2", Doubled),
    "dropped block": replace("stages.1.blocks", lambda old: old[:1]),
    "dropped stage": lambda m: (
        m.prune_intermediate_layers(2, prune_head=False) and m.reset_classifier(0, "")
    ),
    "wrapped merging": replace("stages.2.downsample", Doubled),
    "weight norm": learn_direction_and_length,
}
EDITS_SAME_VALUES = {
    "folded batch norm": wild.fuse_conv_bn,
    "double": lambda m: m.double(),
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
    "contiguous": lambda m: m.to(memory_format=torch.channels_last).to(
        memory_format=torch.contiguous_format
    ),
    "frozen": lambda m: m.requires_grad_(False),
    "sync batch norm": nn.SyncBatchNorm.convert_sync_batchnorm,
    "share_memory": lambda m: m.share_memory(),
}


@pytest.mark.parametrize("edit", [*EDITS, *EDITS_SAME_VALUES])
def test_answer_after_an_edit(edit):
    """Right without gradients, with gradients, and in inference mode."""
    plain, fast = twins()
    x = image()
    with torch.no_grad():
        old = fast(x)
        fast(x)
    for model in (plain, fast):
        (EDITS | EDITS_SAME_VALUES)[edit](model)
    # The training steps differ by rounding: what is compared is the network that `fast` has become.
    assert list(plain.state_dict()) == list(fast.state_dict())
    plain.load_state_dict(fast.state_dict())
    x = x.to(next(plain.parameters()).dtype)
    if edit in EDITS:
        assert is_wrong(old, plain, x), "the edit does not change the answer"
    wild.assert_agree(fast, plain, x, run=in_all_ways)


def in_all_ways(model, x):
    with torch.no_grad():
        results = [model(x), model(x)]
    with torch.enable_grad():
        results.append(model(x))
    with torch.inference_mode():
        return [*results, model(x)]


@pytest.mark.parametrize("edit", slow_if(lambda i, _: i % 3, [*EDITS, *EDITS_SAME_VALUES]))
def test_training_after_an_edit(edit):
    plain, fast = exact_twins()
    wild.step(fast.train(), image_for(fast))
    assert wild.layer_nodes(fast(image_for(fast))) == 4, "it does not train stage by stage"
    for model in (plain, fast):
        (EDITS | EDITS_SAME_VALUES)[edit](model)
        model.train()
    plain.load_state_dict(fast.state_dict())
    wild.assert_same_step(fast, plain, image_for(plain))


def test_answer_after_an_edit_of_any_tensor():
    """Every parameter and every statistic, changed in place."""
    plain, fast = twins(partial(small, depths=(1, 1), layer_scale_init_value=0.3))
    x = image(1, 16, 24)
    with torch.no_grad():
        for (name, a), b in zip(tensors(plain).items(), tensors(fast).values(), strict=True):
            if not a.is_floating_point():
                continue
            old = fast(x)
            for t in (a, b):
                t.mul_(1.25).add_(0.125)
            assert is_wrong(old, plain, x), name
            wild.assert_agree(fast, plain, x, f"after an edit of {name}:")


def test_repack_after_an_edit_of_data():
    """What PyTorch does not count: the old answer may stay until fk.repack."""
    plain, fast = twins()
    x = image()
    with torch.no_grad():
        for path in (
            "classifier.weight",
            "stages.1.blocks.0.mlp.0.weight",
            "stages.1.blocks.0.mlp.1.running_var",
            "patch_embed.proj.weight",
        ):
            old = fast(x)
            for model in (plain, fast):
                tensors(model)[path].data.mul_(1.5)
            assert fk.repack(fast) is fast
            assert is_wrong(old, plain, x), path
            wild.assert_agree(fast, plain, x, f"after an edit of {path}:")


def test_an_average_that_only_ever_evaluates():
    """An exponential moving average of a model in training, evaluated after every update."""
    plain, model = twins()
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True
    )
    average.eval()
    with torch.no_grad():
        old = average(image())
    for seed in (3, 4):
        model.load_state_dict(wild.randomise(small(), seed).state_dict())
        average.update_parameters(model)
        plain.load_state_dict(average.module.state_dict())
        assert is_wrong(old, plain, image())
        with torch.no_grad():
            (old,) = wild.assert_agree(average, plain, image())


def test_functional_call():
    """Weights lent for one call do not stay."""
    plain, fast = twins()
    other = wild.randomise(small(), seed=4).eval()
    with torch.no_grad():
        for _ in range(2):
            wild.assert_agree(fast, plain, image())
            wild.assert_agree(
                partial(torch.func.functional_call, fast, other.state_dict()), other, image()
            )


def test_deepcopy():
    plain, fast = twins()
    with torch.no_grad():
        expected = fast(image())
        twin = copy.deepcopy(fast)
        assert torch.equal(twin(image()), expected)
        for t in twin.parameters():
            t.mul_(1.25)
        twin.reset_classifier(5)
        assert twin(image()).shape == (2, 5)
        assert torch.equal(fast(image()), expected)
        for t in fast.parameters():
            t.mul_(0.75)
    assert not {id(m) for m in twin.modules()} & {id(m) for m in fast.modules()}
    fk.restore(twin)
    assert rows(twin) == {}
    assert len(rows(fast)["block"]) == 5
    for model in (plain, twin):
        model.reset_classifier(5)
    plain.load_state_dict(twin.state_dict())
    with torch.no_grad():
        assert torch.equal(twin(image()), plain(image()))


@pytest.mark.parametrize(
    "make",
    [small, partial(wild.OfficialFasterNet, forward="slicing"), partial(wild.C2fFaster, 3, 24)],
    ids=["timm", "official", "fork"],
)
def test_pickle(make):
    plain, fast = twins(make)
    with torch.no_grad():
        expected = fast(image())
        twin = pickle.loads(pickle.dumps(fast))
        assert torch.equal(twin(image()), expected)
        for t in twin.parameters():
            t.mul_(1.25)
        plain.load_state_dict(twin.state_dict())
        wild.assert_agree(twin, plain, image())
        assert torch.equal(fast(image()), expected)
    assert [type(m) for m in fk.restore(twin).modules()] == [type(m) for m in plain.modules()]
    with torch.no_grad():
        assert torch.equal(twin(image()), plain(image()))


def test_pruning():
    """torch's pruning recomputes a weight in a hook before each call."""
    plain, fast = twins()
    with torch.no_grad():
        old = fast(image())
        for model in (plain, fast):
            prune.l1_unstructured(model.stages[1].blocks[0].mlp[0], "weight", 0.5)
        assert is_wrong(old, plain, image())
        wild.assert_agree(fast, plain, image())
        for model in (plain, fast):
            model.stages[1].blocks[0].mlp[0].weight_orig.mul_(1.5)
        wild.assert_agree(fast, plain, image())


# ---- Modes ---------------------------------------------------------------------------------------


def with_statistics(model, x):
    """The output, then the norms' statistics after the call."""
    statistics = [b for b in model.buffers() if b.is_floating_point()]
    return [model(x), *(b.clone() for b in statistics)]


@pytest.mark.parametrize("grad", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "part",
    ["stages", "stages.1", "stages.1.blocks.0.mlp.1", "patch_embed", "stages.1.downsample"],
)
def test_part_in_training(part, grad):
    """A part in training mode inside a network in eval uses and updates batch statistics."""
    plain, fast = twins(shallow)
    with torch.no_grad():
        old = fast(image(2, 32, 48))
    for model in (plain, fast):
        model.get_submodule(part).train()
    assert is_wrong(old, plain, image(2, 32, 48))
    with grad():
        wild.assert_agree(fast, plain, image(2, 32, 48), run=with_statistics)
    fast.eval(), plain.eval()
    plain.load_state_dict(fast.state_dict())
    with torch.no_grad():
        wild.assert_agree(fast, plain, image(2, 32, 48))


@pytest.mark.parametrize("hooked", [False, True])
def test_norms_calibrated_one_by_one(hooked):
    """Only the norms are put in training mode and back: the modules around them are not told."""
    plain, fast = twins()
    norms = [m for m in fast.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        old = fast(image())
        for norm in norms:
            norm.train()
        handles = [
            m.register_forward_hook(lambda *_: None)
            for m in fast.modules()
            if hooked and not m._modules
        ]
        fast(image(3))
        for norm in norms:
            norm.eval()
        for handle in handles:
            handle.remove()
        plain.load_state_dict(fast.state_dict())
        assert is_wrong(old, plain, image())
        wild.assert_agree(fast, plain, image())


def test_training_without_gradients():
    plain, fast = twins()
    fast.train(), plain.train()
    with torch.no_grad():
        wild.assert_agree(fast, plain, image(), run=with_statistics)
    assert {int(m.num_batches_tracked) for m in fast.modules() if hasattr(m, "momentum")} == {1}


@pytest.mark.parametrize("momentum", [None, 0.0, 0.01, 1.0])
def test_momentum(momentum):
    plain, fast = exact_twins()
    for model in (plain, fast):
        for m in model.train().modules():
            if isinstance(m, nn.BatchNorm2d):
                m.momentum = momentum
    for seed in range(2):
        x = randn(2, 3, 64, 96, seed=seed, dtype=torch.float64)
        wild.assert_same_step(fast, plain, x)
        plain.load_state_dict(fast.state_dict())


def test_gradients_in_eval():
    plain, fast = exact_twins()
    with torch.no_grad():
        fast(image(dtype=torch.float64))
    wild.assert_same_step(fast, plain, image(dtype=torch.float64))


def test_gradients_with_frozen_norms():
    """Fine-tuning of detectors: statistics stay as they are, norms learn or not."""
    plain, fast = exact_twins()
    for model in (plain, fast):
        model.train()
        for i, m in enumerate(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            m.eval().requires_grad_(i % 2 == 0)
    wild.assert_same_step(fast, plain, image(dtype=torch.float64))


def test_gradients_of_some_parameters():
    plain, fast = exact_twins()
    for model in (plain, fast):
        model.train()
        for i, p in enumerate(model.parameters()):
            p.requires_grad_(i % 3 == 0)
    wild.assert_same_step(fast, plain, image(dtype=torch.float64))


def test_gradient_checkpointing():
    plain, fast = exact_twins()
    for model in (plain, fast):
        model.train().set_grad_checkpointing()
    wild.assert_same_step(fast, plain, image(dtype=torch.float64))


def test_training_of_relu_networks():
    """In float64, where no value is near enough to 0 to round to its other side."""
    plain, fast = twins(partial(small, act=nn.ReLU))
    wild.assert_same_step(fast.double().train(), plain.double().train(), image(dtype=torch.float64))


@pytest.mark.parametrize("layer_scale", [0.0, 0.3])
def test_drop_path(layer_scale):
    """Accelerated and eager draw the same samples from the same seed."""
    make = partial(small, drop_path_rate=0.5, layer_scale_init_value=layer_scale)
    plain, fast = exact_twins(make)
    assert len(rows(fast)["block"]) == 5
    fast.train(), plain.train()
    for seed in range(3):
        wild.assert_same_step(fast, plain, image(4, dtype=torch.float64), seed=seed)
        plain.load_state_dict(fast.state_dict())
    with torch.no_grad():
        torch.manual_seed(0)
        other = fast(image(4, dtype=torch.float64))
        torch.manual_seed(1)
        assert not torch.equal(fast(image(4, dtype=torch.float64)), other)
    fast.eval(), plain.eval()
    plain.load_state_dict(fast.state_dict())
    with torch.no_grad():
        wild.assert_agree(fast, plain, image(dtype=torch.float64))


def test_dropout_left_on():
    """Monte Carlo dropout: a network in eval whose dropout is not."""
    make = partial(fk.models.FasterNet, embed_dim=24, depths=(1, 1), drop_rate=0.5)
    plain, fast = twins(make)
    for model in (plain, fast):
        model.dropout.train()

    def run(model, x):
        torch.manual_seed(0)
        return model(x)

    with torch.no_grad():
        wild.assert_agree(fast, plain, image(), run=run)


def test_one_value_per_channel():
    """Batch statistics of one value: refused as eager does, and nothing is updated."""
    plain, fast = twins()
    fast.train()
    before = copy.deepcopy(fast.stages[3].state_dict())
    with pytest.raises(ValueError, match=r"more than 1 value per channel"):
        plain.train()(image(1, 32, 32))
    with pytest.raises(ValueError, match=r"more than 1 value per channel"):
        fast(image(1, 32, 32))
    for name, value in fast.stages[3].blocks.state_dict(prefix="blocks.").items():
        assert torch.equal(value, before[name]), name


# ---- dtypes and autocast -------------------------------------------------------------------------


@pytest.mark.parametrize("norms", ["same", "float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models(dtype, norms):
    plain, fast = twins()
    for model in (plain, fast):
        model.to(dtype)
        for m in model.modules():
            if norms == "float32" and isinstance(m, nn.BatchNorm2d):
                m.float()
    with torch.no_grad():
        wild.assert_agree(fast, plain, image(dtype=dtype), "logits")
        wild.assert_agree(fast, plain, image(dtype=dtype), "feature", features)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad", [torch.enable_grad, torch.no_grad])
def test_autocast_in_eval(dtype, grad):
    plain, fast = twins()
    dtypes = set()

    def run(model, x, what):
        with torch.autocast("cpu", dtype, enabled=x.dtype != torch.float64):
            return what(model, x)

    with grad():
        for what in (wild.call, features):
            got = wild.assert_agree(
                fast, plain, image(), what.__name__, partial(run, what=what), computed_in=dtype
            )
            dtypes |= {y.dtype for y in got}
    assert dtype in dtypes


def test_autocast_in_training():
    plain, fast = twins()
    wild.assert_same_step(fast.train(), plain.train(), image(4), autocast=torch.bfloat16)
    assert wild.layer_nodes(fast(image(4))) == 4
    with torch.autocast("cpu", torch.bfloat16):
        assert wild.layer_nodes(fast(image(4))) == 9, "autocast gets its layers one by one"


def test_autocast_then_not():
    """The packs of the two kinds of calls are not mixed up."""
    plain, fast = twins()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            fast(image())
        wild.assert_agree(fast, plain, image())


def test_autocast_leaves_float64_alone():
    plain, fast = twins()
    fast.double(), plain.double()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert fast(image(dtype=torch.float64)).dtype == plain(image(dtype=torch.float64)).dtype


# ---- Hooks ---------------------------------------------------------------------------------------


PARTS = [
    "",
    "patch_embed",
    "patch_embed.proj",
    "stages.1",
    "stages.1.downsample.norm",
    "stages.1.blocks",
    "stages.1.blocks.0",
    "stages.1.blocks.0.spatial_mixing",
    "stages.1.blocks.0.spatial_mixing.partial_conv3",
    "stages.1.blocks.0.mlp",
    "stages.1.blocks.0.mlp.0",
    "stages.1.blocks.0.mlp.1",
    "stages.1.blocks.0.mlp.2",
    "stages.1.blocks.0.mlp.3",
    "stages.1.blocks.0.drop_path",
    "conv_head",
    "act",
    "classifier",
]


def hooked(model, x, part, seed=0):
    """The result, and what hooks on `part` saw, which change what passes."""
    seen = []

    def before(module, inputs):
        seen.append(inputs[0].clone())
        return (inputs[0] * 0.875, *inputs[1:])

    def after(module, inputs, output):
        seen.append(output.clone())
        return output * 1.25

    module = model.get_submodule(part)
    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    torch.manual_seed(seed)
    try:
        return [model(x), *seen]
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "mode", ["eval", pytest.param("eval with gradients", marks=pytest.mark.slow), "train"]
)
def test_forward_hooks(part, mode):
    """A hook sees what it sees in eager mode, as often, and what it changes counts."""
    plain, fast = exact_twins(partial(shallow, drop_path_rate=0.1))
    fast.train(mode == "train"), plain.train(mode == "train")
    run = partial(hooked, part=part)
    with torch.set_grad_enabled(mode != "eval"):
        fast(image(2, 32, 48, torch.float64))
        assert (
            len(
                wild.assert_agree(
                    fast, plain, image(2, 32, 48, torch.float64), f"hook on {part}", run
                )
            )
            == 3
        )
        if mode == "eval":
            wild.assert_agree(fast, plain, image(2, 32, 48, torch.float64), "without the hook")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "always", "backward"])
def test_global_hooks(kind, training):
    """A hook on all modules, as profilers have, sees the leaves that it sees in eager mode."""
    plain, fast = twins()
    fast.train(training), plain.train(training)
    hooks = torch.nn.modules.module
    register = {
        "forward": hooks.register_module_forward_hook,
        "forward_pre": hooks.register_module_forward_pre_hook,
        "always": partial(hooks.register_module_forward_hook, always_call=True),
        "backward": hooks.register_module_full_backward_hook,
    }[kind]

    def leaves(model):
        paths = {module: path for path, module in model.named_modules() if not module._modules}
        seen = []
        handle = register(lambda m, *_: seen.append(paths[m]) if m in paths else None)
        try:
            y = model(image().requires_grad_(kind == "backward"))
            if kind == "backward":
                y.sum().backward()
        finally:
            handle.remove()
        return sorted(seen)

    with torch.set_grad_enabled(kind == "backward" or training):
        fast(image())
        expected = leaves(plain)
        assert "stages.1.blocks.0.mlp.0" in expected
        assert leaves(fast) == expected
        wild.assert_agree(fast, plain, image())


def backward_hooked(model, x, part, register):
    """The gradients that a hook on `part` saw."""
    seen = []

    def hook(module, *gradients):
        for group in gradients:
            seen.extend(g.clone() for g in group if g is not None)

    handle = getattr(model.get_submodule(part), register)(hook)
    with torch.enable_grad():
        y = model(x.clone().requires_grad_())
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float32).to(y.dtype).view_as(y))
    handle.remove()
    return seen


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "register", ["register_full_backward_hook", "register_full_backward_pre_hook"]
)
@pytest.mark.parametrize("training", [pytest.param(False, marks=pytest.mark.slow), True])
def test_backward_hooks(part, register, training):
    plain, fast = exact_twins(shallow)
    fast.train(training), plain.train(training)
    fast(image(2, 32, 48, torch.float64))
    run = partial(backward_hooked, part=part, register=register)
    wild.assert_agree(fast, plain, image(2, 32, 48, torch.float64), f"backward hook on {part}", run)


def test_block_hook_fires_once_beside_an_inner_hook():
    plain, fast = twins()
    for model in (plain, fast):
        block = model.stages[1].blocks[0]
        block.register_forward_hook(lambda module, inputs, output: output * 2)
        block.mlp[0].register_forward_hook(lambda *_: None)
    with torch.no_grad():
        wild.assert_agree(fast, plain, image())


# ---- PConv in the wild ---------------------------------------------------------------------------


def official(**kwargs):
    return partial(wild.OfficialFasterNet, **kwargs)


def c2f(n=2, **kwargs):
    return partial(wild.C2fFaster, 3, 24, n, **kwargs)


WILD = {
    # make, blocks, patch convolutions, single partial convolutions, whole networks
    "official": (official(), 3, 2, 0, 1),
    "official, slicing": (official(forward="slicing"), 3, 2, 0, 1),
    "official, GELU": (official(act=nn.GELU), 3, 2, 0, 1),
    "official, layer_scale": (official(layer_scale=0.2), 3, 2, 0, 1),
    "official, n_div 1": (official(n_div=1), 3, 2, 0, 1),
    "official, n_div 2": (official(n_div=2), 3, 2, 0, 1),
    "official, n_div 3": (official(n_div=3), 3, 2, 0, 1),
    "official, n_div 8": (official(n_div=8), 3, 2, 0, 1),
    "official, mlp_ratio 3": (official(mlp_ratio=3.0), 3, 2, 0, 1),
    "official, mlp_ratio 1": (official(mlp_ratio=1.0), 3, 2, 0, 1),
    "official, Hardswish": (official(act=nn.Hardswish), 3, 2, 0, 1),
    "official, no activation": (official(act=nn.Identity), 3, 2, 0, 1),
    "official, detection": (official(features=True), 3, 2, 0, 0),
    "fork": (c2f(), 2, 0, 0, 0),
    "fork, slicing": (c2f(forward="slicing"), 2, 0, 0, 0),
    "fork, layer_scale": (c2f(layer_scale=0.2), 2, 0, 0, 0),
    "fork, n_div 3": (c2f(n_div=3), 2, 0, 0, 0),
    "fork, DropPath": (c2f(drop_path=0.3), 2, 0, 0, 0),
    "residual around": (lambda: nn.Sequential(wild.Conv(3, 24), wild.Residual()), 1, 0, 0, 0),
    "single partial convolutions": (wild.PConvNet, 0, 0, 2, 0),
    "single partial convolutions, slicing": (partial(wild.PConvNet, forward="slicing"), 0, 0, 2, 0),
}


@pytest.mark.parametrize("name, how", taking_turns(WILD, ["as built", "folded"]))
def test_wild_networks(name, how):
    make, *expected = WILD[name]
    plain = wild.randomise(make()).eval()
    if how == "folded":
        wild.fuse_conv_bn(plain)
    fast = fk.accelerate(copy.deepcopy(plain))
    found = {kind: len(paths) for kind, paths in rows(fast).items()}
    kinds = ("block", "patch_conv", "pconv", "network")
    assert [found.get(kind, 0) for kind in kinds] == expected, fk.report(fast)
    x = image(2, 24, 40)
    with torch.no_grad():
        for _ in range(2):
            wild.assert_agree(fast, plain, x)
    plain.double(), fast.double()
    if "slicing" not in name:  # whose own backward raises
        wild.assert_same_step(fast, plain, x.double())
        wild.assert_same_step(fast.train(), plain.train(), x.double())
    fk.restore(fast)
    assert [type(m) for m in fast.modules()] == [type(m) for m in plain.modules()]
    fast.eval(), plain.eval()
    plain.load_state_dict(fast.state_dict())
    with torch.no_grad():
        for got, eager in zip(
            wild.as_list(fast(x.double())), wild.as_list(plain(x.double())), strict=True
        ):
            assert torch.equal(got, eager)


@pytest.mark.parametrize("when", ["before", "after"])
def test_fork_after_its_own_fuse(when):
    """`fuse` deletes the norm and sets the convolution's forward, before accelerate or after."""
    plain, fast = twins(c2f()) if when == "after" else [wild.randomise(c2f()()).eval()] * 2
    x = image(2, 24, 40)
    with torch.no_grad():
        fast(x)
        for model in {plain, fast}:
            for module in model.modules():
                if isinstance(module, wild.Conv):
                    module.fuse()
        if when == "before":
            fast = fk.accelerate(copy.deepcopy(plain))
            assert len(rows(fast)["block"]) == 2
        wild.assert_agree(fast, plain, x)
        fk.restore(fast)
        assert torch.equal(fast(x), plain(x))


def test_fork_with_another_width():
    """`adjust_channel` is a layer too many for a block: only the partial convolution is swapped."""
    plain, fast = twins(lambda: nn.Sequential(nn.Conv2d(3, 16, 1), wild.FasterBlock(16, 24)))
    assert rows(fast) == {"pconv": ["1.spatial_mixing"]}
    with torch.no_grad():
        wild.assert_agree(fast, plain, image(2, 16, 24))
    wild.assert_same_step(
        fast.double().train(), plain.double().train(), image(2, 16, 24, dtype=torch.float64)
    )


@pytest.mark.parametrize("features_only", [False, True])
@pytest.mark.parametrize(
    "size", ["t0", *(pytest.param(s, marks=pytest.mark.slow) for s in ("t1", "t2", "s", "m", "l"))]
)
def test_own_models(size, features_only):
    make = partial(
        getattr(fk.models, f"fasternet_{size}"),
        features_only=features_only,
        feature_norm=features_only,
        layer_scale_init_value=0.1,
    )
    plain, fast = twins(make)
    depth = sum(isinstance(m, fk.models.Block) for m in plain.modules())
    expected = {"block": depth, "patch_conv": 4} | ({} if features_only else {"network": 1})
    if features_only:  # whose outputs are normalised, which no step of a plan does
        (row,) = fk.report(fast).refused
        assert row.kind == "network" and "made by other layers: feature_norms.0" in row.reason
    assert {kind: len(paths) for kind, paths in rows(fast).items()} == expected
    with torch.no_grad():
        wild.assert_agree(fast, plain, image())


def test_network_inside_a_wrapper():
    """What stands around the network still happens."""

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
            self.net = small()

        def forward(self, x):
            return self.net((x - self.mean) / 0.225).softmax(1)

    plain, fast = twins(Wrapper)
    assert len(rows(fast)["block"]) == 5
    with torch.no_grad():
        wild.assert_agree(fast, plain, image())


class Optional(wild.OfficialFasterNet):
    """A forward with a second argument."""

    def __init__(self):
        super().__init__()
        del self.__dict__["forward"]

    def forward(self, x, pre_logits=False):
        x = torch.flatten(self.avgpool_pre_head(self.stages(self.patch_embed(x))), 1)
        return x if pre_logits else self.head(x)


@pytest.mark.parametrize(
    "arguments", [((), {}), ((True,), {}), ((), {"pre_logits": True}), ((), {"pre_logits": False})]
)
def test_arguments_of_forward(arguments):
    args, kwargs = arguments
    plain, fast = twins(Optional)
    with torch.no_grad():
        wild.assert_agree(fast, plain, image(), run=lambda model, x: model(x, *args, **kwargs))
        wild.assert_agree(fast, plain, image(), run=lambda model, x: model(x=x, **kwargs))


class TwoCalls(nn.Module):
    """Calls one block twice and another never."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.a = wild.MLPBlock(24)
        self.again = self.a
        self.spare = wild.MLPBlock(24)

    def forward(self, x):
        return self.again(self.a(self.stem(x)))


def test_shared_blocks():
    plain, fast = twins(TwoCalls)
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert len(list(fast.parameters())) == len(list(plain.parameters()))
    with torch.no_grad():
        wild.assert_agree(fast, plain, image(2, 8, 9))
    wild.assert_same_step(
        fast.double().train(), plain.double().train(), image(2, 8, 9, dtype=torch.float64)
    )
    fk.restore(fast)
    assert fast.a is fast.again


@pytest.mark.parametrize("statistics", ["none", "none in the blocks", "no affine", "no bias"])
def test_unusual_norms(statistics):
    plain = wild.randomise(small())
    for path, m in list(plain.named_modules()):
        if not isinstance(m, nn.BatchNorm2d) or (
            statistics == "none in the blocks" and "blocks" not in path
        ):
            continue
        kwargs = {"no affine": {"affine": False}, "no bias": {"bias": False}}.get(
            statistics, {"track_running_stats": False}
        )
        norm = wild.randomise(nn.BatchNorm2d(m.num_features, **kwargs))
        parent, _, name = path.rpartition(".")
        setattr(plain.get_submodule(parent), name, norm)
    plain.double().eval()
    fast = fk.accelerate(copy.deepcopy(plain))
    assert len(rows(fast)["block"]) == 5
    with torch.no_grad():
        wild.assert_agree(fast, plain, image(dtype=torch.float64))
    wild.assert_same_step(fast, plain, image(dtype=torch.float64))
    wild.assert_same_step(fast.train(), plain.train(), image(dtype=torch.float64))


# ---- What must be refused ------------------------------------------------------------------------


REFUSED = {
    # block, kind and reason of the refusal, or None where nothing looks like a part
    "slice without a clone": (
        partial(wild.MLPBlock, 24, forward="slicing_in_place"),
        "block",
        "changes its input in place",
    ),
    "slice in the block": (
        partial(wild.InlineBlock, in_place=True),
        "block",
        "changes its input in place",
    ),
    "inner norm": (
        partial(wild.InlineBlock, inner=True),
        "block",
        "other layers: BatchNorm2d, SiLU",
    ),
    "biased 3x3": (partial(wild.InlineBlock, conv_bias=True), "block", "has a bias"),
    "biased second 1x1": (partial(wild.InlineBlock, out_bias=True), "block", "has a bias"),
    "unknown activation": (
        partial(wild.InlineBlock, act=nn.Mish),
        "block",
        "do not know the activation Mish",
    ),
    "leaky activation": (
        partial(wild.InlineBlock, act=nn.LeakyReLU),
        "block",
        "do not know the activation LeakyReLU",
    ),
    "no residual": (partial(wild.InlineBlock, residual=False), "block", "computes something else"),
    "inpainting": (wild.Inpainting, None, None),
    "inpainting layer": (lambda: wild.PartialConv2d(24, 24, 3, padding=1), None, None),
    "attention": (wild.SHSA, None, None),
    "pinwheel": (wild.Pinwheel, None, None),
    "bottleneck": (wild.Bottleneck, "block", "between the 1x1 convolutions there is more"),
    "basic block": (wild.BasicBlock, None, None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, kind, reason = REFUSED[name]
    torch.manual_seed(0)
    plain = wild.randomise(nn.Sequential(wild.Conv(3, 24, 3), make(), nn.Conv2d(24, 24, 1))).eval()
    model = copy.deepcopy(plain)
    modules = list(model.modules())
    fk.accelerate(model)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    report = fk.report(model)
    assert report.swapped == ()
    if kind is None:
        assert report.rows == ()
    else:
        assert {(row.path, row.kind) for row in report.rows} >= {("1", kind)}
        (row,) = (row for row in report.rows if row.kind == kind)
        assert reason in row.reason
        assert f"refused  {kind}" in str(report)
        assert reason in str(report)
    with torch.no_grad():
        assert torch.equal(model(image(2, 9, 7)), plain(image(2, 9, 7)))
    if "slice" in name:  # whose own backward raises
        return
    got = wild.step(model.train(), image(2, 9, 7))
    expected = wild.step(plain.train(), image(2, 9, 7))
    assert list(got) == list(expected)
    assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_untouched():
    """Nothing of a model without FasterNet's parts changes, attributes included."""
    for model in (
        timm.create_model("resnet18"),
        nn.Sequential(nn.Linear(3, 4), nn.ReLU()),
        nn.Linear(2, 2),
    ):
        before = [dict(vars(m)) for m in model.modules()]
        fk.accelerate(model)
        fk.restore(model)
        for m, attributes in zip(model.modules(), before, strict=True):
            assert vars(m).keys() == attributes.keys()
            assert all(vars(m)[key] is value for key, value in attributes.items())


def test_patchify_convolutions_without_blocks_stay():
    """Other networks have stems of patches, too."""
    model = nn.Sequential(wild.PatchEmbed(3, 24), wild.BasicBlock(24))
    modules = list(model.modules())
    assert fk.report(fk.accelerate(model)).rows == ()
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


def test_meta_device():
    with torch.device("meta"):
        model = small()
    modules = list(model.modules())
    report = fk.report(fk.accelerate(model))
    assert report.swapped == ()
    reasons = {row.path: row.reason for row in report.refused}
    assert {reasons[path] for path in ALL_ROWS["block"]} == {
        "its parameters are on the meta device"
    }
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


def test_refused_parts_beside_swapped_ones():
    def make():
        return nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1),
            wild.MLPBlock(24),
            wild.InlineBlock(act=nn.Mish),
            wild.MLPBlock(24),
            wild.Bottleneck(),
        )

    plain, fast = twins(make)
    assert rows(fast) == {"block": ["1", "3"]}
    assert [(row.kind, row.path) for row in fk.report(fast).refused] == [
        ("block", "2"),
        ("block", "4"),
    ]
    with torch.no_grad():
        wild.assert_agree(fast, plain, image(2, 9, 7))


def test_accelerate_disturbs_nothing(monkeypatch):
    """No random numbers are taken; no gradient, mode or statistic changes; no hook fires."""
    model = wild.randomise(small(drop_path_rate=0.2))
    wild.step(model.train(), image())
    model.stages[1].eval()
    modes = [m.training for m in model.modules()]
    grads = [p.grad.clone() for p in model.parameters()]
    state = copy.deepcopy(model.state_dict())
    fired = []
    model.stages[0].register_forward_hook(lambda *_: fired.append(1))
    random_state = torch.get_rng_state()
    seeded_gpus = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded_gpus.append)
    fk.accelerate(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not seeded_gpus
    assert [m.training for m in model.modules() if m is not model] == modes[1:]
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True)
    )
    assert not fired


def test_proofs_leave_no_memory():
    """Nor wait for the garbage collector, which does not know what tensors weigh."""

    def parameters():
        return {id(t) for t in gc.get_objects() if type(t) is nn.Parameter}

    for model in (small(), nn.Sequential(wild.Partial_conv3(24), wild.MLPBlock(24))):
        before = parameters()
        gc.disable()
        try:
            fk.accelerate(model)
            assert parameters() <= before
        finally:
            gc.enable()


class CopiedBadly(wild.MLPBlock):
    """A block whose copies hold something of the original: ``kind`` says what."""

    kind = ""

    def __deepcopy__(self, memo):
        if self.kind == "itself":
            return self
        twin = object.__new__(type(self))
        if self.kind == "dict":
            twin.__dict__ = self.__dict__
            return twin
        if self.kind == "parameters":
            memo.update((id(p), p) for p in self.parameters())
        twin.__dict__ = copy.deepcopy(vars(self), memo)
        if self.kind == "storages":
            for conv, own in zip(twin.modules(), self.modules()):
                if isinstance(conv, nn.Conv2d):
                    conv.weight = nn.Parameter(own.weight.data)
        if self.kind == "module":
            twin.spatial_mixing = self.spatial_mixing
        if self.kind == "first copy":  # which is the same as all later ones
            twin.kind = "itself"
        return twin


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    "kind", ["", "itself", "dict", "parameters", "storages", "module", "first copy"]
)
def test_copies_that_share(kind, wrapped):
    """What a proof does to a copy must not happen to the model."""
    block = wild.randomise(CopiedBadly(24)).double().eval()
    block.kind = kind
    x = randn(2, 24, 9, 7, seed=11).double()
    with torch.no_grad():
        expected = block(x)
    model = fk.accelerate(nn.Sequential(block) if wrapped else block)
    rows = {(row.kind, row.path): row for row in fk.report(model).rows}
    row = rows["block", "0" if wrapped else ""]
    assert row.swapped == (not kind)
    if kind:
        assert "a copy holds modules or tensors of the original" in row.reason
    fk.restore(model)
    with torch.no_grad():
        assert torch.equal(block(x), expected)


def test_what_a_forward_adds_is_not_of_the_copy():
    shared = nn.Dropout(0.0)

    class Lazy(timm.models.fasternet.FasterNet):
        def forward(self, x):
            self.lazy = shared
            return self.lazy(super().forward(x))

    fk.accelerate(Lazy(embed_dim=24, depths=(1, 1)).eval())
    assert torch.equal(shared(torch.ones(3)), torch.ones(3))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("compiled", ["", "stages.0", "stages.0.blocks.0", "classifier"])
def test_copies_of_compiled_modules(compiled, train):
    """Module.compile leaves a bound method of the original in a module, which no copy may keep."""
    plain = wild.randomise(shallow()).train(train)
    before = copy.deepcopy(plain.state_dict())
    plain.get_submodule(compiled).compile(backend="eager")
    fast = fk.accelerate(plain)
    for key, value in plain.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert not fk.report(fast).refused
    with torch.no_grad():
        for twin in (pickle.loads(pickle.dumps(fast)), copy.deepcopy(fast)):
            for p in twin.parameters():
                p.zero_()
            assert not twin(image(2, 32, 48)).any()
            assert network_of(twin).kept is not None, "it does not run as a whole"
        assert fast(image(2, 32, 48)).any()


def test_hooks_are_not_copied():
    """They may hold what cannot be copied, or much."""
    plain = wild.randomise(shallow()).eval()
    lock = threading.Lock()
    fast = copy.deepcopy(plain)
    for m in fast.modules():
        m.register_forward_hook(lambda *_: print(lock, end=""))
        m.register_forward_pre_hook(partial(lambda lock, *_: None, lock))
    fk.accelerate(fast)
    assert not fk.report(fast).refused
    assert all(m._forward_hooks and m._forward_pre_hooks for m in fast.modules())
    with torch.no_grad():
        wild.assert_agree(fast, plain, image(2, 32, 48))


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.register_buffer("links", torch.eye(3).to_sparse(), persistent=False),
        lambda m: m.register_buffer("nothing", torch.empty(0, 3)),
        lambda m: setattr(m, "classifier", torch.jit.script(m.classifier)),
        lambda m: setattr(m.conv_head, "get_extra_state", lambda: {"made of": "numbers"}),
    ],
    ids=["sparse buffer", "empty buffer", "scripted classifier", "extra state"],
)
def test_parts_of_other_kinds(edit):
    plain = wild.randomise(shallow()).eval()
    edit(plain)
    x = image(2, 32, 48)
    with torch.no_grad():
        expected = plain(x)
        fast = fk.accelerate(plain)
        assert {row.kind for row in fk.report(fast).swapped} >= {"block", "patch_conv"}
        torch.testing.assert_close(fast(x), expected)


def test_modes_that_return_nothing():
    class Block(wild.MLPBlock):
        def train(self, mode=True):
            super().train(mode)

    for model in (Block(24), nn.Sequential(Block(24), wild.Partial_conv3(24))):
        assert fk.report(fk.accelerate(model)).swapped


# ---- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [fk.accelerate, fk.restore])
@pytest.mark.parametrize("value", [None, "fasternet_t0", torch.zeros(3), [nn.ReLU()]])
def test_not_a_module(function, value):
    with pytest.raises(
        TypeError, match=rf"model is of type {type(value).__name__}, expected a torch\.nn\.Module"
    ):
        function(value)


@pytest.fixture(scope="module")
def accelerated():
    return twins(shallow)[1]


BAD_INPUTS = {
    "channels": (
        lambda c: torch.zeros(2, c + 1, 8, 8),
        ValueError,
        r"x has \d+ channels, expected \d+",
    ),
    "rank 3": (
        lambda c: torch.zeros(c, 8, 8),
        ValueError,
        r"x has 3 dimensions \(\d+, 8, 8\), expected 4",
    ),
    "rank 5": (
        lambda c: torch.zeros(1, 2, c, 8, 8),
        ValueError,
        r"x has 5 dimensions .*, expected 4",
    ),
    "float64": (
        lambda c: torch.zeros(2, c, 8, 8).double(),
        TypeError,
        r"x has dtype torch\.float64, expected .*torch\.float32",
    ),
    "bfloat16": (
        lambda c: torch.zeros(2, c, 8, 8).bfloat16(),
        TypeError,
        r"x has dtype torch\.bfloat16, expected .*torch\.float32",
    ),
    "int64": (
        lambda c: torch.zeros(2, c, 8, 8, dtype=torch.int64),
        TypeError,
        r"x has dtype torch\.int64, expected",
    ),
    "complex": (
        lambda c: torch.zeros(2, c, 8, 8, dtype=torch.complex64),
        TypeError,
        r"x has dtype torch\.complex64, expected",
    ),
    "list": (lambda c: [1, 2], TypeError, r"x is of type list, expected a torch\.Tensor"),
    "meta": (
        lambda c: torch.zeros(2, c, 8, 8, device="meta"),
        ValueError,
        r"x is on meta, expected .* cpu",
    ),
}


@pytest.mark.parametrize("mode", ["eval", "eval with gradients", "train"])
@pytest.mark.parametrize("part", ["stages.0.blocks.0", "patch_embed", ""])
@pytest.mark.parametrize("bad", BAD_INPUTS)
def test_bad_input(accelerated, bad, part, mode):
    """A wrong input to a block, a stem or a network is named; statistics stay as they are."""
    make, error, message = BAD_INPUTS[bad]
    fast = copy.deepcopy(accelerated).train(mode == "train")
    before = copy.deepcopy(fast.state_dict())
    x = make(24 if "blocks" in part else 3)
    with torch.set_grad_enabled(mode != "eval"), pytest.raises(error, match=message):
        fast.get_submodule(part)(x)
    assert all(
        torch.equal(a, b) for a, b in zip(fast.state_dict().values(), before.values(), strict=True)
    )


@pytest.mark.parametrize("mode", ["eval", "eval with gradients", "train"])
@pytest.mark.parametrize("size", [(3, 64), (16, 16)])
def test_image_smaller_than_a_patch(size, mode):
    """Raises as eager does, and does not average over no pixels."""
    for model in twins():
        model.train(mode == "train")
        with torch.set_grad_enabled(mode != "eval"), pytest.raises((RuntimeError, ValueError)):
            model(image(2, *size))
