"""The layers: equivariance, padding, gradients, files."""

import copy
import json
import math

import pytest
import torch
from lie_cases import DTYPES, far_elements, near, turn
from safetensors.torch import load_file, save_file

from erlangen.lie import GL, SE2, SE3, SO2, SO3, Aff2, Product, Sim2
from erlangen.lie.layers import LieAttention, LieTransformer, LieTransformerConfig
from erlangen.testing import assert_equivariant

B, N, DIM, HEADS = 2, 5, 12, 3


def shake(module, generator):
    """Nothing at zero any more, so that every path counts."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return module


@pytest.fixture(autouse=True)
def seeded_weights():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def transformer(generator, **fields):
    fields = {"group": "SE2", "dim": DIM, "num_heads": HEADS, "num_layers": 2} | fields
    return shake(LieTransformer(LieTransformerConfig(**fields), generator=generator), generator)


def act_in(element, poses, *rest):
    return element @ poses, *rest


def act_out(element, output):
    features, poses = output
    return features, element @ poses


@pytest.mark.parametrize("group", [SE2, SO3, SE3, Sim2, GL(2), Aff2], ids=str)
@pytest.mark.parametrize("feature_dim", [0, 3])
def test_the_transformer_is_equivariant(group, feature_dim, generator):
    model = transformer(generator, group=str(group), feature_dim=feature_dim, outside="mask")
    poses = near(group, B, N, generator=generator)
    features = (torch.randn(B, N, feature_dim, generator=generator),) if feature_dim else (None,)
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[0, -1] = False
    assert_equivariant(
        model,
        None,
        (poses, *features, mask),
        act_in=act_in,
        act_out=act_out,
        elements=far_elements(group, generator),
    )


def test_a_transformer_that_looks_at_the_world_is_not(generator):
    model = transformer(generator, feature_dim=2).double()

    def spoiled(poses):
        return model(poses, poses[..., :2, 2])

    poses = near(SE2, B, N, generator=generator)
    with pytest.raises(AssertionError, match="not equivariant"):
        assert_equivariant(
            spoiled, None, poses, act_in=lambda h, g: h @ g, act_out=act_out, elements=far_elements(SE2, generator)
        )


def test_float32_is_equivariant_as_far_as_its_poses_are(generator):
    """Translations of 1e3 are themselves wrong by 1e3 · 2⁻²⁴ = 6e-5; features and local moves amplify it some ten
    times, and the poses come back as large as they went in.
    """
    model = transformer(generator)
    poses = near(SE2, B, N, generator=generator)
    features, moved = model(poses.float())
    for element in far_elements(SE2, generator):
        features_far, moved_far = model((element @ poses).float())
        assert (features_far - features).abs().max() < 20 * 6e-5
        assert (moved_far - (element @ moved.double()).float()).abs().max() < 20 * 6e-5


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_changes_nothing_and_may_be_anything(causal, dtype, generator):
    model = transformer(generator, feature_dim=2, causal=causal).to(dtype)
    poses = near(SE2, 1, N, generator=generator, dtype=dtype)
    features = torch.randn(1, N, 2, generator=generator).to(dtype)
    alone = model(poses, features)
    padded_poses = torch.cat([poses, torch.full((1, 2, 3, 3), math.nan, dtype=dtype)], dim=1).requires_grad_()
    padded_features = torch.cat([features, torch.full((1, 2, 2), math.nan, dtype=dtype)], dim=1).requires_grad_()
    mask = torch.arange(N + 2)[None] < N
    out = model(padded_poses, padded_features, mask)
    for result, expected in zip(out, alone):
        torch.testing.assert_close(result[:, :N], expected, rtol=0, atol=50 * torch.finfo(dtype).eps)
    assert not out[0][:, N:].any()
    assert out[1][:, N:].isnan().all()
    loss = out[0].square().sum() + out[1][:, :N].square().sum()
    gradients = torch.autograd.grad(loss, [padded_poses, padded_features, *model.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_causal_transformer_does_not_see_ahead(generator):
    model = transformer(generator, causal=True).double()
    poses = near(SE2, 1, N, generator=generator)
    features, moved = model(poses)
    features_cut, moved_cut = model(poses[:, :3])
    torch.testing.assert_close(features[:, :3], features_cut)
    torch.testing.assert_close(moved[:, :3], moved_cut)


@pytest.mark.parametrize("content", [False, True])
@pytest.mark.parametrize("displacement", [False, True])
@pytest.mark.parametrize("update_poses", [False, True])
def test_every_parameter_is_used(content, displacement, update_poses, generator):
    layer = LieAttention(
        SE2, HEADS, DIM, content=content, displacement=displacement, update_poses=update_poses
    ).double()
    shake(layer, generator)
    features = torch.randn(B, N, DIM, generator=generator, dtype=torch.float64)
    poses = near(SE2, B, N, generator=generator)
    received, moved = layer(features, poses)
    assert received.shape == (B, N, DIM)
    assert torch.equal(moved, poses) != update_poses
    (received.square().sum() + moved.square().sum()).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A common bias of the keys adds the same to a whole row.
        assert parameter.grad.abs().max() > (-1 if name == "key.bias" else 1e-12), name


@pytest.mark.parametrize("group", [SE3, Product(SE2, SO3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_finite_where_poses_coincide_and_at_half_a_turn(group, dtype, generator):
    model = transformer(generator, group=str(group)).to(dtype)
    start = near(group, 1, 1, generator=generator)
    poses = torch.cat([start, start, start @ turn(group, math.pi)], dim=1).to(dtype).requires_grad_()
    features, moved = model(poses)
    loss = features.square().sum() + moved.square().sum()
    (gradient,) = torch.autograd.grad(loss, poses, create_graph=True)
    assert gradient.isfinite().all()
    assert gradient.any()
    (second,) = torch.autograd.grad(gradient.square().sum(), poses)
    assert second.isfinite().all()


def test_attention_without_features_moves_poses(generator):
    layer = LieAttention(SE3, 2, None, update_poses=True).double()
    poses = near(SE3, B, N, generator=generator)
    received, moved = layer(None, poses)
    assert received is None
    torch.testing.assert_close(moved, poses)  # the step starts at zero
    shake(layer, generator)
    received, moved = layer(None, poses)
    assert not torch.allclose(moved, poses)
    SE3.check(moved)


def test_parameters_stay_positive_and_start_as_said():
    layer = LieAttention(SE2, 3, DIM, displacement=True)
    torch.testing.assert_close(layer.log_temperature.exp(), torch.tensor([1.0, 16.0, 256.0]))
    assert not layer.log_block_weights.any()
    assert not layer.displacement.any()


def test_a_displacement_is_learned(generator):
    """Tokens in a chain, each two metres ahead of the one before; the payload of the one ahead is to be found."""
    step = torch.eye(3)
    step[0, 2] = 2.0
    step = step @ turn(SE2, 0.3).float()
    chain = [near(SE2, generator=generator, dtype=torch.float32)]
    for _ in range(7):
        chain.append(chain[-1] @ step)
    poses = torch.stack(chain)[None]
    payload = torch.randn(1, 8, 4, generator=generator)
    layer = LieAttention(SE2, 1, 4, content=False, displacement=True)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.2)
    losses = []
    for _ in range(50):
        received, _ = layer(payload, poses)
        loss = (received[:, :-1] - payload[:, 1:]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_compiled_is_eager(generator):
    model = transformer(generator, group="SO2", feature_dim=2, num_layers=1).double()
    poses = near(SO2, B, N, generator=generator)
    features = torch.randn(B, N, 2, generator=generator, dtype=torch.float64)
    mask = torch.arange(N)[None] < torch.tensor([[N], [N - 2]])
    results = []
    for function in (model, torch.compile(model, fullgraph=True, backend="eager")):
        out = function(poses, features, mask)
        loss = sum(x.square().sum() for x in out)
        results.append([*out, *torch.autograd.grad(loss, list(model.parameters()))])
    for eager, compiled in zip(*results):
        torch.testing.assert_close(eager, compiled, rtol=1e-10, atol=1e-10)


def test_autocast_leaves_the_geometry_alone(generator):
    model = transformer(generator)
    poses = near(SE2, B, N, generator=generator, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features, moved = model(poses)
    assert moved.dtype == torch.float32
    assert features.isfinite().all()
    SE2.check(moved)


def test_weights_come_from_the_generator():
    config = LieTransformerConfig(group="SE2", dim=DIM, num_heads=HEADS)
    models = [LieTransformer(config, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    first, again, other = (torch.cat([p.flatten() for p in m.parameters()]) for m in models)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_saved_model_is_the_same_model(dtype, generator, tmp_path):
    model = transformer(generator, feature_dim=2, mlp_dim=7, displacement=False).to(dtype)
    path = tmp_path / "model.safetensors"
    model.save(path)
    state = torch.random.get_rng_state()
    loaded = LieTransformer.load(path)
    assert torch.equal(state, torch.random.get_rng_state())
    assert loaded.config == model.config
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    poses = near(SE2, B, N, generator=generator, dtype=dtype)
    features = torch.randn(B, N, 2, generator=generator).to(dtype)
    for a, b in zip(model(poses, features), loaded(poses, features)):
        assert torch.equal(a, b)
    sum(x.square().sum() for x in loaded(poses, features)).backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())
    copy.deepcopy(loaded).save(path)  # over the old one
    assert LieTransformer.load(path).config == model.config


def test_a_save_that_fails_leaves_the_old_file(generator, tmp_path, monkeypatch):
    model, path = transformer(generator), tmp_path / "model.safetensors"
    model.save(path)
    before = path.read_bytes()
    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        shake(model, generator).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def fail(tensors, filename, metadata):
    with open(filename, "wb") as file:
        file.write(b"half")
    raise OSError("disk full")


def test_bad_files_are_refused(generator, tmp_path):
    model, path = transformer(generator), tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match="no model"):
        LieTransformer.load(path)
    model.save(path)
    whole = path.read_bytes()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    for content in (b"", b"no tensors here", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            LieTransformer.load(path)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="of another program"):
        LieTransformer.load(path)
    config = json.dumps({"group": "SE2", "dim": DIM, "num_heads": HEADS})
    good = {"format": "erlangen-lie-transformer", "version": "1", "config": config}
    for metadata, message in [
        (good | {"version": "9"}, "has format version 9, this Erlangen reads 1"),
        ({k: v for k, v in good.items() if k != "config"}, "damaged"),
        (good | {"config": json.dumps({"group": "SE2", "width": 3})}, "damaged"),
        (good | {"config": json.dumps({"group": "SE3", "dim": DIM, "num_heads": HEADS})}, "damaged"),
        (good | {"config": "{"}, "damaged"),
    ]:
        save_file(tensors, path, metadata)
        with pytest.raises(ValueError, match=message):
            LieTransformer.load(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"group": "SE9"}, "SE9"),
        ({"group": "__import__('os')"}, "__import__"),
        ({"num_heads": 5}, "num_heads must divide dim, received 5 heads of 12"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"feature_dim": -1}, "feature_dim must be at least 0"),
        ({"mlp_dim": 0}, "mlp_dim must be at least 1"),
        ({"chart": "other"}, "chart of SE2 must be one of"),
        ({"outside": "other"}, "outside must be one of"),
    ],
)
def test_a_bad_config_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LieTransformerConfig(**{"group": "SE2", "dim": DIM, "num_heads": HEADS} | fields)


def test_errors_say_what_is_wrong(generator):
    poses = near(SE2, B, N, generator=generator, dtype=torch.float32)
    features = torch.zeros(B, N, DIM)
    layer = LieAttention(SE2, HEADS, DIM)
    with pytest.raises(ValueError, match="num_heads must divide dim"):
        LieAttention(SE2, 5, DIM)
    with pytest.raises(ValueError, match="set update_poses=True"):
        LieAttention(SE2, 2, None)
    with pytest.raises(ValueError, match=r"poses must have shape \[B, N, m, m\] of SE2"):
        layer(features, poses[..., :2, :2])
    with pytest.raises(ValueError, match="built for features of width 12, received none"):
        layer(None, poses)
    with pytest.raises(ValueError, match=r"features must have shape \[B, N, dim\]"):
        layer(features[..., :3], poses)
    with pytest.raises(ValueError, match=r"float32, or all float64.*poses torch\.float64"):
        layer(features, poses.double())
    with pytest.raises(ValueError, match="mask must be bool"):
        layer(features, poses, torch.ones(B, N))
    with pytest.raises(ValueError, match=r"mask must have shape \[B, N\] = \[2, 5\]"):
        layer(features, poses, torch.ones(B, 1, N, N, dtype=torch.bool))
    model = transformer(generator)
    with pytest.raises(ValueError, match="feature_dim=0, received some features"):
        model(poses, features)
    model = transformer(generator, feature_dim=3)
    with pytest.raises(ValueError, match="feature_dim=3, received no features"):
        model(poses)
    with pytest.raises(ValueError, match=r"features must have shape \[B, N, feature_dim\]"):
        model(poses, features)
    with pytest.raises(ValueError, match="SE2"):
        model(2 * poses, features[..., :3])
