"""fasternet_kernels.models: the networks against timm's, and checkpoints of every known origin."""

import copy
import io
import os
import pickle
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fasternet_kernels.models as models
from bench.zoo import import_timm

timm = import_timm()

VARIANTS = [f"fasternet_{size}" for size in ("t0", "t1", "t2", "s", "m", "l")]
WIDTHS = {"t0": 40, "t1": 64, "t2": 96, "s": 128, "m": 144, "l": 192}
SMALL = {"embed_dim": 16, "depths": (1, 2, 1, 1), "feature_dim": 24, "num_classes": 7}


def randomise(model, seed=0):
    """Gives BatchNorm the statistics and weights of a trained network; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in [
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.5, 0.5),
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 1.5),
            ]:
                tensor.uniform_(low, high, generator=generator)
    return model


def image(batch=2, size=64, seed=1):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def small_model(seed=0, **kwargs):
    """A network of the same structure as T0, small enough to save and load many times."""
    torch.manual_seed(seed)
    return randomise(models.FasterNet(**{**SMALL, **kwargs}), seed)


def official_state(model):
    """The model's weights under the official repository's names, written out module by module."""
    state = {}

    def put(prefix, module):
        for name, tensor in module.state_dict().items():
            state[f"{prefix}.{name}"] = tensor.clone()

    put("patch_embed", model.patch_embed)
    put("stages.0.blocks", model.stages[0].blocks)
    put("stages.1", model.stages[1].downsample)
    put("stages.2.blocks", model.stages[1].blocks)
    put("stages.3", model.stages[2].downsample)
    put("stages.4.blocks", model.stages[2].blocks)
    put("stages.5", model.stages[3].downsample)
    put("stages.6.blocks", model.stages[3].blocks)
    if model.features_only:
        for i, norm in enumerate(model.feature_norms):
            put(f"norm{2 * i}", norm)
    else:
        put("avgpool_pre_head.1", model.conv_head)
        put("head", model.classifier)
    return state


def save(state, path):
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def assert_same_weights(model, expected):
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(state[key], value), key


# ---- The networks --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [*VARIANTS[:3], *(pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS[3:])]
)
def test_equals_timm(name):
    """Same keys in the same order, and the same answers in eval, in training and in gradients."""
    theirs = randomise(timm.create_model(name))
    ours = getattr(models, name)()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    ours.load_state_dict(theirs.state_dict())
    x = image()

    with torch.no_grad():
        expected = theirs.eval()(x)
        assert torch.equal(ours.eval()(x), expected)
        assert torch.equal(ours.forward_features(x), theirs.forward_features(x))
        assert expected.shape == (2, 1000)

    outputs = []
    for model in (theirs, ours):
        torch.manual_seed(2)  # stochastic depth
        outputs.append(model.train()(x))
        outputs[-1].square().sum().backward()
    assert torch.equal(outputs[1], outputs[0])
    assert_same_weights(ours, theirs.state_dict())  # BatchNorm's statistics have moved alike
    for (key, ours_), theirs_ in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours_.grad, theirs_.grad, msg=lambda text, key=key: key + text)


@pytest.mark.parametrize(
    "name", [*VARIANTS[:3], *(pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS[3:])]
)
def test_drop_path_rates_equal_timm(name):
    def rates(model):
        return [
            getattr(m.drop_path, "drop_prob", 0.0)
            for m in model.modules()
            if hasattr(m, "drop_path")
        ]

    assert rates(getattr(models, name)()) == rates(timm.create_model(name))


@pytest.mark.parametrize(
    "size", [pytest.param(s, marks=[pytest.mark.slow] * (s in "sml")) for s in WIDTHS]
)
def test_features_only(size):
    """The four stages' outputs, equal to timm's, and no head."""
    name = f"fasternet_{size}"
    ours = getattr(models, name)(features_only=True).eval()
    assert ours.channels == tuple(WIDTHS[size] * 2**i for i in range(4))
    assert ours.strides == (4, 8, 16, 32)
    assert not any(key.startswith(("conv_head", "classifier")) for key in ours.state_dict())

    theirs = randomise(timm.create_model(name)).eval()
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k in ours.state_dict()})
    x = image(1)
    with torch.no_grad():
        features = ours(x)
        expected = theirs.forward_intermediates(x, intermediates_only=True)
    assert [f.shape for f in features] == [
        (1, c, 64 // s, 64 // s) for c, s in zip(ours.channels, ours.strides, strict=True)
    ]
    for feature, wanted in zip(features, expected, strict=True):
        assert torch.equal(feature, wanted)


def test_layer_scale_equals_timm():
    theirs = timm.create_model("fasternet_t0", layer_scale_init_value=0.25).eval()
    ours = models.fasternet_t0(layer_scale_init_value=0.25).eval()
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        assert torch.equal(ours(image()), theirs(image()))


def test_without_classifier():
    model = small_model(num_classes=0).eval()
    with torch.no_grad():
        x = image()
        expected = model.forward_head(model.forward_features(x), pre_logits=True)
        assert torch.equal(model(x), expected)
    assert expected.shape == (2, SMALL["feature_dim"])


def test_drop_path_scales_kept_samples():
    drop_path = models.DropPath(0.25)
    x = torch.ones(4000, 3, 2, 2)
    torch.manual_seed(0)
    y = drop_path(x)
    per_sample = y.flatten(1)
    assert torch.equal(per_sample.amin(1), per_sample.amax(1))
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert 0.22 < (y[:, 0, 0, 0] == 0).float().mean() < 0.28
    assert torch.equal(drop_path.eval()(x), x)


@pytest.mark.parametrize("act", ["relu", "gelu", "gelu_tanh", "silu", "hardswish", "identity"])
def test_pickle_and_deepcopy(act):
    model = small_model(act=act, drop_path_rate=0.1, layer_scale_init_value=0.1).eval()
    with torch.no_grad():
        expected = model(image())
        assert torch.equal(copy.deepcopy(model)(image()), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(image()), expected)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        assert torch.equal(torch.load(buffer, weights_only=False)(image()), expected)


def test_fold_batch_norm():
    model = small_model().double().eval()
    before = copy.deepcopy(model.state_dict())
    folded = models.fold_batch_norm(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert_same_weights(model, before)
    with torch.no_grad():
        x = image().double()
        torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"act": "tanh"}, "act must be one of relu, gelu, .*, got 'tanh'"),
        ({"n_div": 17}, "n_div must leave a channel to convolve: dim=16, n_div=17"),
        ({"n_div": 0}, "n_div must leave a channel to convolve: dim=16, n_div=0"),
        ({"depths": ()}, "depths must name at least one block"),
        ({"depths": (1, 0)}, "depths must name at least one block"),
        ({"drop_path_rate": 1.0}, r"drop_prob must be in \[0, 1\), got 1.0"),
        ({"num_classes": -1}, "num_classes must not be negative, got -1"),
        ({"feature_norm": True}, "feature_norm is for features_only=True"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        models.FasterNet(**{**SMALL, **kwargs})


# ---- Checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keys", ["timm", "official"])
def test_load_checkpoint(tmp_path, keys, suffix):
    source = small_model(seed=1)
    state = source.state_dict() if keys == "timm" else official_state(source)
    path = save(state, tmp_path / f"weights{suffix}")
    target = small_model(seed=2)
    parameters = list(target.parameters())
    assert models.load_checkpoint(target, path) is target
    assert_same_weights(target, source.state_dict())
    assert all(a is b for a, b in zip(target.parameters(), parameters, strict=True))


def test_load_official_checkpoint_of_t0(tmp_path):
    source = randomise(models.fasternet_t0())
    path = save(official_state(source), tmp_path / "fasternet_t0.pth")
    for target in (models.fasternet_t0(), timm.create_model("fasternet_t0")):
        assert_same_weights(models.load_checkpoint(target, path), source.state_dict())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state, "epoch": 3},
        lambda state: {"state_dict": state, "optimizer": {"lr": 0.1}},
        lambda state: {"state_dict": {"model": state}},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"model.{key}": value for key, value in state.items()}},
        lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
        lambda state: (
            {"rpn.weight": torch.ones(2)} | {f"backbone.{k}": v for k, v in state.items()}
        ),
    ],
)
@pytest.mark.parametrize("keys", ["timm", "official"])
def test_load_wrapped_checkpoint(tmp_path, wrap, keys):
    source = small_model(seed=1)
    state = source.state_dict() if keys == "timm" else official_state(source)
    path = save(wrap(state), tmp_path / "weights.pth")
    assert_same_weights(models.load_checkpoint(small_model(seed=2), path), source.state_dict())


@pytest.mark.parametrize("keys", ["timm", "official"])
def test_features_only_ignores_the_head(tmp_path, keys):
    source = small_model(seed=1)
    state = source.state_dict() if keys == "timm" else official_state(source)
    path = save(state, tmp_path / "weights.pth")
    target = small_model(seed=2, features_only=True, feature_norm=True)
    norms = {k: v.clone() for k, v in target.state_dict().items() if k.startswith("feature_norms")}
    models.load_checkpoint(target, path)
    assert len(norms) == 20
    body = {k: v for k, v in source.state_dict().items() if k.startswith(("patch_embed", "stages"))}
    assert_same_weights(target, body | norms)


def test_model_without_classifier_ignores_it(tmp_path):
    source = small_model(seed=1)
    path = save(source.state_dict(), tmp_path / "weights.pth")
    target = models.load_checkpoint(small_model(seed=2, num_classes=0), path)
    expected = {k: v for k, v in source.state_dict().items() if not k.startswith("classifier")}
    assert_same_weights(target, expected)


def test_detection_backbone(tmp_path):
    """The official detection backbones normalise each output; their norms are never dropped."""
    source = small_model(seed=1, features_only=True, feature_norm=True)
    path = save(official_state(source), tmp_path / "detector.pth")
    target = small_model(seed=2, features_only=True, feature_norm=True)
    assert_same_weights(models.load_checkpoint(target, path), source.state_dict())
    with torch.no_grad():
        outputs = target.eval()(image())
        raw = source.eval().patch_embed(image())
        for stage, norm, output in zip(source.stages, source.feature_norms, outputs, strict=True):
            raw = stage(raw)
            assert torch.equal(output, norm(raw))

    plain = small_model(seed=2, features_only=True)
    with pytest.raises(ValueError, match=r"20 unexpected: .*norm.*feature_norm=True"):
        models.load_checkpoint(plain, path)


def rename(state, old, new):
    return {key.replace(old, new): value for key, value in state.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: {k: v for k, v in s.items() if k != "stages.1.blocks.0.mlp.0.weight"},
            r"does not fit FasterNet: 1 missing: stages\.1\.blocks\.0\.mlp\.0\.weight$",
        ),
        (lambda s: s | {"extra.weight": torch.ones(1)}, r"FasterNet: 1 unexpected: extra\.weight$"),
        (
            lambda s: s | {"classifier.bias": torch.ones(9)},
            r"1 of another shape: classifier\.bias \(checkpoint \(9,\), model \(7,\)\)$",
        ),
        (
            lambda s: rename(s, "conv_head", "pre_head"),
            r"1 missing: conv_head\.weight; 1 unexpected: pre_head\.weight$",
        ),
        (
            lambda s: {k: v for k, v in s.items() if not k.startswith("stages.2")},
            r"14 missing: (stages\.2\.[\w.]+, ){5}stages\.2\.[\w.]+ and 8 more$",
        ),
        (lambda s: {"weights": s}, r"holds more than tensors: 'weights' \(a (Ordered)?[Dd]ict\)"),
        (lambda s: {}, "holds an empty mapping, expected a mapping of names to tensors"),
        (lambda s: [1, 2], "holds a list, expected a mapping of names to tensors"),
        (lambda s: {"model": nn.Linear(2, 2)}, "cannot be read as a file of tensors only: "),
    ],
)
def test_bad_checkpoint_loads_nothing(tmp_path, change, message):
    path = tmp_path / "weights.pth"
    torch.save(change(dict(small_model(seed=1).state_dict())), path)
    target = small_model(seed=2)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(ValueError, match=message) as caught:
        models.load_checkpoint(target, path)
    assert str(path) in str(caught.value)
    assert_same_weights(target, before)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"no checkpoint at all, only a line of text\n"])
def test_unreadable_checkpoint(tmp_path, suffix, content):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is not a safetensors file|cannot be read as a file of"):
        models.load_checkpoint(small_model(), path)


def test_never_unpickles_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    path = tmp_path / "weights.pth"
    torch.save({"model": Trap()}, path)
    with pytest.raises(ValueError, match="cannot be read as a file of tensors only"):
        models.load_checkpoint(small_model(), path)
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_missing_file(tmp_path, suffix):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere"):
        models.load_checkpoint(small_model(), tmp_path / f"nowhere{suffix}")


def test_without_safetensors(tmp_path, monkeypatch):
    path = save(small_model().state_dict(), tmp_path / "weights.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="needs the package safetensors"):
        models.load_checkpoint(small_model(), path)
