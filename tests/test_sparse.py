"""The sparse engine: the same numbers as torch, for every size, stride, group and density, on vectors of every
width."""
import copy, math, os, pickle
import pytest
import torch
from hypothesis import given, settings, strategies as st
from timm.layers import Conv2dSame
from torch import nn
from opentrans import sparse
from opentrans.errors import OpenTransError
from opentrans.pruning import SparseMask
from opentrans.sparse.kernels import kernel_name, kernel_text
from opentrans.sparse.machine import kernel_key, KernelCache, Machine, native_functions
from opentrans.sparse.linear import NativeLinear
from opentrans.sparse.plan import Plan
from opentrans.sparse.regions import capture

pytestmark = pytest.mark.skipif(not sparse.has_llvm(), reason='llvmlite is not installed')

@pytest.fixture(scope='module', autouse=True)
def own_cache(tmp_path_factory):
    "Kernels of these tests are kept in a folder of their own."
    before, folder = os.environ.get('OPENTRANS_CACHE'), tmp_path_factory.mktemp('kernels')
    os.environ['OPENTRANS_CACHE'] = str(folder)
    yield folder
    if before is None: del os.environ['OPENTRANS_CACHE']
    else: os.environ['OPENTRANS_CACHE'] = before

def far(a, b):
    "The largest difference, as a share of the largest value."
    return float((a - b).abs().max()/b.abs().max().clamp(min=1e-20)) if b.numel() else 0.

def thinned(model, density, seed=0):
    "Weights at random places become zero."
    g = torch.Generator().manual_seed(seed)
    for part in model.modules():
        if isinstance(part, nn.Conv2d): part.weight.data *= torch.rand(part.weight.shape, generator=g) < density
    return model

def lively(model, seed=0):
    "Batch norms with statistics as after training."
    g = torch.Generator().manual_seed(seed)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.copy_(torch.randn(part.running_mean.shape, generator=g)*.2)
            part.running_var.copy_(torch.rand(part.running_var.shape, generator=g) + .5)
            part.weight.data.copy_(torch.rand(part.weight.shape, generator=g) + .5)
            part.bias.data.copy_(torch.randn(part.bias.shape, generator=g)*.2)
    return model.eval()

def planned(model, x, **kwargs):
    "Outputs of a sequence of layers by a plan."
    captured = capture(model.eval())
    region, = captured.regions.values()
    return Plan(region, [tuple(x.shape[1:])], **kwargs).run([x])[0]

@st.composite
def convolutions(draw):
    "A convolution with zeros in it, and images that it can read."
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    inputs, outputs = groups*draw(st.integers(1, 6)), groups*draw(st.integers(1, 9))
    if draw(st.integers(0, 5)) == 0: groups = outputs = inputs
    kernel, dilation = (draw(st.integers(1, 5)), draw(st.integers(1, 5))), draw(st.integers(1, 3))
    stride, padding = draw(st.sampled_from([1, 1, 2, 3, 4])), (draw(st.integers(0, 4)), draw(st.integers(0, 4)))
    kind = draw(st.sampled_from([nn.Conv2d, nn.Conv2d, Conv2dSame]))
    if kind is Conv2dSame: padding = (0, 0) # as many zeros as the size needs
    least = [1 if kind is Conv2dSame else max(1, dilation*(k - 1) + 1 - 2*p) for k, p in zip(kernel, padding)]
    height, width = (n + draw(st.integers(0, 24)) for n in least)
    bias, density = draw(st.booleans()), draw(st.sampled_from([0., .1, .5, 1.]))
    seed, batch = draw(st.integers(0, 99)), draw(st.integers(1, 3))
    torch.manual_seed(seed)
    conv = kind(inputs, outputs, kernel, stride, padding, dilation, groups, bias)
    layers = [thinned(conv, density, seed)]
    if draw(st.booleans()): layers.append(lively(nn.BatchNorm2d(outputs), seed))
    if draw(st.booleans()): layers.append(draw(st.sampled_from([nn.ReLU(), nn.ReLU6()])))
    return nn.Sequential(*layers).eval(), torch.randn(batch, inputs, height, width)

@given(convolutions(), st.sampled_from(['measured', True, False]), st.sampled_from([4, 8, 16]),
       st.sampled_from([1, 1, 2]), st.sampled_from([None, None, 2, 3]))
@settings(max_examples=150, deadline=None)
@torch.no_grad()
def test_convolutions_are_those_of_torch(case, dense, width, threads, groups):
    model, x = case
    got = planned(model, x, dense=dense, machine=Machine.of_width(width), threads=threads, groups=groups)
    want = copy.deepcopy(model).double()(x.double())
    assert got.shape == want.shape and far(got.double(), want) < 1e-5

@given(st.one_of(st.tuples(st.integers(1, 40), st.integers(1, 40)),
                 st.sampled_from([(1, 1), (1, 1333), (800, 1), (427, 640), (800, 1333)])),
       st.integers(1, 2), st.floats(0, 1), st.booleans())
@settings(max_examples=30, deadline=None)
@torch.no_grad()
def test_sizes_from_a_pixel_to_a_photograph(size, batch, density, empty):
    "Two layers and a sum, some output channels without any weight."
    torch.manual_seed(size[0]*size[1])
    first, second = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 5, 1)
    net = thinned(nn.Sequential(first, nn.ReLU(), second), density)
    if empty: first.weight[1::2] = 0
    x = torch.randn(batch if size[0]*size[1] < 10**5 else 1, 3, *size)
    assert far(planned(net, x), copy.deepcopy(net).double()(x.double()).float()) < 1e-5

@given(st.sampled_from(['max', 'mean']), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2),
       st.integers(5, 40), st.integers(5, 40), st.sampled_from([4, 16]))
@settings(max_examples=60, deadline=None)
@torch.no_grad()
def test_pools_are_those_of_torch(kind, side, stride, padding, height, width, lanes):
    padding = min(padding, side//2)
    pool = nn.MaxPool2d(side, stride, padding) if kind == 'max' else nn.AvgPool2d(side, stride, padding)
    torch.manual_seed(height*width)
    model = nn.Sequential(nn.Conv2d(2, 5, 1), nn.ReLU(), pool, nn.Conv2d(5, 3, 3, padding=1)).eval()
    x = torch.randn(2, 2, height, width)
    assert far(planned(model, x, machine=Machine.of_width(lanes)), model(x)) < 1e-5

class Block(nn.Module):
    "A residual block with a stride, as torchvision and CLIP have them."
    def __init__(self, inputs, inside, outputs, stride=1, pool=False):
        super().__init__()
        first = stride if not pool else 1
        self.conv1, self.bn1 = nn.Conv2d(inputs, inside, 1, bias=False), nn.BatchNorm2d(inside)
        self.conv2, self.bn2 = nn.Conv2d(inside, inside, 3, first, 1, bias=False), nn.BatchNorm2d(inside)
        self.pool = nn.AvgPool2d(stride) if pool and stride > 1 else nn.Identity()
        self.conv3, self.bn3 = nn.Conv2d(inside, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        short = [self.pool] if pool else []
        self.short = (nn.Sequential(*short, nn.Conv2d(inputs, outputs, 1, first, bias=False),
                                    nn.BatchNorm2d(outputs)) if stride > 1 or inputs != outputs else None)
    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.pool(self.relu(self.bn2(self.conv2(out))))
        out = self.bn3(self.conv3(out))
        out += x if self.short is None else self.short(x)
        return self.relu(out)

def small_net(pool, seed=0):
    torch.manual_seed(seed)
    blocks = [Block(8, 6, 16, 1, pool), Block(16, 6, 16, 1, pool), Block(16, 8, 24, 2, pool),
              Block(24, 8, 24, 1, pool)]
    return lively(nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
                                *blocks), seed)

@pytest.mark.parametrize('pool', [False, True])
@pytest.mark.parametrize('size', [(32, 32), (64, 64), (97, 61), (8, 8)])
@torch.no_grad()
def test_residual_networks(pool, size):
    "Everything is one region; calls of other sizes and batches do not disturb one another."
    net = thinned(small_net(pool), .4)
    fast = sparse.compile(net)
    assert len(fast.sparse_regions) == 1
    for batch in (1, 3):
        x = torch.randn(batch, 3, *size)
        want = net(x.clone())
        for _ in range(2): assert far(fast(x), want) < 1e-5
    other = torch.randn(1, 3, 40, 48)
    assert far(fast(other), net(other)) < 1e-5 and far(fast(x), want) < 1e-5
    assert fast.sparse_regions[0].error < 1e-5 and not fast.sparse_regions[0].reasons

@pytest.mark.parametrize('dense', ['measured', True, False])
@pytest.mark.parametrize('groups', [None, 1, 3])
@torch.no_grad()
def test_groups_of_channels_and_residuals(dense, groups):
    "A sum that is written over one of its parts is right for any number of groups."
    net, x = thinned(small_net(True), .5), torch.randn(1, 3, 48, 40)
    assert far(planned(net, x, dense=dense, groups=groups), net(x)) < 1e-5

@pytest.mark.parametrize('threads', [2, 3, 5])
@torch.no_grad()
def test_threads_give_the_same(threads):
    net = thinned(small_net(True), .2)
    x = torch.randn(2, 3, 64, 80)
    assert far(sparse.compile(net, threads=threads)(x), net(x)) < 1e-5

@torch.no_grad()
def test_density_zero_and_what_is_no_number():
    "Without weights the bias is left; NaN goes through sums, activations and pools as in torch."
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()).eval()
    net[0].weight.data.zero_()
    fast, x = sparse.compile(net), torch.randn(1, 3, 5, 6)
    assert fast(x).equal(net(x))
    net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.MaxPool2d(2)).eval()
    x = torch.ones(1, 1, 6, 6)
    for place in ((0, 0), (1, 0), (0, 1), (3, 3)): x[0, 0][place] = math.nan
    assert sparse.compile(net)(x).isnan().equal(net(x).isnan())

class Overwriting(nn.Module):
    "What an activation overwrites is read afterwards."
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(4, 4, 1)
    def forward(self, x):
        before = self.first(x)
        after = self.act(before)
        return self.second(after) + before

@torch.no_grad()
def test_what_is_overwritten_is_as_in_torch():
    net, x = Overwriting().eval(), torch.randn(2, 2, 9, 9)
    assert far(sparse.compile(net)(x), net(x)) < 1e-6

class Odd(nn.Module):
    "Parts that the engine does not know, between parts that it does."
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1, padding_mode='reflect')
        self.c = nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.linear = nn.GroupNorm(2, 8), nn.Linear(8, 4)
    def forward(self, x):
        x = torch.sigmoid(self.a(x))
        return self.linear((self.c(self.norm(self.b(x)) + 1) + x).mean((2, 3)))

@torch.no_grad()
def test_what_is_not_known_runs_on_torch():
    net, x = Odd().eval(), torch.randn(2, 3, 12, 10)
    assert far(sparse.compile(net)(x), net(x)) < 1e-5
    table = sparse.supported(net)
    assert table.engine.to_dict() == dict(a=True, b=False, c=True, linear=False)
    assert 'reflect' in table.why['b'] and 'dense' in table.why['linear']

@torch.no_grad()
def test_what_does_not_fit_runs_on_torch():
    "Other types, gradients, other maps than planned, and errors of torch's own."
    net = thinned(small_net(False), .5)
    fast = sparse.compile(net)
    x = torch.randn(1, 3, 32, 32)
    with torch.enable_grad():
        asked = x.clone().requires_grad_()
        assert fast(asked).grad_fn is not None
    assert far(copy.deepcopy(fast).double()(x.double()), net.double()(x.double())) < 1e-6
    net.float()
    assert fast(torch.randn(0, 3, 32, 32)).shape[0] == 0
    for wrong in (torch.randn(1, 4, 32, 32), torch.randn(3, 32)):
        with pytest.raises(RuntimeError): fast(wrong)
    tight = sparse.compile(nn.Sequential(nn.Conv2d(3, 3, 5)).eval())
    with pytest.raises(RuntimeError): tight(torch.randn(1, 3, 4, 9))

class Parted(nn.Module):
    "What cannot be traced as a whole: its parts are compiled one by one, a bare convolution among them."
    def __init__(self):
        super().__init__()
        self.first, self.rest = nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
    def forward(self, x):
        x = self.first(x)
        return self.rest(x) if x.sum() > 0 else self.rest(-x)

@torch.no_grad()
def test_parts_of_what_cannot_be_traced():
    net, x = Parted().eval(), torch.randn(2, 3, 9, 8)
    fast = sparse.compile(net)
    assert sparse.supported(net).engine.all() and len(fast.sparse_regions) == 2
    for model in (fast, copy.deepcopy(fast)): assert far(model(x), net(x)) < 1e-5
    assert copy.deepcopy(fast).double()(x.double()).dtype == torch.float64

@torch.no_grad()
def test_dense_regions_go_where_they_are_faster(monkeypatch):
    "A region with most of its weights is timed, and left to torch if torch is faster; a sparse one is not timed."
    x = torch.randn(1, 3, 32, 32)
    for density, clock, left in ((1., (9., 1.), True), (1., (1., 9.), False), (.2, (9., 1.), False)):
        net, told = thinned(small_net(True), density), iter([n for ms in clock for n in (0, ms)*3])
        monkeypatch.setattr('opentrans.sparse.engine.time.process_time', lambda told=told: next(told))
        fast = sparse.compile(net)
        region, = fast.sparse_regions
        assert far(fast(x), net(x)) < 1e-5 and bool(region.faster) == left and bool(region.plans) != left
        assert far(fast(x), net(x)) < 1e-5 and not region.reasons

@torch.no_grad()
def test_new_weights_are_seen():
    net = thinned(small_net(True), .5)
    fast, x = sparse.compile(net), torch.randn(1, 3, 32, 32)
    fast(x)
    changed = lively(small_net(True, seed=3), seed=4)
    fast.load_state_dict(changed.state_dict())
    assert far(fast(x), changed(x)) < 1e-5
    replaced = copy.deepcopy(changed)
    for model in (fast, replaced):
        layer = next(part for part in model.modules() if isinstance(part, nn.Conv2d))
        layer.weight = nn.Parameter(layer.weight*2)
    assert far(fast(x), replaced(x)) < 1e-5 and far(fast(x), changed(x)) > 1e-3

def test_errors_say_what_to_do():
    with pytest.raises(OpenTransError, match='eval'):
        sparse.compile(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    with pytest.raises(OpenTransError, match='eval'): sparse.compile(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout2d()))
    with pytest.raises(OpenTransError, match='threads'): sparse.compile(nn.Conv2d(3, 3, 1).eval(), threads=0)
    with pytest.raises(OpenTransError, match='kernels'): sparse.compile(nn.Conv2d(3, 3, 1).eval(), kernels='sparse')
    with pytest.raises(OpenTransError, match='model'): sparse.compile('RN50')
    with pytest.raises(OpenTransError, match='8 or 16'): Machine.of_width(3)
    with pytest.raises(OpenTransError, match='sparse-4'): kernel_text('winograd-4')

@torch.no_grad()
def test_a_dropout_in_training_mode_drops_out():
    "Also after a call in eval mode, when the plan is there."
    net = sparse.compile(thinned(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout(.5)), .2).eval())
    x = torch.randn(1, 3, 20, 20)
    whole = net(x)
    assert .3 < (net.train()(x) == 0).float().mean() < .7 and net.eval()(x).equal(whole)

def test_a_part_called_visual_is_no_backbone():
    "Its layers keep their names."
    net = nn.Module()
    net.visual = nn.Sequential()
    net.visual.add_module('net', nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)))
    assert sparse.supported(net.eval()).engine.to_dict() == {'visual.net.0': True, 'visual.net.1': True}

# masks, backbones

@pytest.fixture(scope='module')
def backbone():
    from opentrans.clip import ClipBackbone
    return ClipBackbone.create('shapes-rn', pretrained='shapes-rn')

@torch.no_grad()
def test_a_mask_compiles_a_backbone(backbone):
    "Maps and embeddings are those of the masked backbone; the model that was given stays as it was."
    mask = SparseMask.magnitude(backbone, .2)
    before = {n: t.clone() for n, t in backbone.state_dict().items()}
    fast = mask.compile(backbone)
    assert all(t.equal(before[n]) for n, t in backbone.state_dict().items()) and [*fast.state_dict()] == [*before]
    slow = copy.deepcopy(backbone)
    mask.apply(slow).remove()
    images = torch.rand(2, 3, 64, 96)
    want, got = slow(images), fast(images)
    assert [*want] == [*got] and all(far(got[k], want[k]) < 1e-5 for k in want)
    assert far(fast.dense_embeddings(images), slow.dense_embeddings(images)) < 1e-5
    assert far(fast.encode_image(images), slow.encode_image(images)) < 1e-5
    regions = [torch.zeros(1, 64, 96).index_fill_(2, torch.arange(30), 1)]*2
    assert far(fast.region_embeddings(images, regions), slow.region_embeddings(images, regions)) < 1e-5
    assert len(fast.sparse_regions) == 1 and not fast.sparse_regions[0].reasons
    assert far(copy.deepcopy(fast)(images)['res5'], want['res5']) < 1e-5

def test_supported_names_the_layers(backbone):
    table = sparse.supported(backbone)
    inside = table.engine[table.index.str.startswith('visual.layer') | table.index.str.fullmatch(r'visual.conv\d')]
    assert inside.all() and len(inside) > 10
    assert not table.engine[table.index.str.contains('attnpool')].any()

@pytest.mark.parametrize('name', ['resnet18', 'resnet26d', 'seresnet18', 'regnetx_002', 'mobilenetv2_050'])
@torch.no_grad()
def test_models_of_timm(name):
    "Whatever the engine takes of them, and whatever it leaves, the outputs agree."
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    net = thinned(lively(timm.create_model(name, num_classes=7)), .3)
    x = torch.randn(1, 3, 64, 64)
    fast = sparse.compile(net)
    assert sparse.supported(net).engine.any() and far(fast(x), net(x)) < 1e-4
    assert all(not region.reasons for region in fast.sparse_regions)

@torch.no_grad()
def test_a_tower_that_pads_by_the_size_of_the_image_is_one_region():
    "TensorFlow's EfficientNets, of which photo-lite0 is one: all their convolutions run on the engine."
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    net = thinned(lively(timm.create_model('tf_efficientnet_lite0', num_classes=7)), .2)
    fast, told = sparse.compile(net), sparse.supported(net)
    assert told.engine[told.kind != 'Linear'].all() and 'Conv2dSame' in {*told.kind}
    for size in ((64, 64), (65, 50), (33, 1)):
        x = torch.randn(2, 3, *size)
        assert far(fast(x), net(x)) < 1e-4
    region, = fast.sparse_regions
    assert len(region.plans) == 3 and not region.reasons

@pytest.mark.parametrize('name,stride',
                         [('deeplabv3', 32), ('deeplabv3', 16), ('fcclip', 32), ('mask2former', 32), ('fpn', 32)])
@torch.no_grad()
def test_frameworks_run_on_the_engine(name, stride):
    "A framework finds its backbone's maps where it always did: the same scores, the same class at every pixel."
    from opentrans.frameworks import build
    from opentrans.frameworks.contract import tiny_backbone
    backbone = lively(tiny_backbone(0))
    options = dict(output_stride=stride) if name == 'deeplabv3' else {}
    slow = build(name, backbone, ['cat', 'dog', 'sky'], seed=0, **options).eval()
    mask = SparseMask.magnitude(slow.backbone, .3)
    fast = mask.compile(slow)
    mask.apply(slow).remove()
    images = torch.rand(2, 3, 96, 64)
    assert fast.sparse_regions and far(fast(images, fast.text()), slow(images, slow.text())) < 1e-4
    assert fast.semantic(images, fast.text()).equal(slow.semantic(images, slow.text()))
    assert (not any(region.reasons for region in fast.sparse_regions)
            and any(region.plans for region in fast.sparse_regions))

# linear layers

@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([0., .1, 1.]), st.booleans(),
       st.lists(st.integers(1, 7), max_size=3), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
@torch.no_grad()
def test_linear_layers_are_those_of_torch(inputs, outputs, density, bias, shape, seed):
    torch.manual_seed(seed)
    layer = nn.Linear(inputs, outputs, bias)
    layer.weight.data *= torch.rand_like(layer.weight) < density
    x = torch.randn(*shape, inputs)
    native, want = NativeLinear(layer), layer.double()(x.double())
    layer.float()
    assert native(x).shape == want.shape and far(native(x).double(), want) < 1e-5 and not native.reasons

@pytest.mark.parametrize('name', ['shapes-vit', 'shapes-convnext'])
@torch.no_grad()
def test_towers_of_linear_layers(name):
    "A ViT's hidden layers and ConvNeXt's pointwise ones run on the engine where a mask has removed most of them."
    from opentrans.clip import ClipBackbone
    backbone = ClipBackbone.create(name, pretrained=name)
    mask = SparseMask.magnitude(backbone, .1)
    fast = mask.compile(backbone)
    mask.apply(backbone).remove()
    images = torch.rand(2, 3, 64, 64)
    want, got = backbone(images), fast(images)
    assert (all(far(got[k], want[k]) < 1e-4 for k in want)
            and far(copy.deepcopy(fast)(images)['res5'], want['res5']) < 1e-4)
    table = sparse.supported(backbone)
    assert (table.kind[table.engine] == 'Linear').sum() >= 4
    ours = [part.forward for part in fast.modules() if isinstance(getattr(part, 'forward', None), NativeLinear)]
    assert len(ours) >= 4 and all(native.plans and not native.reasons for native in ours)
    assert (sparse.supported(ClipBackbone.create(name, pretrained=name)).kind != 'Linear').any()

# smaller models

@torch.no_grad()
def test_a_pool_of_fewer_channels_than_threads():
    net = nn.Sequential(nn.Conv2d(3, 1, 3), nn.AvgPool2d(2)).eval()
    images = torch.randn(1, 3, 16, 16)
    assert far(planned(net, images, threads=2), net(images)) < 1e-5

def far_maps(a, b): return max(far(a[k], b[k]) for k in b)

@pytest.mark.parametrize('name', ['shapes-rn', 'shapes-vit'])
@torch.no_grad()
def test_inner_channels_are_cut_out(name):
    """A mask of whole inner channels gives a smaller model with the outputs of the masked one, before and after
    `compile`."""
    from opentrans.clip import ClipBackbone
    backbone = ClipBackbone.create(name, pretrained=name)
    mask = SparseMask.inner(backbone, .4)
    small = mask.slim(backbone)
    mask.apply(backbone).remove()
    images = torch.rand(2, 3, 64, 64)
    want = backbone(images)
    assert far_maps(small(images), want) < 1e-4 and far_maps(sparse.compile(small)(images), want) < 1e-4
    def count(net): return sum(p.numel() for p in net.visual.parameters())
    assert count(small) < count(backbone)
    assert far(small.dense_embeddings(images), backbone.dense_embeddings(images)) < 1e-4

@torch.no_grad()
def test_constants_are_taken_up():
    """Rows that a mask has removed leave a constant; a layer of one pixel takes it up, one of nine can only lose it
    where it is zero."""
    net = small_net(True).eval()
    mask = SparseMask.magnitude(net, .5, scope='channel')
    small = mask.slim(net)
    mask.apply(net).remove()
    x = torch.randn(2, 3, 64, 64)
    assert far(small(x), net(x)) < 1e-5
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())

# programs and their cache

def test_object_code_is_kept_and_checked(tmp_path):
    machine, cache = Machine.host(), KernelCache(tmp_path/'kernels')
    text = kernel_text('planes-2', 2).replace(kernel_name('planes-2', 2), 'opentrans_of_this_test')
    key = kernel_key(text, machine)
    assert cache.read(key) is None
    assert native_functions(dict(opentrans_of_this_test=text), machine, cache)['opentrans_of_this_test']
    code = cache.read(key)
    assert code and kernel_key(text + ' ', machine) != key
    path = cache.path(key)
    if hasattr(os, 'getuid'):
        assert path.stat().st_mode & 0o77 == 0
        path.chmod(0o666)
        assert cache.read(key) is None          # others may have written it
        path.chmod(0o600)
        cache.folder.chmod(0o777)
        assert cache.read(key) is None
        cache.folder.chmod(0o700)
    assert cache.read(key) == code
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    assert cache.read(key) is None              # damaged
    path.write_bytes(b'')
    assert cache.read(key) is None
    cache.write(key, code)
    other = cache.path('0'*64)
    other.write_bytes(path.read_bytes())
    assert cache.read('0'*64) is None           # of another program

def test_a_cache_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path/'file').write_text('')
    cache = KernelCache(tmp_path/'file'/'kernels')
    cache.write('a', b'code')
    assert cache.read('a') is None

@torch.no_grad()
def test_without_llvm_everything_runs_on_torch(monkeypatch):
    monkeypatch.setattr('opentrans.sparse.engine.has_llvm', lambda: False)
    net, x = small_net(True), torch.randn(1, 3, 32, 32)
    fast = sparse.compile(net)
    assert fast(x).equal(net(x)) and 'llvmlite' in fast.sparse_regions[0].why_not([x])

@pytest.mark.parametrize('model', [nn.Sequential(nn.Conv2d(8, 8, 3)), nn.Sequential(nn.Linear(64, 64))])
def test_a_compiled_model_is_not_pickled_but_says_what_can_be_kept(model):
    for part in model: part.weight.data[1:] = 0
    fast = sparse.compile(model.eval())
    with pytest.raises(OpenTransError, match='compile them where they are loaded'): pickle.dumps(fast)
    assert copy.deepcopy(fast).state_dict().keys() == model.state_dict().keys()
