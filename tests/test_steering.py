"""What alpha steers: pruning, learning rates, weight decay. References are formulas in plain NumPy and, where
clones are there, the published code."""
import ast, copy, math, os, sys, types
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given, strategies as st
from torch import nn
from opentrans.errors import OpenTransError
from opentrans.heavy_tail import analyze, assign, Blocks, block_of, fit_power_law, LayerValues, matrices
from opentrans.pruning import imp, SparseMask

pytestmark = pytest.mark.usefixtures('one_thread')

def net(seed=0, widths=(64, 96, 64, 128, 80)):
    torch.manual_seed(seed)
    return nn.Sequential(*[nn.Linear(a, b) for a,b in zip(widths, widths[1:])])

def table(seed=0, **options): return analyze(net(seed), **{'xmin': 'median', 'skip': ()} | options)

scores = st.lists(st.floats(1.1, 50), min_size=2, max_size=30).filter(lambda v: max(v)-min(v) > 1e-3)

# Formulas

def alphapruning(alpha, sizes, sparsity, epsilon):
    "Eq. 2 of AlphaPruning, as in `ww_sparsity`."
    alpha,sizes = np.asarray(alpha),np.asarray(sizes)
    ratios = (alpha-alpha.min())/(alpha.max()-alpha.min())*2*epsilon + 1-epsilon
    return ratios*(sizes.sum()*sparsity/(sizes*ratios).sum())

@given(scores, st.tuples(st.floats(.1, 1), st.floats(1, 5)))
def test_linear_and_rank(alpha, spread):
    low,high = spread
    a = np.asarray(alpha)
    assert np.allclose(assign(a, spread), low + (high-low)*(a-a.min())/(a.max()-a.min()), rtol=1e-9)
    ranks = assign(a, spread, 'rank')
    assert np.allclose(np.sort(ranks), low + (high-low)*np.arange(len(a))/len(a))
    assert (np.diff(ranks[np.argsort(a, kind='stable')]) >= 0).all()

@given(scores)
def test_proportional_maps_keep_the_mean(alpha):
    for how in ('sqrt', 'log2'):
        v = assign(alpha, how=how)
        f = np.sqrt if how == 'sqrt' else np.log2
        assert np.isclose(v.mean(), 1) and np.allclose(v/v[0], f(alpha)/f(alpha[0]))

def test_densities_are_those_of_the_formula():
    t = table()
    sizes = t.frame.params.to_numpy()
    # 1+spread times the share to prune stays below one
    for density,spread in ((.5, .3), (.4, .2), (.7, .5), (.3, 0.)):
        shares = alphapruning(t.frame.alpha, sizes, 1-density, spread)
        assert (shares < 1-density/10).all()
        assert np.allclose(list(t.densities(density, spread).values()), 1-shares, atol=1e-9)
    assert list(t.densities(.5)) == list(t.frame.index)

@example(.125, 1., 0)
@given(st.floats(.02, 1), st.floats(0, 1), st.integers(0, 4))
def test_densities_add_up(density, spread, seed):
    t = table(seed)
    found = t.densities(density, spread)
    sizes = t.frame.params
    assert np.isclose(sum(found[n]*sizes[n] for n in found)/sizes.sum(), density, rtol=1e-6)
    assert min(found.values()) >= density/10 - 1e-9 and max(found.values()) <= 1

def test_blocks_share_a_value():
    names = ['stem.weight', 'layer1.0.conv1.weight', 'layer1.0.conv2.weight', 'layer1.1.conv1.weight',
             'visual.transformer.resblocks.11.mlp.c_fc.weight', 'model.layers.3.self_attn.q_proj.weight',
             'h.0.attn.in_proj_weight[q]', '7.weight', 'blocks.2.1.conv_pw.weight']
    assert [block_of(n) for n in names] == ['stem.weight', 'layer1.0', 'layer1.0', 'layer1.1',
                                            'visual.transformer.resblocks.11', 'model.layers.3', 'h.0', '7',
                                            'blocks.2.1']
    model = nn.ModuleDict(dict(blocks=nn.ModuleList([net(0), net(1)])))
    t = analyze(model, xmin='median', skip=())
    assert t.scores(per='block').nunique() == 8 # a number after `blocks.0` is a block of its own
    per = t.densities(.5, per='block')
    assert np.isclose(sum(per[n]*t.frame.params[n] for n in per)/t.frame.params.sum(), .5)

def test_layers_that_say_nothing_get_what_is_usual():
    model = net()
    nn.init.zeros_(model[1].weight)
    t = analyze(model, xmin='median', skip=())
    assert '1.weight' not in t.lr_groups(1.) and '1.weight' in t.densities(.5)
    few = analyze(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 20), nn.Linear(20, 64), nn.Linear(64, 64)),
                  xmin='median', skip=())
    assert set(few.lr_groups(1.)) == {'0.weight', '3.weight'}

def test_bad_requests_are_named():
    t = table()
    for bad in (dict(density=0), dict(density=1.5), dict(density=.5, spread=2), dict(density=.5, by='beta'),
                dict(density=.5, per='stage'), dict(density=.5, by='z')):
        with pytest.raises(OpenTransError): t.densities(**bad)
    for bad in (dict(base=-1), dict(base=1, how='cubic'), dict(base=1, spread=(2, 1)), dict(base=1, spread=3)):
        with pytest.raises(OpenTransError): t.lr_groups(**bad)
    with pytest.raises(OpenTransError): t.densities(.5).param_groups(net())
    with pytest.raises(OpenTransError): t.lr_groups(1.).param_groups(nn.Linear(3, 3))

# Groups of an optimizer

class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(64, 64, 1)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = nn.Conv2d(64, 64, 1)
        self.bn2 = nn.BatchNorm2d(64)
        self.attn,self.norm = nn.MultiheadAttention(64, 4),nn.LayerNorm(64)

def test_biases_and_norms_go_with_their_layer():
    model = Residual()
    rates = LayerValues({'conv1.weight': .3, 'attn.in_proj_weight[q]': .1, 'attn.in_proj_weight[k]': .2,
                         'attn.in_proj_weight[v]': .6}, 'lr', .1)
    groups = rates.param_groups(model)
    names = {id(p): n for n,p in model.named_parameters()}
    held = {}
    for g in groups: held.setdefault(round(g['lr'], 9), set()).update(names[id(p)] for p in g['params'])
    assert held == {.3: {'conv1.weight', 'conv1.bias', 'bn1.weight', 'bn1.bias', 'attn.in_proj_weight',
                         'attn.in_proj_bias'},
                    .1: {'conv2.weight', 'conv2.bias', 'bn2.weight', 'bn2.bias', 'attn.out_proj.weight',
                         'attn.out_proj.bias', 'norm.weight', 'norm.bias'}}
    opt = torch.optim.SGD(groups, lr=1.)
    assert sum(len(g['params']) for g in opt.param_groups) == len(names)

def test_decay_groups_are_groups_of_decay():
    model = net()
    decay = analyze(model, xmin='median', skip=()).decay_groups(.01)
    groups = decay.param_groups(model)
    assert {g['weight_decay']
            for g in groups} == set(decay.values()) | ({.01} & {g['weight_decay'] for g in groups})
    assert math.isclose(min(decay.values()), .01*2/3) and math.isclose(max(decay.values()), .05)
    opt = torch.optim.AdamW(groups, lr=1e-3)
    assert len(opt.param_groups) == len(groups)

# Masks

def test_masks_keep_what_each_layer_is_given():
    model = net()
    asked = analyze(model, xmin='median', skip=()).only(SparseMask.ones(model, skip=()).names).densities(.3)
    for made in (SparseMask.magnitude(model, asked, skip=()), SparseMask.random(model, asked, skip=()),
                 SparseMask.by('magnitude', model, asked, skip=())):
        assert abs(made.kept - .3*made.total) <= 1
        for n,m in made.items(): assert abs(int(m.sum()) - asked[n]*m.numel()) <= 1
    largest = SparseMask.magnitude(model, asked, skip=())
    for layer in model[1:]:
        name = next(n for n,p in model.named_parameters() if p is layer.weight)
        w,m = layer.weight.detach().abs(),largest[name]
        assert w[m].min() >= w[~m].max()
    channels = SparseMask.magnitude(model, asked, scope='channel', skip=())
    assert all(m.flatten(1).any(1).eq(m.flatten(1).all(1)).all() for _,m in channels.items())

def test_densities_that_do_not_fit_are_named():
    model = net()
    with pytest.raises(OpenTransError, match='name no share'):
        SparseMask.magnitude(model, {'1.weight': .5}, skip=())
    with pytest.raises(OpenTransError, match='empty'): SparseMask.magnitude(model, {}, skip=())
    with pytest.raises(OpenTransError, match='1.weight'): SparseMask.magnitude(model, {'1.weight': 1.5}, skip=())
    whole = {n: .5 for n in SparseMask.ones(model, skip=()).names}
    with pytest.raises(OpenTransError, match='density of its own'):
        SparseMask.magnitude(model, whole, scope='2:4', skip=())
    with pytest.raises(OpenTransError, match='one of the two'):
        SparseMask.random(model, whole, like=SparseMask.ones(model, skip=()))
    with pytest.raises(OpenTransError, match='one of the two'):
        imp(model, lambda m: None, density=whole, schedule=[.5], skip=())

def test_imp_ends_at_the_densities_and_goes_on_after_a_kill(tmp_path):
    "Every round prunes layers in proportion; a run that was cut off ends with the same mask."
    model = net()
    asked = analyze(model, xmin='median', skip=()).only(SparseMask.ones(model, skip=()).names).densities(.2)
    seen = []
    def train(m, r):
        seen.append({n: float((p != 0).float().mean()) for n,p in m.named_parameters() if n in asked})
        with torch.no_grad():
            for p in m.parameters(): p.mul_(1.01)
        if r == 3 and fail: raise RuntimeError('killed')
        return .1
    fail = False
    whole,history = imp(copy.deepcopy(model), train, density=asked, p=.3, skip=())
    assert abs(whole.kept - .2*whole.total) <= 1 and history.kept.is_monotonic_decreasing
    for n,m in whole.items(): assert abs(int(m.sum()) - asked[n]*m.numel()) <= 1
    for kept in seen[1:]:
        grown = [(1-v)/(1-asked[n]) for n,v in kept.items()]
        assert max(grown)-min(grown) < .02
    fail,again = True,copy.deepcopy(model)
    with pytest.raises(RuntimeError): imp(again, train, density=asked, p=.3, checkpoint_dir=tmp_path, skip=())
    fail = False
    resumed,_ = imp(copy.deepcopy(model), train, density=asked, p=.3, checkpoint_dir=tmp_path, skip=())
    assert resumed == whole
    with pytest.raises(OpenTransError):
        imp(copy.deepcopy(model), train, density={n: d*.9 for n,d in asked.items()}, p=.3, checkpoint_dir=tmp_path,
            skip=())

# Fine-tuning

def test_finetune_takes_them_by_one_argument(tmp_path):
    from opentrans.clip import ClipBackbone
    from opentrans.data import ShapesWorld
    from opentrans.frameworks import build
    from opentrans.training import finetune, param_groups, Recipe
    data = ShapesWorld(n=4)
    clip = ClipBackbone.create('shapes-rn')
    seg = build('deeplabv3', clip, vocabulary=data.vocabulary, preset='small', seed=0)
    t = analyze(seg.backbone, xmin='median')
    rates,decay = t.lr_groups(1.),t.decay_groups(1.)
    recipe = Recipe.tiny().replace(iterations=2, weight_decay=.01)
    groups = param_groups(seg, recipe, [rates, decay])
    names = {id(p): n for n,p in seg.named_parameters()}
    usual = {names[id(p)]: (g['lr'], g['weight_decay']) for g in param_groups(seg, recipe) for p in g['params']}
    found = {names[id(p)]: (g['lr'], g['weight_decay']) for g in groups for p in g['params']}
    assert set(usual) == set(found)
    faster,decaying = rates.factors(seg),decay.factors(seg)
    for key,n in names.items():
        assert (math.isclose(found[n][0], usual[n][0]*faster.get(key, 1.))
                and math.isclose(found[n][1], usual[n][1]*decaying.get(key, 1.)))
    assert len({v for v in faster.values()}) > 3
    history = finetune(seg, data, recipe, per_layer=[rates, decay], checkpoint_dir=tmp_path)
    assert len(history) == 2
    again = build('deeplabv3', ClipBackbone.create('shapes-rn'), vocabulary=data.vocabulary, preset='small', seed=0)
    with pytest.raises(OpenTransError): finetune(again, data, recipe, checkpoint_dir=tmp_path)
    for bad in (t.densities(.5), [rates, rates], 3*[None]):
        with pytest.raises(OpenTransError, match='per_layer'): param_groups(seg, recipe, bad)

# The published code

def clone(variable, repository, file):
    "A file of a clone whose folder an environment variable names."
    path = Path(os.environ.get(variable, ''))/file
    if not os.environ.get(variable) or not path.is_file():
        pytest.skip(f'{variable} does not name a folder with a clone of {repository}')
    return path

def imported(path, monkeypatch, package=''):
    "A published file as a module; what it puts on a GPU stays where it is."
    monkeypatch.setattr(torch.Tensor, 'cuda', lambda self, *a, **k: self)
    module = types.ModuleType(f'{package}.{path.stem}' if package else path.stem)
    if package:
        parent = types.ModuleType(package)
        parent.__path__ = [str(path.parent)]
        monkeypatch.setitem(sys.modules, package, parent)
        module.__package__ = package
    for name in ('weightwatcher', 'tqdm'):
        if name not in sys.modules: monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    exec(compile(path.read_text(), str(path), 'exec'), module.__dict__)
    return module

def function(path, name, space):
    "One function of a published file whose imports are not wanted."
    found = next(n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef) and n.name == name)
    exec(compile(ast.Module([found], []), str(path), 'exec'), space)
    return space[name]

def test_alphapruning_itself(tmp_path, monkeypatch, capsys):
    path = clone('OPENTRANS_ALPHAPRUNING', 'haiquanlu/AlphaPruning', 'lib/prune.py')
    blocks = nn.ModuleList([net(s, (64, 64, 96)) for s in range(3)])
    t = analyze(nn.ModuleDict(dict(blocks=blocks)), xmin='median', skip=())
    np.save(tmp_path/'alpha.npy', t.frame.alpha.to_numpy())
    space = dict(np=np, torch=torch,
                 find_layers=lambda b: {n: m for n,m in b.named_modules() if isinstance(m, nn.Linear)})
    theirs = function(path, 'ww_sparsity', space)
    model = types.SimpleNamespace(model=types.SimpleNamespace(layers=blocks))
    args = types.SimpleNamespace(model='llama', ww_metric_cache=tmp_path, ww_metric='alpha', mapping_type='layer',
                                 sparsity_ratio=.6)
    found = theirs(args, model, 'cpu', .7, 1.3)
    assert np.allclose(1-np.array(list(t.densities(.4, .3).values())), found, atol=1e-6)

@pytest.mark.parametrize('rule,published', [('median', 'xmin_mid'), ('ks', None), ('paper', 'xmin_peak')])
def test_alphas_of_alphapruning(rule, published, monkeypatch, capsys):
    module = imported(clone('OPENTRANS_ALPHAPRUNING', 'haiquanlu/AlphaPruning', 'image_classifiers/esd_utils.py'),
                      monkeypatch)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Conv2d(32, 48, 3), nn.Linear(100, 60))
    found = module.net_esd_estimator(model, fix_fingers=published)['alpha']
    mine = analyze(model, xmin=rule, skip=(), floor=0, max_aspect=100).frame.alpha
    assert np.allclose(mine, found, rtol=2e-3), (mine.tolist(), found)

@pytest.mark.parametrize('how,published',
                         [('linear', 'tb_linear_map'), ('sqrt', 'tb_sqrt'), ('log2', 'tb_log2'),
                          ('rank', 'tb_step')])
def test_tempbalance_itself(how, published, monkeypatch):
    module = imported(clone('OPENTRANS_TEMPBALANCE', 'YefanZhou/TempBalance', 'tempbalance.py'), monkeypatch)
    t = table()
    theirs = module.Tempbalance(net(), lr_min_ratio=.5, lr_max_ratio=1.5, assign_func=published)
    found = theirs.get_layer_temps(published, t.frame.alpha.to_numpy(), .1)
    assert np.allclose(list(t.lr_groups(.1, how=how).values()), found, atol=1e-6)

def test_groups_of_tempbalance(monkeypatch):
    "The whole of it, on a residual network: the same parameters learn at the same rates."
    module = imported(clone('OPENTRANS_TEMPBALANCE', 'YefanZhou/TempBalance', 'tempbalance.py'), monkeypatch)
    torch.manual_seed(0)
    model = nn.Sequential()
    for i in range(4):
        model.add_module(f'conv{i}', nn.Conv2d(64, 64+16*i if i == 3 else 64, 3))
        model.add_module(f'bn{i}', nn.BatchNorm2d(64+16*i if i == 3 else 64))
    model.add_module('fc', nn.Linear(112, 60))
    groups,_ = module.Tempbalance(model).build_optimizer_param_group(.1)
    theirs = {id(p): g['lr'] for g in groups for p in g['params']}
    t = analyze(model, xmin='median', skip=(), floor=0).only([f'conv{i}.weight' for i in range(1, 4)])
    mine = {id(p): g['lr'] for g in t.lr_groups(.1).param_groups(model) for p in g['params']}
    assert set(mine) == set(theirs) and all(math.isclose(mine[k], theirs[k], rel_tol=2e-3) for k in mine)

@pytest.mark.parametrize('how,published',
                         [('linear', 'tb_linear_map'), ('sqrt', 'tb_sqrt'), ('log2', 'tb_log2'),
                          ('sigmoid', 'layerwise_sigmoid')])
@pytest.mark.parametrize('folder,name',
                         [('LLaMa-pretraining', 'modulewise_AlphaDecay'), ('ViT-training', 'layerTempbalance')])
def test_alphadecay_itself(folder, name, how, published, monkeypatch):
    module = imported(clone('OPENTRANS_ALPHADECAY', 'hed-ucas/AlphaDecay', f'{folder}/WeightDecayUnbalance.py'),
                      monkeypatch)
    model = nn.ModuleDict(
        dict(
            model=nn.ModuleDict(
                dict(
                    layers=nn.ModuleList(
                        [nn.ModuleDict(dict(q=nn.Linear(64, 96), k=nn.Linear(64, 64), up=nn.Linear(64, 128)))
                         for _ in range(3)])))))
    t = analyze(model, xmin='median', skip=())
    theirs = getattr(module, name)(model, True, wd_min_ratio=2/3, wd_max_ratio=5, sigmoid_alpha=4)
    stats = pd.DataFrame(dict(longname=[n.removesuffix('.weight') for n in t]))
    found = theirs.get_layer_temps(published, t.frame.alpha.to_numpy(), .1, stats)
    assert np.allclose(list(t.decay_groups(.1, how=how).values()), found, atol=1e-6)

def test_farms_itself(monkeypatch, capsys):
    "Its windows on a wide matrix, and its fit of them."
    module = imported(clone('OPENTRANS_FARMS', 'HUST-AI-HYZ/FARMS', 'LLM_Pruning/lib/sampling.py'), monkeypatch)
    w = torch.randn(120, 300, generator=torch.Generator().manual_seed(0))
    for side,ratio,windows in ((40, 2., 5), (100, 1., 10), (64, 1.5, 3)):
        theirs = module.sampled_eigs(w.clone(), False, .5, side, ratio, windows).numpy()
        t = analyze({'a.weight': w}, aspect=Blocks(ratio, side=side, windows=windows), xmin='median', floor=0)
        assert np.allclose(t.spectra['a.weight'].evals, theirs, rtol=1e-3, atol=1e-5*theirs.max())
    # what it has for kernels takes a corner of each
    with pytest.raises(Exception): module.sampled_eigs(torch.randn(8, 8, 3, 3), True, .5, 4, 'square', 3)

def test_farms_for_kernels(monkeypatch, capsys):
    "Its kernels are cut side by side as here; it takes the mean of the blocks' alphas, where one may also pool."
    path = clone('OPENTRANS_FARMS', 'HUST-AI-HYZ/FARMS', 'LLM_Pruning/lib/esd_utils_farms.py')
    sampling = imported(path.parent/'sampling.py', monkeypatch)
    monkeypatch.setitem(sys.modules, 'lib.sampling', sampling)
    source = path.read_text().replace('from .sampling import *', '')
    module = types.ModuleType('farms')
    module.__dict__.update({n: v for n,v in vars(sampling).items() if not n.startswith('__')})
    exec(compile(source, str(path), 'exec'), module.__dict__)
    # it asks an array for .cpu()
    module.np = types.SimpleNamespace(mean=np.mean,
                                      concatenate=lambda parts: torch.from_numpy(np.concatenate(parts)))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 96, 3, bias=False))
    found = module.net_esd_estimator_farms(model, fix_fingers='xmin_mid', Q_ratio=1.)['alpha'][0]
    mats = matrices(model[0].weight)
    each = [fit_power_law(np.sort((torch.linalg.svdvals(mats[:,i:i+32])**2).flatten().numpy()), 'median').alpha
            for i in (0, 32, 64)]
    assert np.isclose(found, np.mean(each), rtol=2e-3)
    assert abs(analyze(model, xmin='median', aspect=1., skip=()).frame.alpha.item() - found) < .05

def test_what_cannot_be_steered_by_is_said():
    for bad in (['a'], [[1], [2, 3]]):
        with pytest.raises(OpenTransError, match='finite numbers'): assign(bad)
    with pytest.raises(OpenTransError, match='3 scores and 2 blocks'): assign([1., 2, 3], how='sigmoid', blocks='ab')
    small = analyze(nn.Linear(20, 20))
    with pytest.raises(OpenTransError, match='rest on fewer than 50 eigenvalues'): small.lr_groups(1.)
    for by in ('alpha*', 'random'):
        with pytest.raises(OpenTransError, match='Unknown column of numbers'): table().scores(by)
    unshuffled = table().refit('median', null='shuffle')
    with pytest.raises(OpenTransError, match="a number in the column 'z'"): unshuffled.scores('z')

def test_ranks_go_up_in_equal_steps_that_end_one_before_the_largest():
    assert assign([4., 1, 2, 3], (.5, 1.5), 'rank').tolist() == [1.25, .5, .75, 1.]
