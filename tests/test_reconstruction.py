"Pruning by least squares: against the published codes, exact small references, and itself in other ways."
import copy, os, sys, types
from pathlib import Path
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from opentrans.core import layers
from opentrans.errors import OpenTransError
from opentrans.pruning import (
    alps, Budget, fit_densities, go_over, Inputs, input_grams, input_rows, layer_densities, output_error, prunable,
    reconstruct, refit, solve_on_support, SparseMask, sparsegpt, wanda, weight_rows)

pytestmark = pytest.mark.usefixtures('one_thread')
few = settings(max_examples=20, deadline=None)

def correlated(rows, columns, seed=0):
    "Inputs that depend on one another, as those of layers do, some far larger than others."
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=g) @ torch.diag(torch.rand(columns, generator=g)+.05)
    return torch.randn(rows, columns, generator=g) @ mixing

# --- the published codes

def published(variable, file, repository):
    "A module of a clone whose folder an environment variable names, told to compute on the CPU."
    path = Path(os.environ.get(variable, ''))/file
    if not os.environ.get(variable) or not path.is_file():
        pytest.skip(f'{variable} does not name a folder with a clone of {repository}')
    pytest.importorskip('transformers')
    source = path.read_text().replace("'cuda:0'", "'cpu'").replace('torch.cuda.synchronize()', 'pass')
    module = types.ModuleType(path.stem)
    before = sys.modules.get('quant')
    sys.modules['quant'] = types.ModuleType('quant')
    try: exec(compile(source, str(path), 'exec'), module.__dict__)
    finally:
        if before is None: del sys.modules['quant']
        else: sys.modules['quant'] = before
    return module

@pytest.fixture(scope='module')
def linear():
    "A layer, its inputs, and their Gram matrix."
    torch.manual_seed(0)
    layer,X = nn.Linear(256, 64, bias=False),correlated(1500, 256)
    return layer,X,(X.T @ X)[None].double()

def same_mask(weight, kept): return torch.equal(weight != 0, kept[0])

@pytest.mark.parametrize('density', (.5, .25, .125, .0625))
def test_sparsegpt_is_the_published_one(linear, density):
    """The published code drops one weight more of each block than its sparsity says, so it is asked for a little
    less."""
    module = published('OPENTRANS_SPARSEGPT', 'sparsegpt.py', 'IST-DASLab/sparsegpt')
    layer,X,gram = linear
    theirs = copy.deepcopy(layer)
    run = module.SparseGPT(theirs)
    run.add_batch(X, None)
    block = 128*len(layer.weight)
    run.fasterprune((block-round(density*block)-.5)/block)
    new,kept = sparsegpt(layer.weight.data[None], Inputs(gram), Budget(density))
    assert same_mask(theirs.weight.data, kept)
    torch.testing.assert_close(new[0], theirs.weight.data, rtol=0, atol=1e-4)

@pytest.mark.parametrize('n,m', ((2, 4), (4, 8)))
def test_sparsegpt_n_of_m_is_the_published_one(linear, n, m):
    module = published('OPENTRANS_SPARSEGPT', 'sparsegpt.py', 'IST-DASLab/sparsegpt')
    layer,X,gram = linear
    theirs = copy.deepcopy(layer)
    run = module.SparseGPT(theirs)
    run.add_batch(X, None)
    run.fasterprune(0, m-n, m)
    new,kept = sparsegpt(layer.weight.data[None], Inputs(gram), Budget(n/m, f'{n}:{m}'))
    assert same_mask(theirs.weight.data, kept)
    torch.testing.assert_close(new[0], theirs.weight.data, rtol=0, atol=1e-4)

@pytest.mark.parametrize('density,scope',
                         ((.5, 'layer'), (.3, 'layer'), (.1, 'layer'), (.05, 'layer'), (.5, '2:4'), (.25, '1:4')))
def test_alps_is_the_published_one(linear, density, scope):
    module = published('OPENTRANS_ALPS', 'alps.py', 'mazumder-lab/ALPS')
    layer,X,gram = linear
    theirs = copy.deepcopy(layer)
    run = module.ALPS_prune(theirs, 1, len(X))
    run.add_batch(X, layer(X).detach())
    n,m = map(int, scope.split(':')) if ':' in scope else (0, 0)
    run.ALPS_admm(1-density, nm_n=n, nm_m=m)
    new,kept = alps(layer.weight.data[None], Inputs(gram), Budget(density, scope))
    assert same_mask(theirs.weight.data, kept)
    torch.testing.assert_close(new[0], theirs.weight.data, rtol=0, atol=1e-4)

@pytest.mark.parametrize('density', (.5, .25, .125))
def test_wanda_is_the_published_one(linear, density):
    "Its running mean of squared norms, and the rows sorted as in its `prune_wanda`."
    module = published('OPENTRANS_WANDA', 'lib/layerwrapper.py', 'locuslab/wanda')
    layer,X,gram = linear
    run = module.WrappedGPT(layer)
    for part in X.split(500): run.add_batch(part[None], None)
    metric = layer.weight.data.abs()*run.scaler_row.reshape(1, -1).sqrt()
    dropped = metric.sort(dim=-1, stable=True).indices[:, :int(256*(1-density))]
    theirs = torch.ones_like(metric, dtype=torch.bool).scatter_(1, dropped, False)
    new,kept = wanda(layer.weight.data[None], Inputs(gram), Budget(density, 'output'))
    assert torch.equal(kept[0], theirs)
    assert torch.equal(new[0], layer.weight.data*theirs)

# --- references of a few lines

def surgeon(weights, gram, kept):
    """OBS as its formula says: when a weight leaves, all that stand to its right move by the inverse of what is
    left."""
    weights = weights.double().clone()
    for row,stays in zip(weights, kept):
        for i in range(len(row)):
            if stays[i]: continue
            inverse = torch.linalg.inv(gram[i:, i:])
            row[i:] -= row[i]/inverse[0, 0]*inverse[0]
            row[i] = 0
    return weights

@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 4))
@few
def test_sparsegpt_is_obs_step_by_step(seed, columns, outputs):
    torch.manual_seed(seed)
    X,W = correlated(40, columns, seed),torch.randn(outputs, columns)
    kept = torch.rand(outputs, columns) < .5
    inputs = Inputs((X.T @ X)[None].double())
    new,_ = sparsegpt(W[None], inputs, Budget(.5), kept[None])
    torch.testing.assert_close(new[0].double(), surgeon(W, inputs.damped[0], kept), rtol=1e-3, atol=1e-4)

def test_a_long_layer_is_obs_across_its_blocks():
    torch.manual_seed(1)
    X,W = correlated(900, 300),torch.randn(3, 300)
    kept = torch.rand(3, 300) < .3
    inputs = Inputs((X.T @ X)[None].double())
    new,_ = sparsegpt(W[None], inputs, Budget(.3), kept[None])
    torch.testing.assert_close(new[0].double(), surgeon(W, inputs.damped[0], kept), rtol=1e-2, atol=2e-3)

@given(st.integers(0, 10**6), st.integers(2, 16))
@few
def test_weights_on_a_support_are_the_least_squares_solution(seed, columns):
    "numpy solves the stacked problem: the images' rows, and the damping as rows of its own."
    torch.manual_seed(seed)
    X,W = correlated(60, columns, seed).double(),torch.randn(2, columns).double()
    kept = torch.rand(2, columns) < .5
    inputs = Inputs((X.T @ X)[None])
    new = solve_on_support(W[None], inputs, kept[None])[0]
    added = (inputs.damped[0]-X.T @ X).diagonal().sqrt().diag()
    rows = torch.cat([X, added])
    for w,stays,found in zip(W, kept, new):
        best = np.linalg.lstsq(rows[:, stays].numpy(), (rows @ w).numpy(), rcond=None)[0]
        np.testing.assert_allclose(found[stays].numpy(), best, rtol=1e-6, atol=1e-8)
        assert not found[~stays].any()

def test_conjugate_gradients_reach_the_solution():
    X,W = correlated(400, 48),torch.randn(1, 8, 48, generator=torch.Generator().manual_seed(0))
    inputs,kept = Inputs((X.T @ X)[None].double()),W.abs() > .8
    exact = output_error(W, solve_on_support(W, inputs, kept), inputs.damped)
    errors = [output_error(W, refit(W, inputs, kept, steps), inputs.damped) for steps in (0, 2, 10, 80)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(exact, rel=1e-3) and errors[0] > 1.1*exact

def test_alps_finds_nearly_the_best_of_all_supports():
    "One output of ten inputs: all 252 supports of five, each with its best weights."
    from itertools import combinations
    better = 0
    for seed in range(10):
        X,W = correlated(50, 10, seed),torch.randn(1, 1, 10, generator=torch.Generator().manual_seed(seed))
        inputs,errors = Inputs((X.T @ X)[None].double()),[]
        for chosen in combinations(range(10), 5):
            kept = torch.zeros(1, 1, 10, dtype=torch.bool)
            kept[..., list(chosen)] = True
            errors.append(output_error(W, solve_on_support(W, inputs, kept), inputs.damped))
        new,kept = alps(W, inputs, Budget(.5))
        found = output_error(W, solve_on_support(W, inputs, kept), inputs.damped)
        assert found <= sorted(errors)[25]
        better += found <= sorted(errors)[5]
    assert better >= 7

@pytest.mark.parametrize('method', (wanda, sparsegpt, alps))
def test_groups_are_layers_of_their_own(method):
    "A grouped problem without a common budget is its groups one by one."
    torch.manual_seed(0)
    W,X = torch.randn(3, 4, 16),[correlated(80, 16, seed) for seed in range(3)]
    gram = torch.stack([x.T @ x for x in X]).double()
    kept = torch.rand(3, 4, 16) < .4
    new,_ = method(W, Inputs(gram), Budget(.4), kept)
    for g in range(3):
        alone,_ = method(W[g:g+1], Inputs(gram[g:g+1]), Budget(.4), kept[g:g+1])
        torch.testing.assert_close(new[g], alone[0], rtol=1e-3, atol=1e-4)

@pytest.mark.parametrize('method', (wanda, sparsegpt, alps))
@given(density=st.floats(.02, 1), scope=st.sampled_from(('layer', 'output', 'channel', '2:4', '1:4')),
       seed=st.integers(0, 99))
@few
def test_a_budget_is_kept(method, density, scope, seed):
    W,X = torch.randn(1, 6, 24, generator=torch.Generator().manual_seed(seed)),correlated(60, 24, seed)
    if ':' in scope: density = int(scope[0])/4
    budget = Budget(density, scope)
    new,kept = method(W, Inputs((X.T @ X)[None].double()), budget)
    assert not new[~kept].any() and new.isfinite().all()
    if scope in ('layer', 'output'): assert int(kept.sum()) == budget.count(W.numel())
    if scope == 'output': assert int(kept.sum(-1).max()-kept.sum(-1).min()) <= 1
    if scope == 'channel': assert int(kept.all(-1).sum()) == budget.count(6) and kept.any(-1).equal(kept.all(-1))
    if ':' in scope: assert (kept.unflatten(-1, (-1, 4)).sum(-1) == int(scope[0])).all()

def test_dead_inputs_lose_their_weights():
    X,W = correlated(50, 12),torch.ones(1, 2, 12)
    X[:, :4] = 0
    for method in (wanda, sparsegpt, alps):
        new,kept = method(W, Inputs((X.T @ X)[None].double()), Budget(.5))
        assert new.isfinite().all() and not new[..., :4].any()

# --- networks

def conv(i, o, groups=1):
    return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(o), nn.ReLU())

class Branches(nn.Module):
    "A block with a shortcut that has a layer of its own."
    def __init__(self, i, o):
        super().__init__()
        self.one = conv(i, o)
        self.two = conv(o, o, o//4)
        self.side = nn.Conv2d(i, o, 1)
    def forward(self, x): return self.two(self.one(x)) + self.side(x)

def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(conv(3, 8), nn.Sequential(Branches(8, 16), Branches(16, 16)), Branches(16, 16),
                         nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)).eval()

@pytest.fixture(scope='module')
def images():
    g = torch.Generator().manual_seed(0)
    coarse = torch.randn(24, 3, 5, 5, generator=g)
    return [*F.interpolate(coarse, 12, mode='bilinear').split(8)]

def test_each_layer_is_pruned_on_what_pruned_layers_give(images):
    "Layer by layer by hand: unfold what the pruned network so far feeds the layer, and solve that."
    net,mine = network(),network()
    mask,table = reconstruct(net, images, .3, 'sparsegpt')
    for name in table.index:
        layer = next(item for item in prunable(mine) if item.name == name)
        seen = []
        handle = layer.module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        with torch.no_grad():
            for x in images: mine(x)
        handle.remove()
        x,module = torch.cat(seen),layer.module
        if isinstance(module, nn.Conv2d):
            parts = x.chunk(module.groups, 1)
            rows = torch.stack([F.unfold(p, module.kernel_size, padding=module.padding).mT.flatten(0, 1)
                                for p in parts])
        else: rows = x[None]
        weight = module.weight.data.unflatten(0, (getattr(module, 'groups', 1), -1)).flatten(2)
        new,kept = sparsegpt(weight, Inputs((rows.mT @ rows).double()), Budget(.3))
        module.weight.data = new.reshape(module.weight.shape)
        assert torch.equal(kept.reshape(module.weight.shape), mask[name]), name
    for (name,a),b in zip(net.state_dict().items(), mine.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)

@pytest.mark.parametrize('method', ('wanda', 'alps'))
def test_the_memory_of_blocks_changes_nothing(images, method):
    states = []
    for cache in (0, 1024):
        net = network()
        reconstruct(net, images, .2, method, cache_mb=cache)
        states.append(net.state_dict())
    assert all(torch.equal(t, states[1][n]) for n,t in states[0].items())

def test_the_memory_of_blocks_saves_passes(images):
    calls = {0: 0, 1024: 0}
    for cache in calls:
        net = network()
        def count(*args): calls[cache] += 1
        net[1][0].one[0].register_forward_hook(count)
        reconstruct(net, images, .2, 'wanda', cache_mb=cache)
    assert calls[1024] < .6*calls[0]

class Peeks(nn.Module):
    "Uses the output of a block twice, in the chain and beside it."
    def __init__(self):
        super().__init__()
        self.blocks,self.last = nn.ModuleList([conv(3, 8), conv(8, 8), conv(8, 8)]),nn.Conv2d(16, 4, 1)
    def forward(self, x):
        kept = []
        for block in self.blocks:
            x = block(x)
            kept.append(x)
        return self.last(torch.cat([kept[0], kept[-1]], 1))

def test_a_model_that_looks_back_is_run_whole(images):
    torch.manual_seed(0)
    net = Peeks().eval()
    plain = copy.deepcopy(net)
    reconstruct(net, images, .3, 'sparsegpt')
    reconstruct(plain, images, .3, 'sparsegpt', cache_mb=0)
    assert all(torch.equal(a, b) for a,b in zip(net.state_dict().values(), plain.state_dict().values()))

def test_the_model_is_as_it_was_without_update_or_after_an_error(images):
    net = network()
    start = copy.deepcopy(net.state_dict())
    net.train()
    mask,_ = reconstruct(net, images, .3, 'alps', update=False)
    assert all(torch.equal(t, start[n]) for n,t in net.state_dict().items()) and net.training
    def fails(weights, inputs, budget, kept=None):
        if weights.shape[-1] > 72: raise OpenTransError('no more')
        return wanda(weights, inputs, budget, kept)
    with pytest.raises(OpenTransError, match='no more'): reconstruct(net, images, .3, fails)
    assert all(torch.equal(t, start[n]) for n,t in net.state_dict().items())
    assert not any('forward' in m.__dict__ or m._forward_pre_hooks for m in net.modules())

def test_the_dense_target_is_least_squares_between_two_networks():
    "numpy fits the dense network's outputs from what the pruned one gives, on the support."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 4))
    dense,x = copy.deepcopy(net),torch.randn(300, 6)
    mask,_ = reconstruct(net, [*x.split(100)], .4, 'magnitude', target='dense')
    fitted = copy.deepcopy(dense)
    reconstruct(fitted, [*x.split(100)], mask=mask,
                method=lambda w, i, b, kept: (solve_on_support(w, i, kept), kept), target='dense', damping=0)
    with torch.no_grad():
        seen,there = fitted[:4](x).double(),dense[:4](x).double()
    for w,own,stays in zip(fitted[4].weight.data, dense[4].weight.data.double(), mask['4.weight']):
        best = np.linalg.lstsq(seen[:, stays].numpy(), (there @ own).numpy(), rcond=None)[0]
        np.testing.assert_allclose(w[stays].numpy(), best, rtol=2e-2, atol=2e-3)

def test_the_dense_target_is_nearer_and_its_memory_changes_nothing(images):
    net = network()
    other = F.interpolate(torch.randn(16, 3, 5, 5, generator=torch.Generator().manual_seed(1)), 12, mode='bilinear')
    with torch.no_grad(): dense = net(other)
    far,states = {},[]
    for target,cache in (('own', 64), ('dense', 64), ('dense', 0)):
        pruned = copy.deepcopy(net)
        reconstruct(pruned, images, .3, 'sparsegpt', target=target, cache_mb=cache)
        states.append(pruned.state_dict())
        with torch.no_grad(): far[target] = float((pruned(other)-dense).square().mean())
    assert far['dense'] < far['own']
    assert all(torch.equal(a, b) for a,b in zip(states[1].values(), states[2].values()))
    with pytest.raises(OpenTransError, match='not a function'):
        reconstruct(net, lambda model: iter(()), .3, target='dense')

def test_better_than_magnitude_where_it_counts(images):
    """The outputs of the whole network on other images, by method: reconstruction is nearer to the dense one than
    magnitude."""
    net = network()
    other = F.interpolate(torch.randn(16, 3, 5, 5, generator=torch.Generator().manual_seed(1)), 12, mode='bilinear')
    with torch.no_grad(): dense = net(other)
    far = {}
    for method in ('magnitude', 'wanda', 'sparsegpt', 'alps'):
        pruned = copy.deepcopy(net)
        reconstruct(pruned, images, .3, method)
        with torch.no_grad(): far[method] = float((pruned(other)-dense).square().mean())
    assert far['alps'] < far['sparsegpt'] < far['magnitude'] and far['wanda'] < far['magnitude']

@pytest.mark.parametrize('name,size', (('ViT-B-32', 32), ('convnext_base', 32), ('RN50', 32)))
def test_towers_of_open_clip(name, size):
    """The layers of each family are all reached: packed attention, depthwise and pointwise convolutions, shortcuts.
    Made small."""
    if name == 'RN50':
        from open_clip.modified_resnet import ModifiedResNet
        tower = ModifiedResNet(layers=(1, 1, 1, 1), output_dim=32, heads=4, image_size=size, width=8)
    elif name.startswith('ViT'):
        from open_clip.transformer import VisionTransformer
        tower = VisionTransformer(image_size=size, patch_size=8, width=32, layers=2, heads=4, mlp_ratio=2,
                                  output_dim=16)
    else:
        timm = pytest.importorskip('timm')
        tower = timm.create_model('convnext_atto', depths=(1, 1, 2, 1), dims=(8, 16, 32, 64), num_classes=0)
    torch.manual_seed(0)
    batches = [torch.rand(4, 3, size, size) for _ in range(2)]
    mask,table = reconstruct(tower, batches, .4, 'sparsegpt')
    assert set(table.index) == {layer.name for layer in prunable(tower)} and (table.error < 1).all()
    assert mask.density == pytest.approx(.4, abs=5e-3)
    assert all((w[~mask[n]] == 0).all() for n,w in mask.weights(tower).items())

def test_the_output_projection_of_attention_sees_what_it_sees():
    "Against scaled_dot_product_attention by hand."
    torch.manual_seed(0)
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first,self.attn = nn.Linear(8, 8),nn.MultiheadAttention(8, 2, batch_first=True)
        def forward(self, x):
            x = self.first(x)
            return self.attn(x, x, x)[0]
    net,x = Net().eval(),torch.randn(3, 5, 8)
    seen = input_grams(net, [x])['attn.out_proj.weight']
    q,k,v = F.linear(net.first(x), net.attn.in_proj_weight, net.attn.in_proj_bias).unflatten(-1, (3, 2, 4)).permute(
        2, 0, 3, 1, 4)
    rows = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1)
    torch.testing.assert_close(seen.total[0].float(), (rows.T @ rows).detach(), rtol=1e-4, atol=1e-4)

def test_memory_is_that_of_one_batch():
    "Forty batches leave no more behind than four: the sums."
    net,x = network(),torch.rand(4, 3, 12, 12)
    held = []
    for n in (4, 40):
        sums = input_grams(net, [x]*n)
        held.append(sum(s.total.numel() for s in {id(s): s for s in sums.values()}.values()))
        assert all(s.count == n*4*s.count//(n*4) for s in sums.values())
    assert held[0] == held[1]

# --- the contract

def test_criteria_serve_by_imp_and_reconstruct_alike(images):
    from opentrans.pruning import imp
    net = network()
    for method in ('sparsegpt', 'alps'):
        by = SparseMask.by(method, net, .2, losses=images, scope='layer')
        direct,_ = reconstruct(copy.deepcopy(net), images, .2, method, 'layer')
        assert by == direct
        each = layer_densities('erdos-renyi-kernel', net, .2)
        by = SparseMask.by(method, net, each, losses=images, scope='layer')
        assert by == reconstruct(copy.deepcopy(net), images, .2, method, 'layer', densities=each)[0]
    def losses(model):
        for x in images: yield model(x).square().mean()
    assert SparseMask.by('wanda', net, .2, losses=losses) == SparseMask.by('wanda', net, .2, losses=images)
    mask,history = imp(net, lambda model: None, schedule=[.5, .3], criterion='sparsegpt', losses=losses)
    assert mask.density == pytest.approx(.3, abs=1e-3) and len(history) == 2

def test_densities():
    net = network()
    sizes = {layer.name: layer.weight.numel() for layer in prunable(net)}
    for rule in ('uniform', 'erdos-renyi-kernel', 'global', 'alpha'):
        shares = layer_densities(rule, net, .2)
        assert sum(shares[n]*k for n,k in sizes.items())/sum(sizes.values()) == pytest.approx(.2, abs=5e-3)
    shapes = {layer.name: layer.weight.shape for layer in prunable(net)}
    kernel = layer_densities('erdos-renyi-kernel', net, .05)
    free = {n: d*shapes[n].numel()/sum(shapes[n]) for n,d in kernel.items() if d < 1}
    assert max(free.values()) == pytest.approx(min(free.values()), rel=1e-6)
    given = dict.fromkeys(sizes, .5)
    assert layer_densities(lambda model, density: given, net, .2) == given
    with pytest.raises(OpenTransError, match='looks at data'): layer_densities('owl', net, .2)
    with pytest.raises(OpenTransError, match='unknown layer|Unknown layer'):
        layer_densities({**given, 'none': .1}, net, .2)

def test_alpha_and_clock_are_rules_of_their_own():
    from opentrans.clip import ClipBackbone
    from opentrans.heavy_tail import analyze
    clip = ClipBackbone.create('shapes-rn', pretrained='shapes-rn')
    found = [layer.name for layer in prunable(clip)]
    table = analyze(clip).only(found)
    shares = layer_densities('alpha', clip, .2)
    assert shares == {name: pytest.approx(table.densities(.2, .3)[name]) for name in found}
    assert shares[table.frame.alpha.idxmax()] < .2 < shares[table.frame.alpha.idxmin()]
    priced,free = layer_densities('clock', clip, .2),layer_densities('global', clip, .2)
    sizes = {layer.name: layer.weight.numel() for layer in prunable(clip)}
    for each in (priced, free):
        assert sum(each[n]*k for n,k in sizes.items())/sum(sizes.values()) == pytest.approx(.2, abs=5e-3)
    assert priced != free

def test_owl_is_its_formula(images):
    "Layers of one size: the densities of the released code, lambda and M as there."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 16), *[nn.Linear(16, 16) for _ in range(4)])
    batches = [x.flatten(2).mT.flatten(0, 1) for x in images]
    norms = {n: s.squares[0].sqrt().float() for n,s in input_grams(net, batches).items()}
    ratio = []
    for layer in prunable(net):
        score = layer.weight.detach().abs()*norms[layer.name]
        ratio.append(float((score > 2*score.mean()).float().mean()))
    ratio = np.array(ratio)
    ratio = (ratio-ratio.min())/(ratio.max()-ratio.min())*.08*2
    expected = ratio-ratio.mean()+.3
    from opentrans.pruning import owl
    found = owl(net, prunable(net), .3, batches, outlier=2.)
    np.testing.assert_allclose([*found.values()], expected, rtol=1e-4)

@given(st.dictionaries(st.text(min_size=1), st.tuples(st.floats(.01, 10), st.integers(1, 1000)), min_size=1),
       st.floats(.01, 1))
@few
def test_fitted_densities_sum_up(parts, density):
    sizes = {n: k for n,(_,k) in parts.items()}
    fitted = fit_densities({n: s for n,(s,_) in parts.items()}, sizes, density)
    assert all(0 < d <= 1 for d in fitted.values())
    assert sum(fitted[n]*k for n,k in sizes.items()) == pytest.approx(density*sum(sizes.values()), rel=1e-3)

@pytest.mark.parametrize('call,says',
                         ((dict(batches=[]), 'no images'), (dict(batches=['a']), 'A batch is a str'),
                          (dict(batches=3), 'give a list or a loader'), (dict(density=0), 'density must be'),
                          (dict(method='magic'), 'Unknown method'), (dict(scope='2:4'), 'density of its own'),
                          (dict(densities='beta'), 'rule of densities'), (dict(target='best'), 'target'),
                          (dict(damping=-1), 'damping')))
def test_bad_input_is_told(images, call, says):
    with pytest.raises(OpenTransError, match=says):
        reconstruct(network(), **{**dict(batches=images, density=.3), **call})

def test_layers_that_cannot_be_seen_are_told(images):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 4, 1)
            self.up = nn.ConvTranspose2d(4, 4, 2)
            self.idle = nn.Conv2d(4, 4, 1)
        def forward(self, x): return self.up(self.first(x))
    with pytest.raises(OpenTransError, match='not seen as rows.*up.weight'): reconstruct(Odd(), images, .3)
    with pytest.raises(OpenTransError, match='never used.*idle.weight'):
        reconstruct(Odd(), images, .3, skip=('up',))

@torch.no_grad()
@pytest.mark.parametrize('size,stride,dilation,groups',
                         [((9, 10), 2, 1, 1), ((7, 13), (1, 1), 2, 2), ((1, 5), 3, 1, 4)])
def test_rows_of_a_convolution_that_pads_by_the_size_of_the_image(size, stride, dilation, groups):
    Conv2dSame = pytest.importorskip('timm.layers').Conv2dSame
    conv = Conv2dSame(4, 8, 3, stride, dilation=dilation, groups=groups, bias=False)
    x = torch.randn(2, 4, *size)
    layer, = layers(nn.Sequential(conv))
    parts = zip(input_rows(layer, x), weight_rows(layer, conv.weight))
    ours = torch.cat([rows @ weights.T for rows,weights in parts], -1)
    theirs = conv(x).permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(ours, theirs)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_sums_of_squares_too_large_for_half_precision(dtype):
    "The same weights stay as in float64."
    weights = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = correlated(4000, 16)*torch.linspace(1, 30, 16)
    inputs = Inputs((x.T @ x).double()[None])
    new,kept = wanda(weights, inputs, Budget(.5, 'output'))
    assert kept.equal(wanda(weights.double(), inputs, Budget(.5, 'output'))[1]) and new.dtype == dtype

@pytest.mark.parametrize('show,says', [(lambda net: None, 'yield'), (lambda net: iter(()), 'no images')])
def test_a_function_that_shows_nothing(show, says):
    with pytest.raises(OpenTransError, match=says): go_over(network(), show)
    with pytest.raises(OpenTransError, match=says): reconstruct(network(), show, .3)
