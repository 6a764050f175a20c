"The league of masks: what its methods give, what is measured of them, and how it is told."
import copy, json
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from opentrans.cka import linear_cka
from opentrans.data import ImageBatches, ShapesWorld
from opentrans.distill import feature_loss, FeatureTrainer
from opentrans.errors import OpenTransError
from opentrans.experiments import (find_mask, get_scale, get_study, league_frame,
                                   league_table, MaskRecipe, METHODS, naming_accuracy, open_clip_of, open_mask,
                                   plot_league, RandomBoxes)
from opentrans.pruning import imp, regrow, SparseMask

pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture(scope='module')
def smoke(): return get_scale('smoke')

@pytest.mark.parametrize('method',
                         ('wanda', 'alps, owl', 'sparsegpt', 'Algorithm 1, features', 'Algorithm 1, regrowth'))
def test_each_finder_gives_a_mask_of_the_density(method, smoke, tmp_path):
    "The files say what the mask took; the mask and the weights that were left are there."
    recipe = MaskRecipe(method, density=.3)
    find_mask(smoke, 0, tmp_path, recipe)
    mask = open_mask(recipe, smoke, 0, tmp_path)
    assert mask.density == pytest.approx(.3, abs=6e-3)
    told = json.loads((tmp_path/f'found-{recipe.id(smoke)}.json').read_text())
    assert told['seconds'] > 0 and told['images'] > 0
    assert (tmp_path/f'{recipe.id(smoke)}-weights.safetensors').exists()

def test_snip_is_told_apart_by_what_it_looks_at(smoke, tmp_path):
    masks = {}
    for method in ('snip, labels', 'snip, regions and names', 'snip, no labels'):
        recipe = MaskRecipe(method, density=.3)
        find_mask(smoke, 0, tmp_path, recipe)
        masks[method] = open_mask(recipe, smoke, 0, tmp_path)
    first,*others = masks.values()
    assert all(.1 < first.iou(other) < .98 for other in others)

def test_boxes_know_nothing_of_the_regions():
    world = ShapesWorld('train', n=3, size=48)
    boxes = RandomBoxes(world, boxes=3)
    sample,again = boxes[1],boxes[1]
    assert torch.equal(sample['regions'], again['regions']) and sample['regions'].shape == (3, 48, 48)
    assert not sample['region_classes'].any() and torch.equal(sample['image'], world[1]['image'])
    for region in sample['regions']:                                      # a box is its bounding box
        rows,columns = region.any(1),region.any(0)
        assert torch.equal(region, rows[:, None] & columns) and .03 < region.float().mean() < .4

def test_naming_accuracy_counts_regions_by_class():
    "Against a loop that asks for each region alone; a clip that knows nothing is at chance."
    world,clip = ShapesWorld('val', n=10, size=80),open_clip_of(get_scale('shapes'))
    found = naming_accuracy(clip, world)
    text,right = clip.encode_text(list(world.vocabulary.names)),{}
    for sample in (world[i] for i in range(10)):
        for region,true in zip(sample['regions'], sample['region_classes'].tolist()):
            if region.sum() < 16: continue
            with torch.no_grad(): e = clip.region_embeddings(sample['image'][None], [region[None]], mode='crop')
            right.setdefault(true, []).append(int((e @ text.T).argmax()) == true)
    for group,classes in world.groups.items():
        each = [sum(right[c])/len(right[c]) for c in classes if c in right]
        assert found[group] == pytest.approx(sum(each)/len(each), abs=1e-6)
    assert found['base'] > .2

def made_up(seeds=3):
    "A file of the league whose numbers are known: method i has 10+i points after fine-tuning, and seed s adds s."
    league = get_study('masks-league')
    results = []
    before = []
    arms = [a for a in league.arms if a.mask is None or a.mask.density == .1]
    for seed in range(seeds):
        for i,arm in enumerate(a for a in arms):
            value = (10+i+seed)/100
            results.append(dict(arm=arm.name, seed=seed, framework=arm.framework or 'deeplabv3', mask=None,
                                weights='', select='all', density=1., rule='', frozen=[],
                                miou=dict(base=value, novel=value), params=1, active_params=1, macs=1,
                                active_macs=1, train_flops=1, cka=None, cka_layers=None, cka_channels=None))
            if not arm.framework:
                before.append(dict(arm=arm.name, seed=seed, accuracy=dict(base=value/2, novel=value/2),
                                   seconds=60.*i, images=128))
    return dict(results=results, more=dict(before=before))

def test_the_table_says_what_the_file_holds():
    data = made_up()
    frame = league_frame(data)
    assert ({*frame.method} == {*METHODS, 'dense'}
            and {*frame.stage} == {'before', 'after, deeplabv3', 'after, mask2former'})
    table = league_table(data, .1)
    order = ['dense', *METHODS]
    means = {m: 10+order.index(m)+1 for m in order}
    assert float(table.loc['ALPS', 'after, deeplabv3']) == pytest.approx(means['ALPS'])
    assert float(table.loc['ALPS', 'before']) == pytest.approx(means['ALPS']/2, abs=.06)
    best = max(METHODS, key=means.get)
    assert table.loc[best, 'after, deeplabv3'] == f'**{means[best]:.1f}**' and table.index[0] == best
    assert table.loc['ALPS', 'against Algorithm 1'].startswith(f"{means['ALPS']-means['Algorithm 1']:+.1f} [")
    assert (table.loc['ALPS', 'minutes'] == f"{order.index('ALPS'):.2f}"
            and table.loc['SNIP, labels', 'annotation'] == 'labels')

def test_the_plot_has_a_panel_for_each_stage():
    import matplotlib
    matplotlib.use('Agg')
    axs = plot_league(made_up())
    assert axs.shape == (1, 3) and [a.get_xscale() for a in axs[0]] == ['log']*3

# --- regrowth and features

def test_dropped_weights_return_in_the_rounds():
    """With regrowth a weight that was once dropped is in a later mask; without it never. The last round lets none
    return."""
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 3))
    x,y = torch.randn(40, 6),torch.randint(3, (40,))
    def losses(model): yield F.cross_entropy(model(x), y)
    returned = {}
    for criterion in ('magnitude', 'regrow'):
        net,masks = copy.deepcopy(start),[]
        def train(model, round):
            opt = torch.optim.SGD(model.parameters(), lr=.05)
            for _ in range(5):
                opt.zero_grad()
                F.cross_entropy(model(x), y).backward()
                opt.step()
            # those that came back have learned
            masks.append({n: p.detach() != 0 for n,p in model.named_parameters() if p.ndim == 2})
        mask,_ = imp(net, train, schedule=[.6, .4, .3, .2], criterion=criterion, losses=losses, seed=0)
        steps = [*masks, dict(mask.items())]
        returned[criterion] = [sum(int((b[n] & ~a[n]).sum()) for n in mask) for a,b in zip(steps[1:], steps[2:])]
        assert mask.density == pytest.approx(.2, abs=2e-3)
    assert returned['magnitude'] == [0, 0, 0]
    assert returned['regrow'][0] >= 0 and sum(returned['regrow']) > 0 and returned['regrow'][-1] == 0

def test_regrowth_takes_the_largest_gradients():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(30, 4)
    def losses(model): yield model(x).square().mean()
    SparseMask.magnitude(net, .4).apply(net).remove()
    scores = regrow(net, losses, density=.4, left=3, rounds=4, share=.5)
    layers = {'2.weight': net[2], '4.weight': net[4]}
    grads = torch.autograd.grad(next(losses(net)), [layer.weight for layer in layers.values()])
    dropped = {n: layer.weight == 0 for n,layer in layers.items()}
    back = torch.cat([g.abs()[dropped[n] & (scores[n] > 1)] for g,n in zip(grads, layers)])
    out = torch.cat([g.abs()[dropped[n] & ~(scores[n] > 1)] for g,n in zip(grads, layers)])
    assert len(back) and back.min() >= out.max()

@pytest.mark.parametrize('kind', ('cosine', 'cka'))
def test_feature_losses(kind):
    "Zero for equal maps, CKA as in its own chapter, and a gradient that leads there."
    torch.manual_seed(0)
    a,b = (dict(res2=torch.randn(2, 6, 4, 4), res3=torch.randn(2, 3, 2, 2)) for _ in range(2))
    assert feature_loss(a, a, kind).item() == pytest.approx(0, abs=1e-5)
    if kind == 'cka':
        def flat(m): return m.movedim(1, -1).flatten(0, 2)
        expected = sum(1-linear_cka(flat(a[n]), flat(b[n])) for n in a)/2
        assert feature_loss(a, b, kind).item() == pytest.approx(expected, abs=1e-5)
    x = {n: m.clone().requires_grad_() for n,m in a.items()}
    opt,first = torch.optim.Adam(x.values(), lr=.1),feature_loss(a, b, kind).item()
    for _ in range(60):
        opt.zero_grad()
        feature_loss(x, b, kind).backward()
        opt.step()
    assert feature_loss(x, b, kind).item() < .2*first
    with pytest.raises(OpenTransError, match='differ in res3'): feature_loss(dict(res2=a['res2']), b, kind)

def test_features_bring_a_damaged_tower_back():
    "A tower whose weights were pruned comes nearer to its teacher; the teacher stays."
    clip = open_clip_of(get_scale('shapes'))
    images = ImageBatches(ShapesWorld('train', n=16, size=64), 16, 8)
    train = FeatureTrainer(clip, images, iterations=20, lr=5e-4)
    teacher = {n: t.clone() for n,t in train.teacher.state_dict().items()}
    mask = SparseMask.magnitude(clip, .3)
    with mask.apply(clip):
        clip.eval()
        before = next(train.losses(clip, 1)).item()
        out = train(clip, 0)
        after = next(train.losses(clip, 1)).item()
    assert after < before and out['loss_last'] < out['loss_first']
    assert all(torch.equal(t, teacher[n]) for n,t in train.teacher.state_dict().items())
    with pytest.raises(OpenTransError, match='teacher itself'): train(train.teacher)
