"""Alpha without bias: random spectra, blocks of one aspect, and what is frozen where nothing is trained. References
are whole matrices, and loops in plain Python."""
import logging, math
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, strategies as st
from scipy import integrate, stats
from torch import nn
from opentrans.errors import OpenTransError
from opentrans.heavy_tail import (analyze, Blocks, esd, kurtosis_of, LayerTable, marchenko_pastur, mp_edges,
                                  mp_quantiles, Null, random_edge, random_spectra, shuffled, with_kurtosis)

pytestmark = pytest.mark.usefixtures('one_thread')

def gaussian_spectra(shape, draws, seed=0):
    "Eigenvalues of whole random matrices."
    rng = np.random.default_rng(seed)
    return np.stack([np.linalg.svd(rng.standard_normal(shape), compute_uv=False)[::-1]**2 for _ in range(draws)])

@pytest.mark.parametrize('shape', [(1, 12), (7, 7), (20, 60), (60, 20)])
def test_random_spectra_are_those_of_random_matrices(shape):
    """In law: the smallest, the middle and the largest eigenvalue, and the sums of squares, of 400 matrices each
    way."""
    drawn,true = random_spectra((1, *shape), 400),gaussian_spectra(shape, 400)
    assert drawn.shape == true.shape and (np.diff(drawn) >= 0).all()
    for a,b in [*zip(drawn.T[[0, len(drawn.T)//2, -1]], true.T[[0, len(true.T)//2, -1]]),
                (drawn.sum(1), true.sum(1)), ((drawn**2).sum(1), (true**2).sum(1))]:
        assert stats.ks_2samp(a, b).pvalue > 1e-3

def test_random_spectra_of_a_shape_are_drawn_once():
    first = random_spectra((2, 10, 20), 5, seed=3)
    assert random_spectra((2, 10, 20), 5, seed=3) is first and not first.flags.writeable
    assert first.shape == (5, 20) and not np.array_equal(first, random_spectra((2, 10, 20), 5, seed=4))

@pytest.mark.parametrize('shape', [(50, 50), (50, 100), (80, 20)])
def test_quantiles_of_the_law(shape):
    "By integrating the density itself."
    x,low = mp_quantiles((3, *shape)),mp_edges(shape)[0]
    for i in (10, 40, len(x)//2, len(x)-5):
        # of u = sqrt(x-low), in which it is bounded
        below = integrate.quad(lambda u: 2*u*marchenko_pastur(low+u*u, shape), 0, math.sqrt(x[i]-low), limit=400)[0]
        assert abs(below - (i+.5)/len(x)) < 1e-4

def test_one_row_is_chi_square():
    x = mp_quantiles((2, 1, 9))
    assert np.allclose(stats.chi2.cdf(x, 9), (np.arange(2)+.5)/2)

def test_what_the_largest_eigenvalue_stays_below():
    for stack in ((1, 60, 60), (4, 30, 120)):
        top = random_spectra(stack, 1500)[:,-1]
        assert abs((top < random_edge(stack, .9)).mean() - .9) < .035

@pytest.mark.parametrize('shape', [(40, 40), (40, 120), (1, 30)])
@pytest.mark.parametrize('entries,kurtosis', [('uniform', -1.2), ('laplace', 3.), ('signs', -2.)])
def test_other_numbers_than_normal_ones(shape, entries, kurtosis):
    """The mean of each sum over the spectrum (of logarithms, squares, roots) moves as it does for whole matrices of
    such numbers."""
    rng = np.random.default_rng(0)
    draw = dict(uniform=lambda: rng.uniform(-3**.5, 3**.5, shape), laplace=lambda: rng.laplace(size=shape)/2**.5,
                signs=lambda: rng.choice([-1., 1.], shape))[entries]
    true = np.stack([np.linalg.svd(draw(), compute_uv=False)**2 for _ in range(600)])
    normal = random_spectra((1, *shape), 600)
    moved = with_kurtosis(normal, (1, *shape), kurtosis)
    for f in (np.sqrt, np.square, lambda x: np.maximum(x, x.mean())):
        sums = [f(np.sort(x, 1)/x.mean(1, keepdims=True)).sum(1) if shape[0] > 1 else f(x).sum(1)
                for x in (true, normal, moved)]
        error = np.hypot(sums[0].std(), sums[2].std())/math.sqrt(600)
        away = [abs(sums[0].mean()-other.mean()) for other in sums[1:]]
        assert away[1] < max(4*error, .35*away[0]), (entries, shape, away, error)

def test_kurtosis():
    x = (torch.randn(3, 50, 80,
                     generator=torch.Generator().manual_seed(0)).double()*torch.tensor([1., 5., 1e-12])[
             :,None,None])
    assert np.isclose(kurtosis_of(x), stats.kurtosis(x.flatten(1).numpy(), axis=1).mean(), atol=5e-3)
    assert kurtosis_of(torch.zeros(1, 4, 4)) == -3 and kurtosis_of(x.to(torch.complex64)) == 0

# Blocks

def plain_windows(w, side, ratio, windows):
    "FARMS' sliding windows, as its loops have them."
    rows,cols,found = *w.shape,[]
    side = min(side, rows, cols)
    width = int(side*ratio)
    down,across = (max(1, (n-b)//(windows-1)) for n,b in ((rows, side), (cols, width)))
    for i in range(min(windows, max(1, (rows-side)//down + 1))):
        for j in range(min(windows, max(1, (cols-width)//across + 1))):
            r,c = min(i*down, rows-side),min(j*across, cols-width)
            found.append(w[r:r+side,c:c+width])
    return torch.stack(found)

@pytest.mark.parametrize('shape,side,ratio,windows',
                         [((40, 90), 16, 2., 4), ((30, 30), 12, 1., 10), ((33, 70), 20, 1.5, 3),
                          ((12, 64), 100, 1., 5)])
def test_windows_are_those_of_farms(shape, side, ratio, windows):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    mine = Blocks(ratio, side=side, windows=windows).cut(w[None])
    assert torch.equal(mine, plain_windows(w, side, ratio, windows))

@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1., 1.5, 2., 4.]), st.sampled_from([None, 3]))
def test_blocks_leave_nothing_out(rows, cols, aspect, side):
    w = torch.arange(rows*cols).reshape(1, rows, cols)
    blocks = Blocks(aspect, side=side).cut(w)
    _,short,long = blocks.shape
    assert set(blocks.flatten().tolist()) == set(range(rows*cols)) and short <= long <= max(aspect*short, 1)
    if rows != cols and aspect == 1 and side is None: assert short == long == min(rows, cols)

def test_places_can_be_drawn():
    w = torch.randn(1, 50, 200)
    one,same,other = (Blocks(seed=s).cut(w) for s in (0, 0, 1))
    assert torch.equal(one, same) and one.shape == other.shape and not torch.equal(one, other)

def test_square_blocks_of_a_layer_are_its_pooled_eigenvalues():
    layer = nn.Linear(48, 144)
    evals = analyze(layer, aspect=1., skip=()).spectra['weight'].evals
    parts = layer.weight.detach().split(48)
    assert np.allclose(evals, np.sort(np.concatenate([esd(p) for p in parts])), rtol=1e-6)

def test_kernels_and_groups_are_cut_too():
    """Slices are cut like matrices; a kernel whose slices are narrow, as that of a depthwise convolution, is read
    as filters."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(32, 64, 3), nn.Conv2d(64, 64, 7, groups=64), nn.Conv2d(64, 96, 3, groups=2),
                        nn.Conv1d(3, 80, 5))
    stacks = {n: s.stack for n,s in analyze(net, aspect=1., skip=()).spectra.items()}
    assert stacks == {'0.weight': (18, 32, 32), '1.weight': (2, 49, 49), '2.weight': (27, 32, 32),
                      '3.weight': (6, 15, 15)}
    whole = analyze(net, skip=(), split_groups=True, aspect=1.).spectra['2.weight']
    assert whole.stack == (36, 32, 32) # two groups, nine positions, 48 rows of 32

def test_bad_blocks_and_nulls_are_named():
    net = nn.Linear(20, 20)
    for bad in (dict(aspect=.5), dict(aspect='square'), dict(null='normal'), dict(null=True)):
        with pytest.raises(OpenTransError): analyze(net, skip=(), **bad)
    for bad in (dict(aspect=2., side=0), dict(windows=1.5)):
        with pytest.raises(OpenTransError): Blocks(**bad)
    with pytest.raises(OpenTransError): Null('gaussian', draws=1)
    with pytest.raises(OpenTransError, match="null='gaussian'"): analyze(net, skip=()).select(by='z')
    with pytest.raises(OpenTransError, match='choose one of: alpha, alpha\\*, random, z'):
        analyze(net, skip=()).select(by='beta')

# The null

def several(seed=0, widths=(64, 64, 256, 64)):
    torch.manual_seed(seed)
    return nn.Sequential(*[nn.Linear(a, b) for a,b in zip(widths, widths[1:])])

@pytest.mark.parametrize('null', ['gaussian', 'shuffle', 'mp'])
@pytest.mark.parametrize('xmin', ['ks', 'median', 'peak', 'paper', .3])
def test_columns_are_their_definition(null, xmin):
    "From the spectra that the table says it drew, fitted one by one."
    t = analyze(several(), xmin=xmin, null=Null(null, draws=4), skip=(), max_aspect=100)
    for name,row in t.frame.iterrows():
        s = t.spectra[name]
        alphas = [s.__class__(name, s.kind, s.shape, x[x > s.cutoff], paper=s.paper).fit(xmin)
                  for x in s.random(t.null)]
        mean = np.mean([f.alpha for f in alphas])
        sd = np.std([f.alpha for f in alphas], ddof=1) if null != 'mp' else alphas[0].sigma
        if math.isnan(mean): continue
        assert np.isclose(row.alpha_null, mean, rtol=1e-6) and np.isclose(row.sd, sd, rtol=1e-4)
        assert np.isclose(row.z, (row.alpha-mean)/sd, rtol=1e-3) and np.isclose(row.excess, row.alpha-mean)
        assert row.spikes == (s.evals > s.random_edge(t.null)).sum()

def test_scale_does_not_matter():
    net = several()
    before = analyze(net, xmin='median', null='gaussian', skip=())
    with torch.no_grad(): net[1].weight *= 7
    after = analyze(net, xmin='median', null='gaussian', skip=())
    assert np.allclose(before.frame.z, after.frame.z, rtol=1e-6)
    assert (before.frame.spikes == after.frame.spikes).all()

def test_a_planted_direction_is_a_spike():
    "Three directions are three spikes; a few large numbers are none among the same numbers in another order."
    torch.manual_seed(0)
    layer = nn.Linear(100, 100, bias=False)
    noise = torch.randn(100, 100)
    def spikes(weight):
        with torch.no_grad(): layer.weight.copy_(weight)
        return [analyze(layer, null=Null(kind, 5), skip=()).frame.spikes.item()
                for kind in ('gaussian', 'mp', 'shuffle')]
    assert spikes(noise) == [0, 0, 0]
    assert spikes(noise + torch.randn(100, 3) @ torch.randn(3, 100)) == [3, 3, 3]
    assert spikes(noise + 60*torch.eye(100)[:,torch.arange(100).roll(3)]*(torch.arange(100) < 2)[:,None])[2] == 0

def test_shuffling_keeps_the_numbers_of_each_matrix():
    mats = torch.randn(5, 8, 12)
    other = shuffled(mats, torch.Generator().manual_seed(0))
    assert (torch.equal(other.flatten(1).sort().values, mats.flatten(1).sort().values)
            and not torch.equal(other, mats))
    rows = torch.randn(30, 1, 9)
    assert not torch.equal(shuffled(rows, torch.Generator().manual_seed(0)).square().sum(-1), rows.square().sum(-1))

def test_a_table_with_a_null_survives(tmp_path):
    "Refitted, cut down and read from its file, it says the same."
    for null in ('gaussian', 'shuffle', 'mp'):
        t = analyze(several(), xmin='median', null=Null(null, 3), skip=(), aspect=1.)
        t.save(tmp_path/'t.safetensors')
        again = LayerTable.load(tmp_path/'t.safetensors')
        pd.testing.assert_frame_equal(t.frame, again.frame)
        assert (again.null == t.null
                and again.options['aspect'] == dict(aspect=1., side=None, windows=None, seed=None))
        pd.testing.assert_frame_equal(t.refit('ks').refit('median').frame, t.frame)
        some = t.only(['0.weight', '2.weight'])
        pd.testing.assert_frame_equal(some.frame, t.frame.loc[['0.weight', '2.weight']])
        assert t.select(by='z').rule.endswith(f'against {null}')

def test_layers_are_chosen_by_any_column():
    t = analyze(several(), xmin='median', null='gaussian', skip=())
    for by in ('z', 'excess', 'stable_rank', 'spectral_norm', 'D'):
        column = t.frame[by]
        assert set(t.select(1/3, by=by).freeze) == {column.idxmin()}
        assert set(t.select(1/3, by=f'{by}*').freeze) == {column.idxmax()}

def test_layers_without_a_fit_have_no_null():
    net = several()
    nn.init.zeros_(net[1].weight)
    t = analyze(net, null='gaussian', skip=())
    assert t.frame.z.isna().tolist() == [False, True, False] and '1.weight' in t.select(by='z').train

# Where nothing is trained

def shares(made, by='alpha', least=5, **options):
    """Share of frozen layers of each aspect, in percent, over several models of one architecture; of aspects with
    at least so many layers."""
    rows = []
    for net in made:
        table = analyze(net, **options)
        rest = set(table.select(by=by).freeze)
        sides = [s.shape[:2] for s in table.spectra.values()]
        rows.append(pd.Series([n in rest for n in table], [max(s)/min(s) for s in sides]))
    frozen,n = pd.concat(rows),len(rows)
    by_aspect = frozen.groupby(level=0)
    return (100*by_aspect.mean())[by_aspect.count() >= least*n]

class Bottlenecks(nn.Module):
    "The shapes of a residual network, in small: 1x1 and 3x3 convolutions of aspect 1, 2 and 4."
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        for i,width in enumerate((32, 32, 48, 48, 64, 64)):
            self.add_module(f'reduce{i}', nn.Conv2d(4*width, width, 1))
            self.add_module(f'conv{i}', nn.Conv2d(width, width, 3))
            self.add_module(f'expand{i}', nn.Conv2d(width, 4*width, 1))
            self.add_module(f'half{i}', nn.Conv2d(2*width, width, 1))

def test_the_bias_is_there():
    "By the median rule, squares are frozen and long layers are not, whatever the numbers in them."
    found = shares([Bottlenecks(s) for s in range(3)], xmin='median')
    assert found[1.] == 100 and found[4.] < 15

@pytest.mark.parametrize('xmin', ['median', 'ks'])
def test_the_bias_is_gone_against_a_null(xmin):
    found = shares([Bottlenecks(s) for s in range(24)], 'z', xmin=xmin, null='gaussian')
    assert len(found) == 3 and (found.sub(50).abs() < 10).all(), found

def test_the_bias_is_gone_in_square_blocks():
    found = shares([Bottlenecks(s) for s in range(24)], xmin='median', aspect=1.)
    assert len(found) == 3 and (found.sub(50).abs() < 10).all(), found

NETWORKS = ('RN50', 'RN101', 'ViT-B-16', 'convnext_base')

def towers(name, seeds):
    "Image towers of open_clip as they begin, one a seed."
    import open_clip
    logging.disable(logging.WARNING)
    for seed in range(seeds):
        torch.manual_seed(seed)
        yield open_clip.create_model(name, pretrained=None).visual
    logging.disable(logging.NOTSET)

@pytest.mark.slow
@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('how', ['z', 'square blocks'])
def test_no_shape_is_preferred_at_initialisation(name, how):
    "Of each aspect that five layers have, half are frozen, give or take ten in a hundred, over ten seeds."
    if (name, how) == ('ViT-B-16', 'square blocks'):
        pytest.xfail(
            '40 and 70 %: the estimate is too large by one in n, and there are four times as many eigenvalues in '
            'the MLPs')
    if (name, how) == ('convnext_base', 'square blocks'):
        pytest.xfail('43 and 67 %: kernels of depthwise convolutions are vectors, whose square blocks are single '
                     'weights')
    options = dict(by='z', null='gaussian') if how == 'z' else dict(aspect=1.)
    found = shares(towers(name, 10), xmin='median', **options)
    assert len(found) >= 2 and (found.sub(50).abs() <= 10).all(), found

def test_arms_of_studies_choose_by_it():
    "An arm may choose layers by z, or in square blocks; those that were there before are what they were."
    from opentrans.clip import ClipBackbone
    from opentrans.experiments import Arm, SCALES, select_layers
    from types import SimpleNamespace
    seg,scale = SimpleNamespace(backbone=ClipBackbone.create('shapes-rn')),SCALES['smoke']
    tables = dict(z=analyze(seg.backbone, xmin=scale.xmin, null='gaussian'),
                  square=analyze(seg.backbone, xmin=scale.xmin, aspect=1.),
                  alpha=analyze(seg.backbone, xmin=scale.xmin))
    for select,by in (('z', 'z'), ('z*', 'z*'), ('square', 'alpha'), ('alpha', 'alpha')):
        found = select_layers(Arm('a', select=select), seg, scale, 0)
        assert found == tables[select.removesuffix('*')].select(freeze=scale.freeze, by=by)
        assert f'{select} {scale.freeze:g}, {scale.xmin}' in Arm('a', select=select).key(scale)
