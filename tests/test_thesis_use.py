"""SPT and stitching as a user of timm has them: real architectures with random weights, counted on the meta device
where numbers do not matter."""
import copy
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from mutations import check_reader
from torch import nn
from opentrans.clip import ClipBackbone
from opentrans.errors import OpenTransError
from opentrans.heavy_tail import analyze
from opentrans.pruning import SparseMask
from opentrans.runtime import seeded
from opentrans.vit.anchors import as_anchor
from opentrans.vit.heads import find_heads
from opentrans.vit.hybrids import convert_to_spvit, SPViTCost
from opentrans.vit.peft import add_sparse
from opentrans.vit.peft_files import from_huggingface, huggingface_gaps, load_added, save_added, to_huggingface
from opentrans.vit.products import spt_on
from opentrans.vit.search import train_spvit
from opentrans.vit.sensitivity import candidates, param_sensitivity, Sensitivity
from opentrans.vit.spt import (Allocation, allocate, apply_spt, merge_spt, spt_published, sweep_allocations,
                               two_stage)
from opentrans.vit.stitch_training import deploy, StitchSampler, StitchTrainer
from opentrans.vit.stitching import apply_pst, pst_report, stitch_table, StitchableNet

pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.filterwarnings('ignore::FutureWarning')]

FOUR = {'vit_base_patch16_224': 'head', 'swin_base_patch4_window7_224': 'head.fc', 'convnext_base': 'head.fc',
        'resnet50': 'fc'}
SMALL = {'vit_tiny_patch16_224': dict(img_size=32),
         'swin_tiny_patch4_window7_224': dict(img_size=64, window_size=2, embed_dim=24, num_heads=(1, 2, 4, 8)),
         'convnext_atto': {}, 'resnet18': {}}

def named(name, classes=10, **options):
    with seeded(0): return timm.create_model(name, pretrained=False, num_classes=classes, **options).eval()

def counted(name, classes=10):
    with torch.device('meta'): return timm.create_model(name, pretrained=False, num_classes=classes)

def heavy(model, seed=0):
    """Sensitivities as they are found in practice: a few tensors have nearly all of them, and inside a tensor a few
    entries."""
    g = torch.Generator().manual_seed(seed)
    found = candidates(model)
    res = Sensitivity(
        {n: torch.randn(s.shape, generator=g).square()*float(torch.randn(1, generator=g).mul(4).exp())
         for n,s in found.items()})
    res.always = {n: p.numel() for n,p in model.named_parameters() if n in ('cls_token', 'dist_token')}
    res.heads = {n: sum(p.numel() for p in model.get_submodule(n).parameters()) for n in find_heads(model)}
    return res

def pictures(n, size, classes=10, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, size, size, generator=g), torch.randint(classes, (n,), generator=g)

def train(model, x, y, steps=3, lr=1e-3):
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for _ in range(steps):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    return model.eval()

def trained(model): return sum(p.numel() for p in model.parameters() if p.requires_grad)

# --- what is saved is what was trained

@pytest.mark.parametrize('name', SMALL)
def test_a_saved_model_comes_back_and_merges(name, tmp_path):
    """Trained in training mode, so that batch norms move: loaded and merged, it gives the same; what is counted is
    what learns."""
    model, (x, y) = named(name, **SMALL[name]), pictures(4, SMALL[name].get('img_size', 32))
    sens = heavy(model)
    alloc = allocate(sens, 20_000, r=2)
    apply_spt(model, alloc, seed=0)
    assert trained(model) == alloc.n_trainable and abs(alloc.spent-20_000) <= 400
    train(model, x, y)
    save_added(model, tmp_path/'spt.safetensors')
    other = named(name, **SMALL[name])
    load_added(other, tmp_path/'spt.safetensors')
    with torch.no_grad(): want = model(x)
    with torch.no_grad(): assert torch.equal(other(x), want)
    with torch.no_grad(): torch.testing.assert_close(merge_spt(other)(x), want, atol=1e-5, rtol=1e-5)
    assert [type(m) for m in other.modules()] == [type(m) for m in named(name, **SMALL[name]).modules()]

def resnets(classes=5):
    with seeded(0):
        return [timm.create_model('test_resnet', pretrained=False, num_classes=classes).eval() for _ in range(2)]

def family_run(anchors, size, ranks=2, seed=0, stitch_rank=lambda d: 2):
    with seeded(seed): net = apply_pst(StitchableNet(anchors), ranks, stitch_rank=stitch_rank)
    flops = stitch_table(net, (3, size, size)).flops
    return StitchTrainer(net.train(), StitchSampler(flops, 4, seed=seed),
                         torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3))

def test_a_resnet_family_comes_back(tmp_path):
    "Running statistics of all anchors are a part of the state; a deployed network can have its own."
    run, (x, y) = family_run(resnets(), 32), pictures(4, 32, 5)
    run.fit([(x, y)]*4)
    run.save(tmp_path/'run.safetensors')
    again = family_run(resnets(), 32)
    again.load(tmp_path/'run.safetensors')
    run.net.eval()
    again.net.eval()
    with torch.no_grad():
        for s in (0, 1, len(run.net.configs)-1): assert torch.equal(again.net(x, s), run.net(x, s))
    palette = deploy(run.net, run.sampler, batches=[(x, y)])
    some = next(iter(palette.values()))
    norm = next(m for m in some.modules() if isinstance(m, nn.BatchNorm2d))
    assert not some.training and norm.num_batches_tracked == 1
    assert len(palette) == len(run.sampler.intervals)

# --- heads

@pytest.mark.parametrize('name, head',
                         [*FOUR.items(), ('deit_tiny_distilled_patch16_224', 'head head_dist'),
                          ('ese_vovnet39b', 'head.fc'), ('mobilenetv3_large_100', 'classifier')])
def test_the_model_is_asked_for_its_head(name, head):
    "No module of a block is a head, whatever it is called; the norm of ConvNeXt's head competes like others."
    model = counted(name)
    heads = find_heads(model)
    assert heads == head.split()
    names = candidates(model)
    assert not any(n.startswith(tuple(f'{h}.' for h in heads)) for n in names)
    if name == 'ese_vovnet39b': assert sum('attn.fc' in n for n in names) == 8
    if name == 'convnext_base': assert 'head.norm.weight' in names

class Own(nn.Module):
    "A model of one's own, with a head that no list of names has."
    def __init__(self):
        super().__init__()
        with seeded(0):
            self.body, self.out = timm.create_model('resnet18', pretrained=False, num_classes=0), nn.Linear(512, 3)
    def forward(self, x): return self.out(self.body(x))

class OwnData(torch.utils.data.Dataset):
    def __init__(self): self.x, self.y = pictures(8, 32, 3)
    def __len__(self): return 8
    def __getitem__(self, i): return self.x[i], int(self.y[i])

def test_a_model_and_a_loader_of_ones_own():
    "A picture tells what the head is; without one, a sentence says that it is not known."
    model, loader = Own().eval(), torch.utils.data.DataLoader(OwnData(), 4)
    sens = param_sensitivity(model, loader, n_samples=6)
    assert sens.samples == 6 and sens.heads == {'out': 512*3 + 3} and not any(n.startswith('out.') for n in sens)
    alloc = allocate(sens, 10_000, r=2)
    apply_spt(model, alloc, seed=0)
    assert model.out.weight.requires_grad and trained(model) == alloc.n_trainable
    with pytest.warns(UserWarning, match="no head that is found.*heads=\\['out'\\]"): candidates(Own())
    with pytest.raises(OpenTransError, match="'nothing'"): param_sensitivity(Own(), loader, heads='nothing')

# --- budgets

@pytest.mark.parametrize('name, kind, alpha, beta',
                         [('vit_tiny_patch16_224', 'lora', 1., None), ('convnext_atto', 'lora', 10., 5.),
                          ('test_vit', 'adapter', 10., 5.), ('test_vit', 'none', 1., 5.)])
def test_a_budget_is_spent(name, kind, alpha, beta):
    """Within two per cent, also where modules are easy to get, and where the sensitive weights crowd in a few
    tensors."""
    sens = heavy(counted(name))
    for budget in (10_000, 20_000):
        alloc = allocate(sens, budget, kind, r=4, alpha=alpha, beta=beta)
        assert .98*budget <= alloc.spent <= budget and alloc.note == ''
        assert alloc.spent == alloc.table().trained.sum() + sum(sens.always.values())
        assert alloc.n_trainable == alloc.spent + sum(sens.heads.values())

def test_a_budget_that_cannot_be_spent_says_why():
    sens = heavy(counted('vit_tiny_patch16_224'))
    with pytest.warns(UserWarning, match='asked 1,000,000, spent .* a larger r'): allocate(sens, 1_000_000, r=1)
    with pytest.warns(UserWarning, match='the next module would overspend'):
        few = allocate(sens, 5_000, r=8, scattered=False)
    assert few.spent <= 5_000 and 'asked 5,000' in repr(few)
    with pytest.warns(UserWarning, match='class token, has 192'): allocate(sens, 100)
    assert allocate(sens, tau=5_000, kind='none').tau == 5_000

def test_the_sweep_goes_on_where_the_published_one_ends():
    sens = heavy(counted('vit_tiny_patch16_224'))
    swept = sweep_allocations(sens, [200_000, 400_000], **spt_published()['allocation'])
    assert all(abs(alloc.spent-budget) <= .1*budget for budget,alloc in swept.items())

@pytest.mark.slow
@pytest.mark.parametrize('name', FOUR)
def test_a_budget_is_spent_at_full_size(name):
    sens = heavy(counted(name, 100))
    alloc = allocate(sens, 400_000)
    assert .98*400_000 <= alloc.spent <= 400_000

# --- stitches

def test_equal_stitches_are_drawn_evenly():
    """The default sampler of 67 stitches, a noise of a tenth, three seeds: everyone is drawn, and inside an
    interval none much more than another."""
    costs = np.random.default_rng(0).uniform(1, 17, 67)
    for seed in range(3):
        sampler, noise = StitchSampler(costs, 15, seed=seed), np.random.default_rng(seed)
        for _ in range(1500):
            i = sampler.sample()
            sampler.tracker.update(i, 300*(1 + .1*noise.standard_normal()))
        drawn = sampler.tracker.counts.numpy()
        assert drawn.min() >= 5
        for m in sampler.intervals: assert drawn[m].max() <= 3*drawn[m].min()

def test_both_heads_of_a_distilled_deit_learn():
    "They are new, and averaged into the output; the merged network is the adapted one."
    anchors = [as_anchor(named('deit_tiny_distilled_patch16_224', img_size=32), classes=4) for _ in range(2)]
    with seeded(0): net = apply_pst(StitchableNet(anchors), 2, stitch_rank=lambda d: 2)
    x, y = pictures(4, 32, 4)
    for anchor in net.anchors:
        assert all(p.requires_grad for p in (*anchor.tower.head.parameters(), *anchor.tower.head_dist.parameters()))
    assert pst_report(net).heads == 2*2*(192*4 + 4) and pst_report(net).total == trained(net)
    run = StitchTrainer(net, StitchSampler(stitch_table(net, (3, 32, 32)).flops, 3),
                        torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2))
    before = copy.deepcopy(net.anchors[1].tower.head_dist.weight)
    run.fit([(x, y)]*3)
    assert not torch.equal(net.anchors[1].tower.head_dist.weight, before)
    with torch.no_grad():
        for s, network in deploy(net, run.sampler).items():
            torch.testing.assert_close(network(x), net(x, s), atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize('small, large, options',
                         [('convnext_atto', 'convnext_femto', {}),
                          ('swin_tiny_patch4_window7_224', 'swin_tiny_patch4_window7_224',
                           dict(img_size=64, window_size=2, embed_dim=24, num_heads=(1, 2, 4, 8)))])
def test_networks_in_stages_are_stitched(small, large, options):
    anchors = [named(small, **options), named(large, classes=10, **options)]
    with seeded(0): net = StitchableNet(anchors)
    size = options.get('img_size', 64)
    x, _ = pictures(4, size)
    net.init_stitches(x)
    apply_pst(net, 2, stitch_rank=lambda d: 2)
    joins = [s for s,c in enumerate(net.configs) if not c.is_anchor]
    table = stitch_table(net, (3, size, size))
    with torch.no_grad():
        for s in (joins[0], joins[len(joins)//2], joins[-1]):
            alone = deploy(net, FixedSampler(s))[s]
            torch.testing.assert_close(alone(x), net(x, s), atol=1e-4, rtol=1e-4)
            assert sum(p.numel() for p in alone.parameters()) == table.params[s]

class FixedSampler:
    def __init__(self, stitch): self.stitch = stitch
    def deploy(self): return [self.stitch]

def test_a_stitching_layer_without_rank_is_trained_in_full():
    anchors = [named('deit_tiny_patch16_224', img_size=32) for _ in range(2)]
    with seeded(0): net = apply_pst(StitchableNet(anchors), 0, stitch_rank=lambda d: 0, ssb=False)
    layers = list(net.stitching.values())
    assert all(p.requires_grad for m in layers for p in m.parameters())
    assert pst_report(net).stitching == len(layers)*(192*192 + 192) and pst_report(net).total == trained(net)

def test_a_tuned_model_is_merged_before_it_is_stitched():
    model = named('deit_tiny_patch16_224', img_size=32)
    apply_spt(model, allocate(heavy(model), 20_000, r=2), seed=0)
    with pytest.raises(OpenTransError, match='Call merge_spt'):
        StitchableNet([model, named('deit_tiny_patch16_224', img_size=32)])
    StitchableNet([merge_spt(model), named('deit_tiny_patch16_224', img_size=32)])

# --- together with the rest

def test_alpha_picks_layers_and_sensitivity_what_goes_into_them():
    "Modules in the chosen layers only, the class token and the head in the plan, and nothing pruned comes back."
    model = named('vit_tiny_patch16_224', img_size=32)
    table, mask = analyze(model, skip=('head',)), SparseMask.magnitude(model, .4)
    chosen = set(table.select(.5).train)
    sens = heavy(model)
    with mask.apply(model):
        alloc = two_stage(table, sens, 20_000, kind='lora', masks=mask, r=2)
        assert (alloc.structured and alloc.structured | set(alloc.masks) <= chosen and alloc.always == 192
                and alloc.heads == {'head': 192*10 + 10})
        apply_spt(model, alloc, seed=0)
        assert trained(model) == alloc.n_trainable
        train(model, *pictures(4, 32))
        merge_spt(model)
    assert all((w[~mask[n]] == 0).all() for n,w in mask.weights(model).items())
    single = two_stage(table, sens, 5_000)
    assert single.always == 192 and single.spent == 5_192
    with pytest.raises(OpenTransError, match="level='element'"):
        two_stage(table, sens, 5_000, kind='lora', level='channel')

@pytest.mark.parametrize('name', ['mask2former', 'fcclip', 'faseg'])
def test_on_frameworks_whose_losses_sample_points(name):
    """A batch as the framework takes it is all that is needed; the points are the same for each scene, and the sum
    does not depend on how scenes are batched."""
    from opentrans.data import ShapesWorld, collate
    from opentrans.frameworks import build
    from opentrans.frameworks.contract import tiny_backbone
    data = ShapesWorld('train', n=2, size=64)
    seg = build(name, tiny_backbone(), vocabulary=data.vocabulary, preset='small', seed=0)
    names = ['layer3.0.downsample.0.weight', 'layer4.0.downsample.0.weight', 'layer4.0.bn3.bias']
    together = param_sensitivity(seg, [collate([data[0], data[1]])], names=names)
    apart = [param_sensitivity(seg, [collate([data[i]])], names=names) for i in range(2)]
    for n in names:
        assert (together[n] > 0).any()
        torch.testing.assert_close(together[n], apart[0][n] + apart[1][n], rtol=1e-3,
                                   atol=1e-5*float(together[n].max()))
    alloc = allocate(together, 300, r=1)
    apply_spt(seg, alloc, seed=0)
    assert sum(p.numel() for p in seg.tower.parameters() if p.requires_grad) == alloc.n_trainable
    sum(seg.loss(collate([data[0], data[1]])).values()).backward()

def test_a_loss_that_reaches_nothing_says_so():
    model, data = named('resnet18'), [pictures(4, 32)]
    with pytest.warns(UserWarning, match='reaches none of the 1'):
        param_sensitivity(model, data, lambda out, y: out.sum()*0, names=['layer1.0.conv1.weight'])

@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'resnet18'])
def test_what_peft_can_say_is_exact(name, tmp_path):
    """With the settings of the page nothing is lost, and the library gives the same; without them the gaps are
    named before the training."""
    options, hf = SMALL[name], pytest.importorskip('peft')
    model, (x, y) = named(name, **options), pictures(4, 32)
    sens = heavy(model)
    loose = apply_spt(named(name, **options), allocate(sens, 20_000, r=2), seed=0)
    assert huggingface_gaps(loose)
    alloc = allocate(sens, 20_000, r=2, scattered=False, always=0)
    apply_spt(model, alloc, full=find_heads(model), seed=0)
    assert huggingface_gaps(model) == []
    train(model, x, y)
    assert to_huggingface(model, tmp_path) == []
    with torch.no_grad(): want = model(x)
    back = named(name, **options)
    from_huggingface(back, tmp_path)
    with torch.no_grad(): torch.testing.assert_close(back(x), want, atol=1e-5, rtol=1e-5)
    theirs = hf.PeftModel.from_pretrained(named(name, **options), str(tmp_path)).eval()
    with torch.no_grad(): torch.testing.assert_close(theirs(x), want, atol=1e-5, rtol=1e-5)

def test_an_allocation_is_a_file(tmp_path):
    "Written and read it is the same plan, with the masks of pruned weights."
    sens = heavy(counted('test_vit'))
    masks = {n: torch.rand(t.shape, generator=torch.Generator().manual_seed(0)) < .5
             for n,t in sens.items() if t.dim() == 2}
    alloc = allocate(sens, 5_000, r=2, alpha=4., beta=5., masks=masks)
    alloc.save(tmp_path/'plan.json')
    back = Allocation.load(tmp_path/'plan.json')
    for field in ('structured', 'vectors', 'n_trainable', 'tau', 'kind', 'r', 'shapes', 'counts', 'always',
                  'heads', 'budget', 'note'):
        assert getattr(back, field) == getattr(alloc, field), field
    for group in ('masks', 'alive'):
        ours, theirs = getattr(back, group), getattr(alloc, group)
        assert set(ours) == set(theirs) and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert (alloc.structured and alloc.masks and alloc.alive and repr(back) == repr(alloc)
            and back.table().equals(alloc.table()))
    text = (tmp_path/'plan.json').read_text()
    (tmp_path/'cut.json').write_text(text[:len(text)//2])
    (tmp_path/'forged.json').write_text(text.replace('"tau": ', '"tau": 9'))
    for bad in ('cut', 'forged'):
        with pytest.raises(OpenTransError): Allocation.load(tmp_path/f'{bad}.json')

def test_damaged_and_forged_plans_are_refused(tmp_path):
    g = torch.Generator().manual_seed(0)
    sens = Sensitivity({'a.weight': torch.rand(4, 5, generator=g), 'b.weight': torch.rand(6, 5, generator=g)*.5,
                        'b.bias': torch.rand(6, generator=g)})
    alloc = allocate(sens, None, r=1, beta=2., tau=20, masks={'a.weight': torch.rand(4, 5, generator=g) < .9})
    path = tmp_path/'plan.json'
    alloc.save(path)
    def read(_, file):
        plan = Allocation.load(file)
        plan.table()
        return plan
    check_reader(path, read, same=lambda plan: repr(plan), count=150)

def test_the_samples_are_drawn_at_random():
    "C of all there are, by a seed; those that come first on request; of a stream those that come."
    model, (x, y) = named('resnet18'), pictures(12, 32)
    names, batches = ['layer4.0.downsample.0.weight'], [(x[:8], y[:8]), (x[8:], y[8:])]
    def of(data, **kw): return param_sensitivity(model, data, names=names, n_samples=5, **kw)[names[0]]
    places = torch.randperm(12, generator=torch.Generator().manual_seed(2))[:5]
    want = param_sensitivity(model, [(x[places], y[places])], names=names)[names[0]]
    torch.testing.assert_close(of(batches, seed=2), want, rtol=1e-3, atol=1e-6*float(want.max()))
    assert not torch.equal(of(batches, seed=3), of(batches, seed=2))
    first = param_sensitivity(model, [(x[:5], y[:5])], names=names)[names[0]]
    torch.testing.assert_close(of(batches, draw=False), first, rtol=1e-3, atol=1e-6*float(first.max()))
    torch.testing.assert_close(of(iter(batches)), first, rtol=1e-3, atol=1e-6*float(first.max()))

# --- SPViT and FASeg

class Seen(nn.Module):
    "Keeps the labels of the batches that it sees."
    def __init__(self):
        super().__init__()
        self.map, self.seen = nn.Linear(3*8*8, 4), []
    def forward(self, x): return self.map(x.flatten(1))

def test_spvit_takes_a_loader():
    "Round after round, each with an order of its own; two runs see the same."
    from opentrans.vit.search import label_loss, train_spvit
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8) % 4
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y, torch.arange(8)), 4, shuffle=True)
    def seen(batches, seed):
        model = Seen()
        def loss(m, batch):
            m.seen.append(batch[2].tolist())
            return label_loss(m, batch[:2])
        train_spvit(model, batches, 5, loss, seed=seed)
        return model.seen
    first = seen(loader, 0)
    assert first == seen(loader, 0) != seen(loader, 1) and [len(b) for b in first] == [4]*5
    assert sorted(first[0] + first[1]) == sorted(first[2] + first[3]) == list(range(8)) and first[:2] != first[2:4]
    assert seen(list(torch.utils.data.DataLoader(loader.dataset, 4)), 0) == [[0, 1, 2, 3], [4, 5, 6, 7]]*2 + [
        [0, 1, 2, 3]]
    with pytest.raises(OpenTransError, match='list or loader is empty'): seen([], 0)
    with pytest.raises(OpenTransError, match='not from a int'): seen(3, 0)

def test_a_gate_of_one_half_is_open():
    from opentrans.vit.spvit import hard_gate
    assert hard_gate(torch.tensor([-1e-6, 0., 1e-6])).tolist() == [0, 1, 1]

def test_a_grid_of_queries_is_fixed():
    "Nothing that is learned for each query reaches the answer: other numbers in its place change nothing."
    from opentrans.frameworks import build
    from opentrans.frameworks.contract import tiny_backbone
    seg, other = (build('faseg', tiny_backbone(), vocabulary=['a', 'b'], preset='small', seed=0, dfpq=kind,
                        key_pos='sine').eval() for kind in ('grid', 'anchor'))
    x = torch.rand(1, 3, 64, 64)
    for net, same in ((seg, True), (other, False)):
        base = net.head.decoder.focus.base.weight
        with torch.no_grad():
            before = net(x, net.text())
            base.copy_(torch.randn_like(base))
            assert torch.equal(net(x, net.text()), before) == same
    assert not seg.head.decoder.focus.base.weight.requires_grad

# --- other anchors, and larger batches

def words(n, seed=0): return torch.randint(13, (n, 8), generator=torch.Generator().manual_seed(seed))

def next_word(out, tokens, teacher):
    "Cross-entropy of the next word, half of it with the teacher's where there is one."
    own = F.cross_entropy(out[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return (own if teacher is None
            else .5*own + .5*F.cross_entropy(out[:, :-1].flatten(0, 1), teacher[:, :-1].argmax(-1).flatten()))

def test_models_of_language_are_stitched():
    """Two small GPT-2s of transformers with random weights: adapted, trained, merged into plain Linears; no word
    sees those behind it, and generation with a cache goes on as before."""
    from transformers import GPT2Config, GPT2LMHeadModel
    def gpt(width):
        with seeded(0):
            return GPT2LMHeadModel(GPT2Config(vocab_size=13, n_positions=16, n_embd=width, n_layer=3, n_head=2,
                                              attn_pdrop=0., resid_pdrop=0., embd_pdrop=0.)).eval()
    large = gpt(24)
    with torch.no_grad(): want = large.generate(words(1), max_new_tokens=4, do_sample=False, pad_token_id=0)
    net = StitchableNet([gpt(16), large])
    net.init_stitches(words(20))
    with torch.no_grad(): torch.testing.assert_close(net(words(2)), large(words(2)).logits, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert torch.equal(large.generate(words(1), max_new_tokens=4, do_sample=False, pad_token_id=0), want)
    with seeded(0): apply_pst(net, 2, stitch_rank=lambda d: 2)
    sizes = [sum(p.numel() for p in net.extract(s).parameters()) for s in range(len(net.configs))]
    run = StitchTrainer(net, StitchSampler(sizes, 3),
                        torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2),
                        loss=next_word)
    run.fit([(words(4, i), words(4, i)) for i in range(2*len(sizes))])
    for s, network in deploy(net, run.sampler).items():
        kinds = {type(m).__name__ for m in network.modules()}
        assert 'LoRALinear' not in kinds and 'StitchBias' not in kinds
        with torch.no_grad():
            torch.testing.assert_close(network(words(2)), net(words(2), s), atol=1e-5, rtol=1e-5)
            other = words(2)
            other[:, 5:] = 0
            torch.testing.assert_close(network(other)[:, :5], network(words(2))[:, :5], atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize('name, options', [('convnext_atto', {}), ('vit_tiny_patch16_224', dict(img_size=32))])
def test_stitches_with_bottlenecks(name, options):
    "Adapters in place of low-rank updates: trained, deployed with them, and counted."
    anchors, (x, y) = [named(name, **options) for _ in range(2)], pictures(4, 32)
    with seeded(0): net = apply_pst(StitchableNet(anchors), 2, stitch_rank=lambda d: 2, kind='adaptformer')
    table = stitch_table(net, (3, 32, 32))
    run = StitchTrainer(net, StitchSampler(table.flops, 3),
                        torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2))
    run.fit([(x, y)]*2)
    assert pst_report(net).bottlenecks > 0 and pst_report(net).attention == 0
    s = len(net.configs)-1
    alone = deploy(net, FixedSampler(s))[s]
    with torch.no_grad(): torch.testing.assert_close(alone(x), net(x, s), atol=1e-4, rtol=1e-4)
    assert sum(p.numel() for p in alone.parameters()) == table.params[s]

def test_two_halves_of_a_batch_are_the_batch():
    "Accumulated gradients, and the importance, are those of the whole; a half-finished step is not saved."
    def start(accumulate):
        anchors = [named('test_vit', classes=4, img_size=64) for _ in range(2)]
        with seeded(0): net = apply_pst(StitchableNet(anchors), 2, stitch_rank=lambda d: 2)
        sampler = StitchSampler(np.arange(len(net.configs)), 3)
        return StitchTrainer(net, sampler,
                             torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=.1),
                             accumulate=accumulate)
    (x, y), whole, halves = pictures(4, 64, 4), start(1), start(2)
    for _ in range(3):
        whole.step(x, y)
        halves.step(x[:2], y[:2])
        halves.step(x[2:], y[2:])
    assert whole.steps == halves.steps == 3
    torch.testing.assert_close(halves.sampler.tracker.scores, whole.sampler.tracker.scores, rtol=1e-3, atol=1e-6)
    for a,b in zip(halves.net.parameters(), whole.net.parameters()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    halves.step(x[:2], y[:2])
    with pytest.raises(OpenTransError, match='1 of 2 batches wait'): halves.save('nowhere.safetensors')

def toy_vit(**sizes):
    "A ViT of two blocks for pictures of 32 pixels."
    usual = dict(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    with seeded(0): return timm.models.VisionTransformer(**{**usual, **sizes})

def four_pictures(): return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))

def timm_resnet18(): return timm.create_model('resnet18')

def clip_vit(): return ClipBackbone.create('shapes-vit', pretrained=None)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
@pytest.mark.parametrize('make', [timm_resnet18, torchvision.models.resnet18, clip_vit])
def test_a_new_head_is_like_its_tower(make, dtype):
    anchor = as_anchor(make().to(dtype), classes=3)
    assert anchor(torch.randn(2, 3, 64, 64, dtype=dtype)).shape == (2, 3)

def toy_family(): return StitchableNet([toy_vit(), toy_vit(embed_dim=32)])

def test_the_rank_of_stitching_layers_may_be_a_number():
    full = pst_report(apply_pst(toy_family(), 2, stitch_rank=None))['stitching']
    assert pst_report(apply_pst(toy_family(), 2, stitch_rank=0))['stitching'] == full
    assert pst_report(apply_pst(toy_family(), 2, stitch_rank=2))['stitching'] < full

def test_stitches_begin_by_what_anchors_say_at_rest():
    "Norms of the batch see nothing of it, and dropout leaves nothing out."
    def net(width):
        widths = [width*2**i for i in range(4)]
        with seeded(0): return timm.models.ResNet(timm.models.resnet.BasicBlock, (1, 1, 1, 1), channels=widths)
    models = [net(8), net(16)]
    before = copy.deepcopy(models[0].state_dict())
    stitchable = StitchableNet(models).train()
    stitchable.init_stitches(four_pictures())
    assert all(module.training for module in stitchable.modules())
    assert all(torch.equal(before[name], tensor) for name,tensor in models[0].state_dict().items())

def test_a_budget_that_is_missed_is_told_either_way():
    sens = param_sensitivity(toy_vit(), [(four_pictures(), torch.tensor([0, 1, 2, 0]))])
    for exact in (True, False):
        with pytest.warns(UserWarning, match='budget is not met'): allocate(sens, 10**8, exact=exact)

def test_a_loader_without_a_length_to_test_with():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self): return zip(four_pictures(), torch.tensor([0, 1, 2, 0]))
    train = [(four_pictures(), torch.tensor([0, 1, 2, 0]))]
    found = spt_on(toy_vit(), train, torch.utils.data.DataLoader(Stream(), 2), budget=200, r=1, samples=4, epochs=1)
    assert 0 <= found['accuracy'] <= 1

@pytest.mark.parametrize('size', [32, (32,), (40, 48)], ids=str)
def test_a_cost_of_other_pictures_is_refused(size):
    said = 'give .height, width.|takes no pictures of 40x48'
    with pytest.raises(OpenTransError, match=said): SPViTCost(toy_vit(), size=size)

def test_gates_may_learn_alone(tmp_path):
    gated = convert_to_spvit(toy_vit())
    for name,param in gated.named_parameters(): param.requires_grad_(name.endswith('gate'))
    weight = gated.blocks[0].mlp.fc1.weight
    before = weight.clone()
    cost = SPViTCost(gated, target=1e-6, size=(32, 32))
    batch = [(four_pictures(), torch.tensor([0, 1, 2, 0]))]
    how = dict(cost=cost, gate_lr=.1, checkpoint=tmp_path/'run.safetensors')
    assert len(train_spvit(gated, batch, 2, **how)) == len(train_spvit(gated, batch, 2, **how)) == 2
    assert torch.equal(weight, before)

def test_a_mask_is_of_one_tensor():
    mask = torch.ones(64, 16, dtype=torch.bool)
    masks = {'blocks.*.mlp.fc1.weight': mask}
    with pytest.raises(OpenTransError, match='names 2 tensors'): add_sparse(toy_vit(), masks)
