"Cost: the paper's figures of full-size models, the three tools, masks and selections, and what a count must leave behind."
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import segmentation
from torchvision.models.segmentation.deeplabv3 import ASPP
from opentrans.core import LayerSelection, layers
from opentrans.cost import CONVENTIONS, cost, peak_memory, tool_count, training_flops, training_memory, training_table
from opentrans.pruning import SparseMask


def on_meta(f, *args, **kw):
    with torch.device('meta'): return f(*args, **kw)


@pytest.fixture(scope='module')
def clip(): return on_meta(ModifiedResNet, [3, 4, 6, 3], 1024, 32)


def trunk(m): return lambda x: m.layer4(m.layer3(m.layer2(m.layer1(m.stem(x)))))


# ---- the paper's models at full size ------------------------------------------------------------------------------------------------

TRUNK = {(800, 1216): dict(macs=104.0584704, thop=105.0414848, ptflops=104.8133632, fvcore=104.5409792),
         (512, 512): dict(macs=28.041019392, thop=28.305915904, ptflops=28.244443136, fvcore=28.171042816)}


@pytest.mark.parametrize('size', TRUNK)
@pytest.mark.parametrize('convention', CONVENTIONS)
def test_trunk(clip, size, convention):
    c = cost(clip, (3, *size), convention=convention, forward=trunk(clip)).without('attnpool')
    assert c.macs/1e9 == pytest.approx(TRUNK[size][convention], rel=1e-9)
    assert c.params == 23_527_264 and c.ran.params == c.params


def test_parameters_of_clip(clip):
    whole = cost(clip, (3, 224, 224))
    assert whole.params == 38_316_896 and whole.of('attnpool').params == 14_789_632
    assert whole.by_layer.query("kind == 'conv'").params.sum() == 23_474_016
    big = on_meta(ModifiedResNet, [3, 4, 6, 3], 1024, 32, image_size=512)
    assert cost(big, (3, 512, 512)).of('attnpool').params == 15_213_568
    text = on_meta(TextTransformer, context_length=77, vocab_size=49408, width=512, heads=8, layers=12, output_dim=1024)
    tokens = torch.zeros(2, 77, dtype=torch.long, device='meta')
    assert cost(text, (2, 77), forward=lambda _: text(tokens)).params == 63_690_240


def deeplab_head():
    "ASPP and decoder as the paper's DeepLabV3 has them: low-level features of layer1, no classifier convolution."
    conv = lambda i, o, k: nn.Sequential(nn.Conv2d(i, o, k, padding=k//2, bias=False), nn.BatchNorm2d(o), nn.ReLU())

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.aspp, self.low = ASPP(2048, [6, 12, 18], 256), conv(256, 48, 1)
            self.fuse = nn.Sequential(conv(304, 256, 3), conv(256, 256, 3))

        def forward(self, low, high):
            x = nn.functional.interpolate(self.aspp(high), low.shape[-2:], mode='bilinear')
            return self.fuse(torch.cat([x, self.low(low)], 1))
    return on_meta(Head)


def test_deeplabv3_as_the_paper_counts_it(clip):
    "Trunk at stride 32, head on stride-16 features, thop; pruned = minus 0.9 times the trunk."
    t = cost(clip, (3, 800, 1216), convention='thop', forward=trunk(clip)).without('attnpool')
    h = cost(deeplab_head(), (1, 256, 200, 304), convention='thop', args=(torch.zeros(1, 2048, 50, 76, device='meta'),))
    assert h.of('aspp').macs/1e9 == pytest.approx(57.05719296, rel=1e-6) and h.without('aspp').macs/1e9 == pytest.approx(79.3298944, rel=1e-9)
    whole = t + h
    assert whole.params == 40_366_016 and whole.macs/1e9 == pytest.approx(241.42857216, rel=1e-6)
    pruned = whole - .9*t
    assert pruned.params == pytest.approx(19_191_478.4) and pruned.macs/1e9 == pytest.approx(146.89123584, rel=1e-6)
    # counters may be mixed, as the paper's Han et al. row does; the label says so
    f = cost(deeplab_head(), (1, 256, 200, 304), convention='fvcore', args=(torch.zeros(1, 2048, 50, 76, device='meta'),))
    assert (t + f).convention == 'thop + fvcore' and (t + f).macs == t.macs + f.macs


def test_memory_of_a_full_size_count():
    "RN50 at 800x1216 takes next to no memory, since nothing is computed."
    m = ModifiedResNet([3, 4, 6, 3], 1024, 32)
    def count(): return cost(m, (3, 800, 1216), forward=trunk(m))
    assert count().macs > 1e11
    assert peak_memory(count) < 2**20


# ---- against the tools, and against torch -------------------------------------------------------------------------------------------

ZOO = dict(vit=lambda: VisionTransformer(32, 8, 64, 2, 2, 4., output_dim=32), deeplab=lambda: segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None).eval(),
           clip=lambda: ModifiedResNet([1, 1, 1, 1], 32, 4, image_size=64, width=16))


@pytest.mark.parametrize('tool', ['thop', 'ptflops', 'fvcore'])
@pytest.mark.parametrize('name,size', [('vit', (3, 32, 32)), ('deeplab', (3, 64, 96)), ('clip', (3, 64, 64))])
def test_the_tools_agree_to_the_digit(name, size, tool):
    for lib in ('thop', 'ptflops', 'fvcore'): pytest.importorskip(lib)
    m = ZOO[name]()
    ours, theirs = cost(m, size, convention=tool), tool_count(tool, m, size)
    assert ours.macs == theirs[0]
    if (name, tool) != ('clip', 'thop'): assert ours.params == theirs[1]  # attnpool's projections are called as functions: thop sees no module run


@pytest.mark.parametrize('name,size', [('vit', (3, 32, 32)), ('deeplab', (3, 64, 96)), ('clip', (3, 64, 64))])
def test_our_convention_is_half_of_torchs_flops(name, size):
    m = ZOO[name]().eval()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # torch's counter does not know the fused layer
    with torch.no_grad(), FlopCounterMode(display=False) as f, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH): m(torch.randn(1, *size))
    torch.backends.mha.set_fastpath_enabled(fast)
    assert cost(m, size).macs == f.get_total_flops()/2 and torch.backends.mha.get_fastpath_enabled() == fast
    assert cost(m, size, dry=False).macs == cost(m, size).macs


# ---- masks and selections -----------------------------------------------------------------------------------------------------------

class Framework(nn.Module):
    def __init__(self, net): super().__init__(); self.backbone, self.head = nn.ModuleDict(dict(visual=net)), nn.Conv2d(512, 8, 1)
    @property
    def tower(self): return self.backbone['visual']
    def forward(self, x, text): return torch.einsum('bchw,kc->bkhw', self.head(trunk(self.tower)(x)), text)
    def example_inputs(self, size): return torch.zeros(size), torch.zeros(5, 8)


def test_a_mask_of_the_bare_tower_counts_in_a_framework(tmp_path):
    net = ZOO['clip']()
    mask = SparseMask.magnitude(net, .1)
    bare, seg = cost(net, (3, 64, 64), mask=mask, forward=trunk(net)), cost(Framework(net), (3, 64, 64), mask=mask)
    assert seg.tower.active_macs == pytest.approx(bare.active_macs) and seg.tower.macs == bare.macs
    rows = bare.by_layer
    for n in mask.names:
        d = mask[n].float().mean().item()
        assert rows.active_macs[n] == pytest.approx(d*rows.macs[n]) and rows.active_params[n] == pytest.approx(mask[n].sum().item(), rel=1e-6)
    dense = [n for n in rows.index if n not in mask.names]
    assert (rows.active_macs[dense] == rows.macs[dense]).all() and (seg.head.by_layer.density == 1).all()
    assert set(rows.index[rows.kind == 'conv']) == {l.name for l in layers(net) if l.kind == 'conv'}
    mask.save(tmp_path/'m.safetensors')
    assert cost(Framework(net), (3, 64, 64), mask=SparseMask.load(tmp_path/'m.safetensors')).active_macs == seg.active_macs


def test_packed_projections_have_rows_of_their_own():
    v = ZOO['vit']()
    t = cost(v, (3, 32, 32)).by_layer
    n, L = 64, 17
    for p in 'qkv': assert t.macs[f'transformer.resblocks.0.attn.in_proj_weight[{p}]'] == L*n*n
    assert t.macs['transformer.resblocks.0.attn:attention'] == 2*L*L*n
    half = cost(v, (3, 32, 32), mask={'transformer.resblocks.0.attn.in_proj_weight': .5, 'transformer.resblocks.0.attn.out_proj.weight': .25})
    assert half.macs - half.active_macs == .5*3*L*n*n + .75*L*n*n
    s = LayerSelection(['transformer.resblocks.0.attn.in_proj_weight[v]'], ['transformer.resblocks.0.attn.in_proj_weight[q]'])
    full = training_table(cost(v, (3, 32, 32))).to_numpy().sum()
    assert full - training_table(cost(v, (3, 32, 32)), selection=s).to_numpy().sum() == L*n*n


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 3]), st.integers(8, 17), st.integers(8, 17), st.integers(1, 2), st.floats(0, 1))
def test_properties(batch, cin, cout, k, h, w, stride, density):
    "Closed form of a convolution, linear in the batch, linear in the density, and costs add."
    m = nn.Sequential(nn.Conv2d(cin, cout, k, stride, padding=k//2), nn.ReLU(), nn.Conv2d(cout, 3, 1))
    one, many = cost(m, (cin, h, w)), cost(m, (batch, cin, h, w))
    oh, ow = (h + stride - 1)//stride, (w + stride - 1)//stride
    assert one.macs == oh*ow*(cin*cout*k*k + cout*3) and many.macs == batch*one.macs and many.params == one.params
    assert many.under(density).active_macs == pytest.approx(density*many.macs)
    assert (many - one).macs == (batch-1)*one.macs and (one + one).macs == (2*one).macs and (many - many).params == 0
    k3 = dict(iterations=7, batch_size=5)
    assert training_flops(one, **k3) == training_flops(many, **k3) == 7*5*3*one.macs
    frozen = LayerSelection(['2.weight'], ['0.weight'])
    assert training_flops(one, selection=frozen, **k3) == 35*(3*one.macs - one.by_layer.macs['0.weight'])
    assert training_flops(one, mask=density, head=10, **k3) == pytest.approx(35*((1 + 2*density)*one.macs + 30))
    assert training_flops(one, mask=density, selection=frozen, **k3) <= training_flops(one, mask=density, **k3) + 1e-6
    assert training_flops(one, rule='exact', **k3) == 35*(3*one.macs - one.by_layer.macs['0.weight'])


# ---- what a count leaves behind -----------------------------------------------------------------------------------------------------

def test_nothing_is_left_behind():
    net = ZOO['clip']().train(); net.layer2.eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modes, rng = [m.training for m in net.modules()], torch.get_rng_state()
    grads = [p.requires_grad for p in net.parameters()]
    for c in CONVENTIONS: cost(net, (3, 64, 64), convention=c)
    training_memory(net, (2, 3, 64, 64), LayerSelection([], ['conv1.weight']))
    for bad in (lambda: cost(net, (4, 64, 64)), lambda: training_memory(net, (4, 64, 64))):
        with pytest.raises(Exception): bad()
    assert [m.training for m in net.modules()] == modes and torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(v, before[k]) and type(v) is torch.Tensor for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters()) and [p.requires_grad for p in net.parameters()] == grads
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_memory_estimate_of_a_deeper_freeze_is_smaller_and_of_a_batch_larger():
    net = ZOO['clip']()
    e = lambda b=2, **kw: training_memory(net, (b, 3, 64, 64), **kw)
    full = e(optimizer='adamw')
    assert e(b=4).activations == pytest.approx(2*full.activations, rel=.02)
    assert full.optimizer == 2*full.gradients and full.gradients == full.weights
    convs = [l.name for l in layers(net) if l.kind == 'conv']
    half = e(selection=LayerSelection(convs[8:], convs[:8]))
    frozen = sum(dict(net.named_parameters())[n].numel()*4 for n in convs[:8])
    assert full.gradients - half.gradients == frozen and half.peak <= full.peak - full.optimizer
    for p in net.layer1.parameters(): p.requires_grad_(False)
    for n in ('conv1', 'bn1', 'conv2', 'bn2', 'conv3', 'bn3'): getattr(net, n).requires_grad_(False)
    assert e().activations < .8*half.activations
