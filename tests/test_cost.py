"""Cost: the paper's figures of full-size models, the three tools, masks and selections, and what a count must leave
behind."""
import copy, functools, gc, types
import pytest, torch
from hypothesis import given, settings, strategies as st
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import segmentation
from torchvision.models.segmentation.deeplabv3 import ASPP
from opentrans.core import layers, LayerSelection
from opentrans.errors import OpenTransError
from opentrans.cost import (CONVENTIONS, cost, peak_memory, tool_count, training_flops, training_memory,
                            training_table)
from opentrans.pruning import SparseMask


def on_meta(f, *args, **kw):
    with torch.device('meta'): return f(*args, **kw)


@pytest.fixture(scope='module')
def clip(): return on_meta(ModifiedResNet, [3, 4, 6, 3], 1024, 32)


def trunk(m): return lambda x: m.layer4(m.layer3(m.layer2(m.layer1(m.stem(x)))))


# ---- the paper's models at full size

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
    text = on_meta(TextTransformer, context_length=77, vocab_size=49408, width=512, heads=8, layers=12,
                   output_dim=1024)
    tokens = torch.zeros(2, 77, dtype=torch.long, device='meta')
    assert cost(text, (2, 77), forward=lambda _: text(tokens)).params == 63_690_240


def deeplab_head():
    "ASPP and decoder as the paper's DeepLabV3 has them: low-level features of layer1, no classifier convolution."
    def conv(i, o, k):
        return nn.Sequential(nn.Conv2d(i, o, k, padding=k//2, bias=False), nn.BatchNorm2d(o), nn.ReLU())

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
    h = cost(deeplab_head(), (1, 256, 200, 304), convention='thop',
             args=(torch.zeros(1, 2048, 50, 76, device='meta'),))
    assert (h.of('aspp').macs/1e9 == pytest.approx(57.05719296, rel=1e-6)
            and h.without('aspp').macs/1e9 == pytest.approx(79.3298944, rel=1e-9))
    whole = t + h
    assert whole.params == 40_366_016 and whole.macs/1e9 == pytest.approx(241.42857216, rel=1e-6)
    pruned = whole - .9*t
    assert pruned.params == pytest.approx(19_191_478.4) and pruned.macs/1e9 == pytest.approx(146.89123584, rel=1e-6)
    # counters may be mixed, as the paper's Han et al. row does; the label says so
    f = cost(deeplab_head(), (1, 256, 200, 304), convention='fvcore',
             args=(torch.zeros(1, 2048, 50, 76, device='meta'),))
    assert (t + f).convention == 'thop + fvcore' and (t + f).macs == t.macs + f.macs


def test_memory_of_a_full_size_count():
    "RN50 at 800x1216 takes next to no memory, since nothing is computed."
    m = ModifiedResNet([3, 4, 6, 3], 1024, 32)
    def count(): return cost(m, (3, 800, 1216), forward=trunk(m))
    assert count().macs > 1e11
    assert peak_memory(count) < 2**20


# ---- against the tools, and against torch

ZOO = dict(vit=lambda: VisionTransformer(32, 8, 64, 2, 2, 4., output_dim=32),
           deeplab=lambda: segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None).eval(),
           clip=lambda: ModifiedResNet([1, 1, 1, 1], 32, 4, image_size=64, width=16))


@pytest.mark.parametrize('tool', ['thop', 'ptflops', 'fvcore'])
@pytest.mark.parametrize('name,size', [('vit', (3, 32, 32)), ('deeplab', (3, 64, 96)), ('clip', (3, 64, 64))])
def test_the_tools_agree_to_the_digit(name, size, tool):
    for lib in ('thop', 'ptflops', 'fvcore'): pytest.importorskip(lib)
    m = ZOO[name]()
    ours, theirs = cost(m, size, convention=tool), tool_count(tool, m, size)
    assert ours.macs == theirs[0]
    # attnpool's projections are called as functions: thop sees no module run
    if (name, tool) != ('clip', 'thop'): assert ours.params == theirs[1]


@pytest.mark.parametrize('name,size', [('vit', (3, 32, 32)), ('deeplab', (3, 64, 96)), ('clip', (3, 64, 64))])
def test_our_convention_is_half_of_torchs_flops(name, size):
    m = ZOO[name]().eval()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # torch's counter does not know the fused layer
    with torch.no_grad(), FlopCounterMode(display=False) as f, torch.nn.attention.sdpa_kernel(
        torch.nn.attention.SDPBackend.MATH):
        m(torch.randn(1, *size))
    torch.backends.mha.set_fastpath_enabled(fast)
    assert cost(m, size).macs == f.get_total_flops()/2 and torch.backends.mha.get_fastpath_enabled() == fast
    assert cost(m, size, dry=False).macs == cost(m, size).macs


# ---- masks and selections

class Framework(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.backbone, self.head = nn.ModuleDict(dict(visual=net)), nn.Conv2d(512, 8, 1)
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
        assert (rows.active_macs[n] == pytest.approx(d*rows.macs[n])
                and rows.active_params[n] == pytest.approx(mask[n].sum().item(), rel=1e-6))
    dense = [n for n in rows.index if n not in mask.names]
    assert (rows.active_macs[dense] == rows.macs[dense]).all() and (seg.head.by_layer.density == 1).all()
    assert set(rows.index[rows.kind == 'conv']) == {layer.name for layer in layers(net) if layer.kind == 'conv'}
    mask.save(tmp_path/'m.safetensors')
    assert cost(Framework(net), (3, 64, 64),
                mask=SparseMask.load(tmp_path/'m.safetensors')).active_macs == seg.active_macs


def test_packed_projections_have_rows_of_their_own():
    v = ZOO['vit']()
    t = cost(v, (3, 32, 32)).by_layer
    n, L = 64, 17
    for p in 'qkv': assert t.macs[f'transformer.resblocks.0.attn.in_proj_weight[{p}]'] == L*n*n
    assert t.macs['transformer.resblocks.0.attn:attention'] == 2*L*L*n
    half = cost(v, (3, 32, 32),
                mask={'transformer.resblocks.0.attn.in_proj_weight': .5,
                      'transformer.resblocks.0.attn.out_proj.weight': .25})
    assert half.macs - half.active_macs == .5*3*L*n*n + .75*L*n*n
    s = LayerSelection(['transformer.resblocks.0.attn.in_proj_weight[v]'],
                       ['transformer.resblocks.0.attn.in_proj_weight[q]'])
    full = training_table(cost(v, (3, 32, 32))).to_numpy().sum()
    assert full - training_table(cost(v, (3, 32, 32)), selection=s).to_numpy().sum() == L*n*n


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 3]), st.integers(8, 17),
       st.integers(8, 17), st.integers(1, 2), st.floats(0, 1))
def test_properties(batch, cin, cout, k, h, w, stride, density):
    "Closed form of a convolution, linear in the batch, linear in the density, and costs add."
    m = nn.Sequential(nn.Conv2d(cin, cout, k, stride, padding=k//2), nn.ReLU(), nn.Conv2d(cout, 3, 1))
    one, many = cost(m, (cin, h, w)), cost(m, (batch, cin, h, w))
    oh, ow = (h + stride - 1)//stride, (w + stride - 1)//stride
    assert one.macs == oh*ow*(cin*cout*k*k + cout*3) and many.macs == batch*one.macs and many.params == one.params
    assert many.with_mask(density).active_macs == pytest.approx(density*many.macs)
    assert ((many - one).macs == (batch-1)*one.macs and (one + one).macs == (2*one).macs
            and (many - many).params == 0)
    k3 = dict(iterations=7, batch_size=5)
    assert training_flops(one, **k3) == training_flops(many, **k3) == 7*5*3*one.macs
    frozen = LayerSelection(['2.weight'], ['0.weight'])
    assert training_flops(one, selection=frozen, **k3) == 35*(3*one.macs - one.by_layer.macs['0.weight'])
    assert training_flops(one, mask=density, head=10, **k3) == pytest.approx(35*((1 + 2*density)*one.macs + 30))
    assert training_flops(one, mask=density, selection=frozen, **k3) <= training_flops(
        one, mask=density, **k3) + 1e-6
    assert training_flops(one, rule='exact', **k3) == 35*(3*one.macs - one.by_layer.macs['0.weight'])


# ---- what a count leaves behind

def test_nothing_is_left_behind():
    net = ZOO['clip']().train()
    net.layer2.eval()
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
    def e(b=2, **kw): return training_memory(net, (b, 3, 64, 64), **kw)
    full = e(optimizer='adamw')
    assert e(b=4).activations == pytest.approx(2*full.activations, rel=.02)
    assert full.optimizer == 2*full.gradients and full.gradients == full.weights
    convs = [layer.name for layer in layers(net) if layer.kind == 'conv']
    half = e(selection=LayerSelection(convs[8:], convs[:8]))
    frozen = sum(dict(net.named_parameters())[n].numel()*4 for n in convs[:8])
    assert full.gradients - half.gradients == frozen and half.peak <= full.peak - full.optimizer
    for p in net.layer1.parameters(): p.requires_grad_(False)
    for n in ('conv1', 'bn1', 'conv2', 'bn2', 'conv3', 'bn3'): getattr(net, n).requires_grad_(False)
    assert e().activations < .8*half.activations


# ---- whatever mode the caller is in

class Mixed(nn.Module):
    "A convolution, a packed attention, a fused one, an LSTM and a functional product."
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm, self.out = nn.LSTM(8, 6, batch_first=True, bidirectional=True), nn.Linear(12, 4)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().flatten(2).mT
        x = self.attn(x, x, x)[0] + F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]
        return self.out(self.lstm(x)[0]) @ self.out.weight


def decorated(decorator):
    class Decorated(Mixed):
        forward = decorator(Mixed.forward)
    return Decorated()


MODES = dict(inference=torch.inference_mode, no_grad=torch.no_grad, enable_grad=torch.enable_grad,
             autocast=lambda: torch.autocast('cpu', dtype=torch.bfloat16))


def same_cost(a, b):
    assert a.by_layer.equals(b.by_layer) and a.unpriced.equals(b.unpriced)
    assert a.upstream == b.upstream


@pytest.mark.parametrize('dry', [True, False])
@pytest.mark.parametrize('convention', CONVENTIONS)
@pytest.mark.parametrize('mode', MODES)
def test_the_callers_mode_does_not_matter(mode, convention, dry):
    "In inference mode torch shows compositions whole, which once had no price."
    m = Mixed()
    outside = cost(m, (3, 6, 6), convention=convention, dry=dry)
    with MODES[mode](): inside = cost(m, (3, 6, 6), convention=convention, dry=dry)
    same_cost(inside, outside)
    assert training_flops(inside, 2, 2, rule='exact') == training_flops(outside, 2, 2, rule='exact')
    own = cost(decorated(MODES[mode]()), (3, 6, 6), convention=convention, dry=dry)
    assert own.by_layer.equals(outside.by_layer) and own.unpriced.equals(outside.unpriced)


def test_a_model_that_was_made_in_inference_mode_counts_as_any_other():
    with torch.inference_mode(): born = Mixed()
    same_cost(cost(born, (3, 6, 6)), cost(Mixed(), (3, 6, 6)))
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    want = training_memory(net, (2, 3, 10, 10), optimizer='adam')
    with torch.inference_mode():
        assert training_memory(net, (2, 3, 10, 10), optimizer='adam').equals(want)
        assert training_memory(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)),
                               (2, 3, 10, 10), optimizer='adam').equals(want)


def test_a_count_in_autocast_leaves_no_cast_weight_in_its_cache():
    "Autocast keeps casts of weights until its block ends: those of a dry pass would be found by the next real one."
    net, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), torch.randn(3, 8)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        want = net(x)
        cost(net, (1, 8))
        training_memory(net, (1, 8))
        cost(decorated(torch.autocast('cpu', dtype=torch.bfloat16)), (3, 6, 6))
        assert type(net(x)) is torch.Tensor and torch.equal(net(x), want)


@pytest.mark.parametrize('wrap', ['compile', 'checkpoint'])
def test_wrapped_blocks_count_as_bare_ones(wrap):
    "Names are those without the wrappers, nothing is compiled, and a mask of the bare model fits."
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    around = dict(compile=lambda b: torch.compile(b, backend='eager'), checkpoint=checkpoint_wrapper)[wrap]
    def net(wrap): return nn.Sequential(*[wrap(nn.Sequential(nn.Linear(16, 16), nn.ReLU())) for _ in range(3)])
    plain, wrapped = net(lambda b: b), net(around)
    mask = SparseMask.magnitude(plain, .3)
    for convention in CONVENTIONS:
        same_cost(cost(wrapped, (2, 16), convention=convention, mask=mask),
                  cost(plain, (2, 16), convention=convention, mask=mask))
    odd = {f'1.{"_orig_mod" if wrap == "compile" else "_checkpoint_wrapped_module"}.0.weight': .5}
    same_cost(cost(wrapped, (2, 16), mask=odd), cost(plain, (2, 16), mask={'1.0.weight': .5}))
    whole = torch.compile(plain, backend='eager')
    same_cost(cost(whole, (2, 16)), cost(plain, (2, 16)))
    assert training_memory(wrapped, (2, 16)).gradients == training_memory(plain, (2, 16)).gradients


# ---- weights that are computed

COMPUTED = dict(plain=lambda m: m, weight_norm=weight_norm, old_weight_norm=nn.utils.weight_norm,
                spectral_norm=spectral_norm, old_spectral_norm=nn.utils.spectral_norm, orthogonal=orthogonal,
                pruned=lambda m: prune.l1_unstructured(m, 'weight', .5),
                bias_pruned=lambda m: prune.random_unstructured(m, 'bias', .5))


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', COMPUTED)
@pytest.mark.parametrize('dry', [True, False])
def test_computed_weights_count_the_parameters_behind_them_once(name, dry):
    m = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), COMPUTED[name](nn.Linear(64, 64)), nn.ReLU(), nn.Linear(64, 10))
    before = copy.deepcopy({k: v.detach().clone() for k, v in m.state_dict().items()})
    c = cost(m, (3, 32), mask={'2.weight': .25}, dry=dry)
    assert c.params == sum(p.numel() for p in m.parameters())
    rows = c.by_layer
    assert (rows.macs['2.weight'] == 3*64*64 and rows.active_macs['2.weight'] == .25*3*64*64
            and '2.weight' in c.upstream['4.weight'])
    made = rows[rows.kind == 'parametrization']
    assert c.macs == 3*(32*64 + 64*64 + 64*10) + made.macs.sum() and not made.params.any()
    assert all(torch.equal(v, before[k])
               for k, v in m.state_dict().items()), 'a count took a step of power iteration'


def test_a_computed_packed_projection_has_its_three_rows():
    attn = nn.MultiheadAttention(8, 2, batch_first=True)
    net = nn.Sequential()
    net.attn = weight_norm(attn, 'in_proj_weight')
    c = cost(net, (1, 5, 8), forward=lambda x: net.attn(x[0], x[0], x[0]))
    assert c.params == sum(p.numel() for p in net.parameters())
    assert [c.by_layer.macs[f'attn.in_proj_weight[{k}]'] for k in 'qkv'] == [5*8*8]*3


def test_shared_parameters_count_once():
    "A weight or a bias that several modules hold belongs to the first of them."
    net = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 10))
    net[2].bias, net[3].weight = net[1].bias, net[0].weight
    net[1].again = net[1].weight
    c = cost(net, (1, 4), forward=lambda x: net(torch.zeros(1, 4, dtype=torch.long)))
    assert c.params == sum(p.numel() for p in net.parameters()) and c.macs == 4*(64 + 64 + 80)
    assert c.by_layer.macs['0.weight'] == 4*80 and c.by_layer.params['3.bias'] == 10


# ---- every product has a price, or is told

class Holds(nn.Module):
    "Some weights and a function of the module and its input."
    def __init__(self, f, **weights):
        super().__init__()
        self.f = f
        for k, w in weights.items(): setattr(self, k, nn.Parameter(w) if isinstance(w, torch.Tensor) else w)
    def forward(self, x): return self.f(self, x)


def eye(layout): return torch.eye(4).to_sparse() if layout == 'coo' else torch.eye(4).to_sparse_csr()


rand = torch.randn
PRICES = {'RNN': (lambda: Holds(lambda s, x: s.m(x), m=nn.RNN(8, 6, batch_first=True)), (2, 5, 8), 2*5*6*14),
          'GRU': (lambda: Holds(lambda s, x: s.m(x), m=nn.GRU(8, 6, batch_first=True)), (2, 5, 8), 2*5*3*6*14),
          'LSTM': (lambda: Holds(lambda s, x: s.m(x), m=nn.LSTM(8, 6, batch_first=True)), (2, 5, 8), 2*5*4*6*14),
          'LSTM, two ways, two layers': (lambda: Holds(lambda s, x: s.m(x),
                                                       m=nn.LSTM(8, 6, 2, bidirectional=True)), (2, 5, 8),
                                         2*5*2*4*6*(14 + 18)),
          'LSTM with a projection': (lambda: Holds(lambda s, x: s.m(x), m=nn.LSTM(8, 6, proj_size=3)), (2, 5, 8),
                                     10*(4*6*(8 + 3) + 3*6)),
          'LSTMCell': (lambda: Holds(lambda s, x: s.m(x), m=nn.LSTMCell(8, 6)), (2, 8), 2*4*6*14),
          'GRUCell': (lambda: Holds(lambda s, x: s.m(x), m=nn.GRUCell(8, 6)), (2, 8), 2*3*6*14),
          'Bilinear': (lambda: Holds(lambda s, x: s.m(x, x[..., :5]), m=nn.Bilinear(16, 5, 7)), (4, 3, 2, 16),
                       24*16*5*7),
          'cdist, few': (lambda: Holds(lambda s, x: torch.cdist(x, s.w), w=rand(3, 16)), (4, 16), 4*3*16),
          'cdist, many': (lambda: Holds(lambda s, x: torch.cdist(x, s.w), w=rand(30, 16)), (4, 16), 4*30*16),
          'cdist, batch': (lambda: Holds(lambda s, x: torch.cdist(x, s.w, p=1), w=rand(30, 16)), (2, 4, 2, 16),
                           4*2*30*16*2), 'pdist': (lambda: Holds(lambda s, x: F.pdist(x)), (6, 16), 15*16),
          'conv_tbc': (lambda: Holds(lambda s, x: torch.conv_tbc(x[0], s.w, s.b), w=rand(3, 16, 8), b=rand(8)),
                       (1, 10, 4, 16), 8*4*3*16*8),
          'sparse.mm': (lambda: Holds(lambda s, x: torch.sparse.mm(s.a, x), a=eye('coo')), (4, 16), 4*16),
          'sparse @': (lambda: Holds(lambda s, x: s.a @ x, a=eye('csr')), (4, 16), 4*16),
          'sparse vector': (lambda: Holds(lambda s, x: s.a @ x[:, 0], a=eye('coo')), (4, 16), 4),
          'sparse linear': (lambda: Holds(lambda s, x: F.linear(x, s.a), a=eye('csr')), (9, 4), 4*9),
          'sparse addmm': (lambda: Holds(lambda s, x: torch.sparse.addmm(x, s.a, x), a=eye('coo')), (4, 16), 4*16),
          'baddbmm': (lambda: Holds(lambda s, x: torch.baddbmm(s.w, x, x.mT), w=rand(2, 4, 4)), (2, 4, 16, 1),
                      2*4*4*16),
          'addbmm': (lambda: Holds(lambda s, x: torch.addbmm(s.w, x, x.mT), w=rand(4, 4)), (2, 4, 16, 1),
                     2*4*4*16),
          'addr': (lambda: Holds(lambda s, x: torch.addr(s.w, x[0], x[1]), w=rand(16, 16)), (4, 16), 256),
          'einsum of three': (lambda: Holds(lambda s, x: torch.einsum('ab,bc,cd->ad', x, s.v, s.w), v=rand(16, 3),
                                            w=rand(3, 5)), (4, 16), 4*16*3 + 4*3*5),
          'tensordot': (lambda: Holds(lambda s, x: torch.tensordot(x, s.w, 1), w=rand(16, 5)), (4, 16), 4*16*5),
          'multi_dot': (lambda: Holds(lambda s, x: torch.linalg.multi_dot([x, s.v, s.w]), v=rand(16, 3),
                                      w=rand(3, 5)), (4, 16), 4*16*3 + 4*3*5),
          'fused attention': (lambda: Holds(lambda s, x: F.scaled_dot_product_attention(x, x, x[..., :3])),
                              (2, 2, 4, 8), 2*2*4*4*11),
          'grouped queries': (
              lambda: Holds(lambda s, x: F.scaled_dot_product_attention(x, x[:, :1], x[:, :1], enable_gqa=True)),
              (2, 4, 4, 8), 2*4*4*4*16),
          'affine grid': (lambda: Holds(lambda s, x: F.affine_grid(x[0], (2, 3, 5, 7), align_corners=False)),
                          (1, 2, 2, 3), 2*5*7*2*3),}
if hasattr(F, 'grouped_mm'):
    PRICES['experts'] = (
        lambda: Holds(lambda s, x: F.grouped_mm(x.bfloat16(), s.w.bfloat16(),
                                                offs=torch.tensor([3, 8], dtype=torch.int32)), w=rand(2, 16, 8)),
        (8, 16), 8*16*8)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', PRICES)
@pytest.mark.parametrize('how', ['dry', 'real', 'inference'])
def test_price_of_a_product(name, how):
    "By hand, in a dry pass, a real one, and from a forward in inference mode."
    make, size, want = PRICES[name]
    m = make()
    size = size if len(size) != 3 else (1, *size)
    1 if len(PRICES[name][1]) == 3 or size[-1] == 1 else 0
    def forward(x):
        if len(PRICES[name][1]) == 3: x = x[0]
        elif size[-1] == 1: x = x.squeeze(-1)
        with torch.inference_mode(how == 'inference'): return m(x)
    c = cost(m, size, forward=forward, dry=how != 'real')
    assert c.macs == want and c.unpriced.empty, c
    owners = {r for r in c.by_layer.index[c.by_layer.macs > 0] if ':' not in r}
    # those only add their weight
    assert bool(owners) == (any(p.dim() > 1 for p in m.parameters()) and name not in ('baddbmm', 'addbmm', 'addr'))
    if 'LSTM' in name: assert all(c.by_layer.macs[r] > 0 for r in c.by_layer.index if 'weight' in r)


def test_experts_of_a_mixture():
    "Two experts of four for each of seven tokens, in both of transformers' ways."
    T = pytest.importorskip('transformers')
    m = T.MixtralForCausalLM(T.MixtralConfig(vocab_size=100, num_local_experts=4, num_key_value_heads=2,
                                             hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                                             num_attention_heads=4)).eval()
    c = cost(m, (1, 7), forward=lambda x: m(torch.zeros(1, 7, dtype=torch.long)))
    experts = c.by_layer[['experts' in r for r in c.by_layer.index]]
    assert (experts.macs.sum() == 7*2*2*(256*64 + 64*128) and c.unpriced.empty
            and c.params == sum(p.numel() for p in m.parameters()))


def test_what_has_no_price_is_told():
    "Transforms, solvers and operators of strangers: which, where and how often."
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Holds(lambda s, x: torch.fft.rfft2(x).real @ s.w, w=rand(5, 8)), nn.Linear(8, 8)
        @property
        def tower(self): return self.a
        def forward(self, x): return torch.linalg.inv(self.b(self.a(self.a(x))))
    c = cost(Net(), (1, 1, 8, 8))
    assert c.unpriced.to_dict('index') == {':aten::_fft_r2c': dict(times=2, tower=True),
                                           ':aten::linalg_inv_ex': dict(times=1, tower=False)}
    assert ('without a price: aten::_fft_r2c x2, aten::linalg_inv_ex x1' in repr(c)
            and 'Without a price' in c.to_markdown())
    assert c.macs == 2*8*5*8 + 8*8*8
    assert (list(c.tower.unpriced.times) == [2] and list(c.head.unpriced.times) == [1]
            and list((c + c).unpriced.times) == [4, 2])
    assert list((c - .9*c.tower).unpriced.times) == [2, 1] and list(c.with_mask(.5).unpriced.times) == [2, 1]
    plain = cost(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Softmax(1), nn.MaxPool2d(2),
                               nn.Upsample(scale_factor=2, mode='bilinear')), (3, 9, 9))
    assert plain.unpriced.empty and 'price' not in repr(plain) + plain.to_markdown()


def test_an_operator_of_a_stranger_has_no_price_until_torch_is_told_one():
    torch.library.custom_op('opentrans_test::product', lambda a, b: a @ b, mutates_args=(),
                            schema='(Tensor a, Tensor b) -> Tensor').register_fake(
        lambda a, b: a.new_empty(len(a), b.shape[1]))
    op = torch.ops.opentrans_test.product
    m = Holds(lambda s, x: op(x, s.w), w=rand(16, 5))
    for dry in (True, False):
        c = cost(m, (4, 16), dry=dry)
        assert c.macs == 0 and c.unpriced.times.to_dict() == {':opentrans_test::product': 1}
    from torch.utils.flop_counter import flop_registry, register_flop_formula
    register_flop_formula(op)(lambda a, b, *args, out_shape=None, **kwargs: 2*a[0]*a[1]*b[1])
    try: c = cost(m, (4, 16))
    finally: del flop_registry[op]
    assert c.by_layer.macs.to_dict() == {'w': 4*16*5} and c.unpriced.empty


RECURRENT = {f'{cls.__name__}{kw}': (cls, kw) for cls in (nn.RNN, nn.GRU, nn.LSTM)
             for kw in (dict(), dict(num_layers=3, bidirectional=True), dict(bias=False, batch_first=True))}


@pytest.mark.parametrize('tool', ['thop', 'ptflops', 'fvcore'])
@pytest.mark.parametrize('name', RECURRENT)
def test_recurrent_layers_as_the_tools_count_them(name, tool):
    pytest.importorskip(tool)
    cls, kw = RECURRENT[name]
    m = nn.Sequential(cls(8, 6, **kw))
    ours = cost(m, (1, 5, 8), convention=tool, forward=lambda x: m(x[0]))
    theirs = tool_count(tool, Holds(lambda s, x: s.m(x[0]), m=m), (1, 5, 8))
    assert (ours.macs, ours.params) == theirs
    if tool == 'fvcore':
        assert ours.unpriced.times.to_dict() == {
            f'0:aten::{"rnn_tanh" if cls is nn.RNN else cls.__name__.lower()}': 1}


FREE = {'Bilinear': (lambda: Holds(lambda s, x: s.m(x, x), m=nn.Bilinear(16, 16, 8)), 'm:aten::bilinear'),
        'baddbmm': (lambda: Holds(lambda s, x: torch.baddbmm(s.w, x[None], x.mT[None]), w=rand(1, 4, 4)),
                    ':aten::baddbmm'),
        'attention': (lambda: Holds(lambda s, x: F.scaled_dot_product_attention(x, x, x)),
                      ':aten::scaled_dot_product_attention'),
        'cdist': (lambda: Holds(lambda s, x: torch.cdist(x, x)), ':aten::_cdist_forward'),
        'tensordot': (lambda: Holds(lambda s, x: torch.tensordot(x, s.w, 1), w=rand(16, 5)), ':aten::tensordot'),
        'cell': (lambda: Holds(lambda s, x: s.m(x), m=nn.LSTMCell(16, 6)), 'm:aten::lstm_cell'),
        'fft': (lambda: Holds(lambda s, x: torch.fft.rfft(x)), ':aten::_fft_r2c'),}


@pytest.mark.parametrize('name', FREE)
def test_what_fvcore_has_no_price_for_is_told(name):
    "fvcore counts nothing and warns; so do we."
    pytest.importorskip('fvcore')
    m, row = FREE[name][0](), FREE[name][1]
    c = cost(m, (4, 16), convention='fvcore', forward=lambda x: m(x))
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.m = m
        def forward(self, x): return self.m(x[0])
    assert c.macs == tool_count('fvcore', Outer(), (4, 16, 1)[:2])[0] == 0 if name != 'cell' else c.macs == 0
    assert c.unpriced.times.to_dict() == {row: 1}


def test_modules_that_a_table_lacks_are_told():
    "thop and ptflops take what they do not know for free."
    m = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.GroupNorm(1, 5))
    for convention, want in (('thop', {'0:Embedding': 1, '2:GroupNorm': 1}), ('ptflops', {'0:Embedding': 1}),
                             ('macs', {})):
        assert cost(m, (1, 5), convention=convention,
                    forward=lambda x: m(torch.zeros(1, 5, dtype=torch.long))).unpriced.times.to_dict() == want


# ---- nothing stays behind

MEMO = {}
def angles(n): return torch.arange(n*16.).view(-1, 16).cos()


@functools.cache
def remembered(n): return angles(n)


@functools.lru_cache(maxsize=2)
def last_two(n): return angles(n)


def by_default(n, memo={}): # noqa: B006 - a default that remembers is what is tested
    if n not in memo: memo[n] = angles(n)
    return memo[n]


def by_attribute(n):
    if not hasattr(by_attribute, 'table'): by_attribute.table = angles(n)
    return by_attribute.table


def in_a_closure():
    table = None
    def get(n):
        nonlocal table
        if table is None: table = angles(n)
        return table
    return get


def by_hand(n):
    if 'sine' not in MEMO:
        MEMO['sine'] = torch.zeros(n, 16)
        MEMO['sine'][:, 0::2] = torch.arange(n*8.).view(n, 8).sin()
        MEMO['sine'][:, 1::2] = torch.arange(n*8.).view(n, 8).cos()
    return MEMO['sine']


def views(n):
    if 'view' not in MEMO:
        MEMO['whole'] = angles(n+4)
        MEMO['view'] = MEMO['whole'][:n]
    return MEMO['view']


class Keeper(nn.Module):
    "A linear map times a table; where the table is kept, the function says."
    of_class = {}
    def __init__(self, table):
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.table = table
        self.kept = None
        self.inner = dict(list=[], plain=types.SimpleNamespace(table=None, size=0))
    def forward(self, x): return self.linear(x)*self.table(self, x.shape[-2])


def in_attribute(m, n):
    if m.kept is None or len(m.kept) < n: m.kept = angles(n)
    return m.kept


def in_buffer(m, n):
    if 'angles' not in m._buffers: m.register_buffer('angles', angles(n), persistent=False)
    return m.angles


def in_list(m, n):
    if not m.inner['list']: m.inner['list'].append((n, angles(n)))
    return m.inner['list'][0][1]


def in_object(m, n):
    if m.inner['plain'].size < n: m.inner['plain'].table, m.inner['plain'].size = angles(n), n
    return m.inner['plain'].table


def in_class(m, n):
    if n not in Keeper.of_class: Keeper.of_class[n] = angles(n)
    return Keeper.of_class[n]


def of_the_weight(m, n):
    m.kept = m.linear.weight[:n]*2
    return m.kept[:n]


PLACES = dict(attribute=in_attribute, buffer=in_buffer, list=in_list, object=in_object, a_class=in_class,
              of_the_weight=of_the_weight, cache=lambda m, n: remembered(n), lru=lambda m, n: last_two(n),
              default=lambda m, n: by_default(n), function=lambda m, n: by_attribute(n),
              closure=lambda m, n, get=in_a_closure(): get(n), by_hand=lambda m, n: by_hand(n),
              views=lambda m, n: views(n))


def forget():
    for d in (MEMO, Keeper.of_class, by_default.__defaults__[0], vars(by_attribute)): d.clear()
    for f in (remembered, last_two): f.cache_clear()


def fakes():
    "How many there are; garbage does not count."
    def count(): return [*map(type, gc.get_objects())].count(FakeTensor)
    if not count(): return 0
    gc.collect()
    return count()


@pytest.mark.parametrize('tool', [cost, training_memory])
@pytest.mark.parametrize('place', PLACES)
def test_a_model_that_keeps_a_table_goes_on_as_if_nothing_had_been(place, tool):
    """Wherever the table of a forward pass is kept: no tensor without values is left, the output is right, and the
    model learns."""
    forget()
    torch.manual_seed(0)
    m, x = Keeper(PLACES[place]), torch.randn(2, 3, 8, 16)
    before = {k: v.clone() for k, v in m.state_dict().items()}
    tool(m, (3, 8, 16))
    assert fakes() == 0
    out = m(x)
    assert type(out) is torch.Tensor
    forget()
    fresh = Keeper(PLACES[place])
    fresh.load_state_dict(before)
    assert torch.equal(out, fresh(x))
    out.square().mean().backward()
    assert type(m.linear.weight.grad) is torch.Tensor and m.linear.weight.grad.abs().sum() > 0
    forget()


@pytest.mark.parametrize('tool', [cost, training_memory])
@pytest.mark.parametrize('place', ['dict', 'list', 'closure', 'class'])
def test_what_cannot_be_put_back_is_taken_out_and_told(place, tool):
    """Features in a place that is not the model's: their values cannot be known, so the call is refused and they
    are gone."""
    forget()
    cell, seen = None, []
    class Own: kept = None
    def keep(m, n):
        nonlocal cell
        y = m.linear.weight[:n]*2
        if place == 'dict': MEMO['last'] = (n, y)
        if place == 'list': seen.append(y)
        if place == 'closure': cell = y
        if place == 'class': Own.kept = y
        return y
    m = Keeper(keep)
    with pytest.raises(OpenTransError, match='taken out') as e: tool(m, (3, 8, 16))
    assert ('dry=False' if tool is cost else 'peak_memory') in str(e.value)
    assert fakes() == 0 and not MEMO and not seen and cell is None and Own.kept is None
    if tool is cost: assert cost(m, (3, 8, 16), dry=False).macs == 3*8*16*16
    forget()


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', COMPUTED)
@pytest.mark.parametrize('tool', [cost, training_memory])
def test_computed_weights_have_their_values_afterwards(name, tool):
    m = nn.Sequential(nn.Linear(8, 8), COMPUTED[name](nn.Linear(8, 8)), nn.Linear(8, 8)).eval()
    was = m[1].weight.detach().clone()
    tool(m, (1, 8))
    assert fakes() == 0 and torch.equal(m[1].weight.detach(), was)
    assert '2.weight' in SparseMask.magnitude(m, .5).names


def test_a_count_that_fails_leaves_nothing_either():
    "The error's frames hold tensors, the model's own table too."
    m = Keeper(in_attribute)
    for bad in (lambda: cost(m, (3, 8, 15)), lambda: training_memory(m, (3, 8, 15)),
                lambda: cost(m, (3, 8, 16), forward=lambda x: m(x) + m(x[..., :7]))):
        with pytest.raises(OpenTransError, match='input of size') as e: bad()
        assert e.value.__cause__ is not None and m.kept is None
        del e
        assert fakes() == 0
    class Values(Keeper):
        def forward(self, x): return super().forward(x)[0][x[0].sum(-1) > -1]
    m = Values(in_attribute)                                              # falls back on a real pass
    assert (cost(m, (3, 8, 16)).macs == 3*8*16*16 and fakes() == 0
            and type(m(torch.zeros(1, 3, 8, 16))) is torch.Tensor)
    with pytest.raises(OpenTransError, match='depends on values'): training_memory(m, (3, 8, 16))


def test_a_pass_that_initialises_itself_is_undone_whole():
    "A flag that was set beside a buffer that got no values would be worse than none."
    class ActNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.ready = nn.Linear(8, 8), False
            self.register_buffer('scale', torch.ones(8))
        def forward(self, x):
            x = self.f(x)
            if not self.ready:
                self.scale.copy_(x.abs().mean(0))
                self.ready = True
            return x/self.scale
    for tool in (cost, training_memory):
        m = ActNorm()
        tool(m, (4, 8))
        assert not m.ready and torch.equal(m.scale, torch.ones(8)) and m.scale.grad_fn is None
        m(torch.randn(4, 8)).sum().backward()


# ---- what makes no sense

@pytest.mark.parametrize('size',
                         [(), 0, None, 'abc', '3x8x8', (3, 8, -8), (3, 0, 8), (3, 8.0, 8.0), (3, '8', 8),
                          (3, True, 8), (3, float('nan'), 8), torch.ones(3)])
def test_sizes_that_make_no_sense(size):
    net = nn.Conv2d(3, 8, 3)
    for tool in (cost, training_memory, lambda m, s: tool_count('thop', m, s)):
        with pytest.raises(OpenTransError, match='input_size must be'): tool(net, size)


def test_models_and_arguments_that_make_no_sense():
    "One sentence that says what was given and what to do."
    net, empty = nn.Conv2d(3, 8, 3), nn.Sequential(nn.ReLU(), nn.Flatten())
    c = cost(empty, (3, 8, 8))
    assert (c.macs == c.params == 0 and c.by_layer.empty and 'Cost(0' in repr(c) and c.to_markdown()
            and c.tower.macs == 0)
    frozen = nn.Conv2d(3, 8, 3).requires_grad_(False)
    class Says(nn.Module):
        def __init__(self, what):
            super().__init__()
            self.f, self.what = nn.Linear(4, 4), what
        def forward(self, x): return self.what(self.f(x))
    unseen = types.SimpleNamespace
    for match, f in {'no parameter that learns, so': lambda: training_memory(empty, (3, 8, 8)),
                     'no parameter that learns': lambda: training_memory(frozen, (3, 8, 8)),
                     'SimpleNamespace. depends on a parameter': lambda: training_memory(
                         Says(lambda y: unseen(y=y)), (1, 4)),
                     'forbids gradients': lambda: training_memory(decorated(torch.inference_mode()), (3, 6, 6)),
                     'or loss=': lambda: training_memory(net, (5, 8, 8)),
                     'loss must return one number': lambda: training_memory(net, (3, 8, 8), loss=lambda y: y),
                     'Unknown optimizer': lambda: training_memory(net, (3, 8, 8), optimizer='lion'),
                     'args must be a tuple': lambda: cost(net, (3, 8, 8), args=torch.zeros(2)),
                     'no shape yet': lambda: cost(nn.LazyLinear(4), (1, 8)),
                     'from 0 to 1': lambda: cost(net, (3, 8, 8), mask=1.5),
                     "of 'weight' must be": lambda: cost(net, (3, 8, 8), mask={'weight': 'half'}),
                     'not nan': lambda: cost(net, (3, 8, 8), mask=float('nan')),
                     'not True': lambda: cost(net, (3, 8, 8), mask=True),
                     'iterations must be': lambda: training_flops(cost(net, (3, 8, 8)), -1, 1),
                     'batch_size must be': lambda: training_flops(cost(net, (3, 8, 8)), 1, '4'),
                     'head must be': lambda: training_flops(cost(net, (3, 8, 8)), 1, 1, head=float('nan'))}.items():
        with pytest.raises(OpenTransError, match=match): f()
    for out in (dict, tuple, list):
        whole = training_memory(Says(lambda y: out({'y': y}.items()) if out is dict else out([y])), (2, 4))
        assert whole.equals(training_memory(Says(lambda y: y), (2, 4)))


def test_words_that_name_no_table_or_tool():
    counted = cost(nn.Linear(3, 4), (2, 3))
    for wrong in (lambda: counted.to_markdown('layer'), lambda: counted.plot('kinds'),
                  lambda: counted.plot(what='flops'), lambda: tool_count('json', nn.Linear(3, 4), (3,))):
        with pytest.raises(OpenTransError, match='Unknown'): wrong()


def test_heads_are_fed_with_maps_of_the_trunks_sizes():
    from opentrans.efficiency import FullSize
    full = FullSize()
    with torch.no_grad():
        for size in ((64, 96), (48, 80), (100, 60), (97, 99)):
            theirs = full.clip(torch.zeros(1, 3, *size))
            assert {k: m.shape for k,m in full.features(size).items()} == {k: m.shape for k,m in theirs.items()}, size

def test_garbage_of_an_earlier_step_is_no_memory_of_this_one():
    "It would be counted as freed, and the step as needing less than it does."
    def leaves_a_circle():
        circle = [torch.zeros(2**20)]
        circle.append(circle)
    assert peak_memory(leaves_a_circle) >= 2**22
    def collects():
        gc.collect()
        return torch.zeros(2**20)
    assert peak_memory(collects) >= 2**22

def test_blocks_from_before_do_not_count_when_they_go():
    "The profiler takes their sizes from what lay at their addresses the last time that it looked."
    kept = []
    def keeps(): kept.extend(torch.zeros(2**18) for _ in range(64))
    def lets_go():
        kept.clear()
        return torch.zeros(2**20)
    assert peak_memory(keeps) >= 64*2**20
    kept.clear() # unseen: the profiler still has their sizes
    keeps() # most lie at the same addresses
    needed = peak_memory(lets_go)
    assert 2**22 <= needed < 2**23, needed

def test_the_same_step_needs_the_same_memory_each_time():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3))
    def step(): net(torch.zeros(4, 3, 32, 32)).sum().backward()
    peak_memory(step) # what is set up once
    first,*more = [peak_memory(step) for _ in range(4)]
    assert first > 4*16*30*30*4, first
    assert more == [first]*3
