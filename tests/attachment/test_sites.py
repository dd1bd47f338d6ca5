"""Where sites are found, and which of them a policy chooses."""

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import senet
from helpers.messages import one_line
from senet import SEConfig, SitePolicy
from senet.attachment.policies import chosen
from senet.attachment.sites import search

RESNET = torchvision.models.resnet18()
X = torch.zeros(1, 3, 64, 64)
FOUND = senet.find_sites(RESNET, example_input=X)
ALL = [f"layer{stage}.{block}.bn2" for stage in (1, 2, 3, 4) for block in (0, 1)]


def names(sites, config=None, model=RESNET, x=X):
    return [site.name for site in senet.find_sites(model, config, sites, x)]


def test_policies():
    assert names("auto") == ALL
    assert names("late") == ALL[4:]
    assert names("one_per_stage") == ALL[1::2]
    assert names(SitePolicy(min_channels=200)) == ALL[4:]
    assert names(SitePolicy(last_stages=1, one_per_stage=True)) == ALL[-1:]
    assert names("auto", SEConfig(stages=(2, 3))) == ALL[:4]
    assert names(["layer1.0.relu", "maxpool"][1:]) == ["maxpool"]


def test_every_layer():
    found = names("all")
    assert set(found) > set(ALL)
    # The stem and the first half of each block; their ReLU is called more than once, so the next convolution takes it.
    assert len(found) == 8 + 1 + 8
    assert "layer1.0.conv2:input" in found


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        ("standard", "layer1.0.bn2"),
        ("post", "layer1.0"),
        ("pre", "layer1.0.conv1:input"),
        ("3x3", "layer1.0.bn2"),
    ],
)
def test_placements(placement, expected):
    found = names("auto", SEConfig(placement=placement))
    assert found[0] == expected
    assert len(found) == 8


def test_the_identity_placement_stands_on_projections():
    found = senet.find_sites(RESNET, SEConfig(placement="identity"), example_input=X)
    assert [site.name for site in found] == [f"layer{stage}.0.downsample.1" for stage in (2, 3, 4)]


def test_placements_are_bit_equal_too():
    model = torchvision.models.resnet18().eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        for placement in ("post", "pre", "3x3", "identity"):
            senet.attach(model, SEConfig(identity_init=True, placement=placement), example_input=x)
            assert torch.equal(model(x), expected)


def test_stages_are_numbered_as_in_the_paper():
    assert [site.stage for site in senet.find_sites(RESNET, example_input=X)] == [2, 2, 3, 3, 4, 4, 5, 5]
    cifar = senet.create_model("resnet8", 10)
    assert [site.stage for site in senet.find_sites(cifar, example_input=torch.zeros(1, 3, 32, 32))] == [2, 3, 4]


@settings(max_examples=25, deadline=None)
@given(budget=st.integers(1, 100_000))
def test_a_budget_of_parameters_is_kept_and_used(budget):
    sites = FOUND
    kept = chosen(sites, SitePolicy(max_parameters=budget), SEConfig())
    spent = sum(site.parameters for site in kept)
    assert spent <= budget
    rest = [site.parameters for site in sites if site not in kept]
    assert not rest or spent + min(rest) > budget


def test_a_budget_for_nothing():
    with pytest.raises(senet.InputError, match="excludes all of them; allow more"):
        names(SitePolicy(max_parameters=579))
    assert names(SitePolicy(max_parameters=580)) == ALL[:1]


def test_a_budget_of_time():
    assert names(SitePolicy(max_milliseconds=1e6)) == ALL
    with pytest.raises(senet.InputError, match="excludes all"):
        names(SitePolicy(max_milliseconds=1e-9))


@pytest.mark.parametrize("name", ["last_stages", "min_channels", "max_parameters", "max_milliseconds"])
@pytest.mark.parametrize("value", [0, -1, "2", True])
def test_bad_policies(name, value):
    with pytest.raises(senet.InputError, match=f"SitePolicy: {name}="):
        SitePolicy(**{name: value})


def test_named_sites_without_a_run():
    """Where no guessed input runs, what modules say of themselves is enough."""

    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.other = nn.Conv2d(3, 8, 3), nn.ReLU()

        def forward(self, x, scale):
            return self.other(self.conv(x)) * scale

    with pytest.raises(senet.InputError, match=one_line("guessed inputs … scale … example_input=")):
        senet.find_sites(Strange())
    (site,) = senet.find_sites(Strange(), sites=["conv"])
    assert (site.channels, site.map_size) == (8, ())
    (site,) = senet.find_sites(Strange(), sites=["conv:input"])
    assert site.channels == 3
    with pytest.raises(senet.InputError, match=one_line("channels of 'other'")):
        senet.find_sites(Strange(), sites=["other"])
    (site,) = senet.find_sites(Strange(), example_input=(X, 2.0))
    assert (site.name, site.kind) == ("other", "activation")
    (site,) = senet.find_sites(Strange(), sites=["other"], example_input={"x": X, "scale": 2.0})
    assert (site.channels, site.map_size) == (8, (62, 62))


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


def test_an_activation_that_is_written_out():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Swish(), nn.Conv2d(8, 4, 3))
    assert names("auto", model=model) == ["2"]


def test_control_flow_that_depends_on_the_data_is_no_obstacle():
    class Branchy(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            conv = self.a if x.sum() > 0 else self.b
            return x + self.norm(conv(x))

    assert names("auto", model=Branchy()) == ["norm"]


def test_a_module_that_is_called_twice_holds_no_gate():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x):
            x = x + self.norm(self.conv(x))
            return x + self.norm(self.conv(x))

    with pytest.raises(senet.InputError, match=one_line("no suitable module")):
        senet.find_sites(Twice(), example_input=X)


def test_vision_without_batch_norm_modules():
    """Frozen batch norm is arithmetic, not a norm: the block's end is found all the same."""
    model = torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d)
    assert names("auto", model=model) == ALL


def test_recorded_multiply_adds():
    found = search(RESNET, SEConfig(), "auto", torch.zeros(1, 3, 224, 224))
    assert found.mult_adds == pytest.approx(1.814e9, rel=1e-3)  # torchvision's own count for resnet18


def test_a_network_in_hugging_faces_style():
    """Keyword input, an image size in its configuration, an output that is no tensor, blocks of modules in lists."""

    class Block(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.layer = nn.ModuleList([nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)])
            self.activation = nn.GELU()

        def forward(self, hidden_state):
            residual = hidden_state
            for layer in self.layer:
                hidden_state = layer(hidden_state)
            return self.activation(hidden_state + residual)

    class Config:
        image_size = 40

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = Config()
            self.embedder = nn.Conv2d(3, 8, 4, 4)
            self.encoder = nn.ModuleList([Block(8), Block(8)])

        def forward(self, pixel_values):
            assert pixel_values.shape[-1] == 40
            hidden_state = self.embedder(pixel_values)
            states = [hidden_state := block(hidden_state) for block in self.encoder]
            return {"last_hidden_state": hidden_state, "hidden_states": tuple(states)}

    model = Model()
    expected = ["encoder.0.layer.1", "encoder.1.layer.1"]
    assert [site.name for site in senet.find_sites(model)] == expected
    pixels = {"pixel_values": torch.randn(2, 3, 40, 40)}
    assert [site.name for site in senet.find_sites(model, example_input=pixels)] == expected
    model.eval()
    with torch.no_grad():
        before = model(**pixels)["last_hidden_state"]
        senet.attach(model)
        assert torch.equal(model(**pixels)["last_hidden_state"], before)


def test_what_a_network_does_to_its_buffers_and_to_chance_is_undone():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return x + self.norm(self.conv(x)) + torch.randn_like(x)

    model = Noisy()
    before = torch.get_rng_state()
    assert names("auto", model=model) == ["norm"]
    assert model.calls == 0
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


@pytest.mark.parametrize("batch", [1, 2])
def test_instance_norms(batch):
    """PyTorch computes them as batch norms of (1, N·C, *spatial): U-Nets for volumes, style transfer."""
    plain = nn.Sequential(nn.Conv3d(1, 8, 3), nn.InstanceNorm3d(8), nn.LeakyReLU(), nn.Conv3d(8, 4, 3))
    assert names("auto", model=plain, x=torch.zeros(batch, 1, 8, 8, 8)) == ["2"]

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.InstanceNorm2d(3, affine=True)

        def forward(self, x):
            return x + self.norm(self.conv(x))

    assert names("auto", model=Residual(), x=torch.zeros(batch, 3, 8, 8)) == ["norm"]
