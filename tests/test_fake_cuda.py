"""Everything that computes, on a CUDA device that is not there (`fake_cuda.py`): devices that mix, and types under
autocast, show here.

Frameworks, towers, losses and criteria come from their registries. What cannot be pretended stands in CANNOT,
with the reason.
"""
import functools
import pytest
import torch
from opentrans import cka as similarity
from opentrans.clip import ClipBackbone
from opentrans.clip import shipped_clips
from opentrans.core import layers
from opentrans.data import SemanticIoU, PanopticQuality, ShapesWorld
from opentrans.distill import DistillTrainer, FeatureTrainer, LOSSES
from opentrans.errors import OpenTransError
from opentrans.frameworks import contract, get_framework, list_frameworks
from opentrans.frameworks.catseg import class_loss
from opentrans.frameworks.checks import _Case
from opentrans.frameworks.instances import instances
from opentrans.heavy_tail import analyze, esd
from opentrans.pruning import CRITERIA, imp, SparseMask
from opentrans.runtime import seeded, to_device
from opentrans.towers import TOWERS
from opentrans.training import evaluate
from opentrans.vit.anchors import as_anchor
from fake_cuda import pretended_cuda, values_of

BACKWARD = 'gradients: the engine of autograd asks the driver for a context of the device'
CANNOT = {('criterion', 'snip'): BACKWARD, ('criterion', 'sensitivity'): BACKWARD} # (what, name) -> why
NAMES = ['red star', 'grass', 'sky', 'sand']
PRECISIONS = ['no', 'bf16']
SLOW = pytest.mark.slow
FIRST_PRECISION = ['no', pytest.param('bf16', marks=SLOW)] # bf16 in the slow tier, where frameworks try it, too
FIRST_FRAMEWORK = [pytest.param(name, marks=() if name == 'deeplabv3' else SLOW) for name in list_frameworks()]

pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture
def cuda(monkeypatch):
    "A pretended device. What asks a thread of its own, where no device is pretended, is asked in this one."
    monkeypatch.setattr(contract, '_apart', lambda function, *args: function(*args))
    with pretended_cuda() as mode: yield mode

def cast(precision): return torch.autocast('cuda', torch.bfloat16, enabled=precision == 'bf16')

def agree(there, here, tolerance=1e-5):
    "The numbers of the pretended device are those of the CPU."
    assert there.device.type == 'cuda'
    assert torch.allclose(values_of(there).double(), here.double(), rtol=tolerance, atol=tolerance)

def options_of(name):
    "A small framework, with distillation and whatever else it can do."
    known = get_framework(name).__init__.__code__.co_varnames
    return {k: v for k,v in dict(kd=1., grounding=1.).items() if k in known}

def case_of(name): return _Case(name, contract.tiny_backbone(), NAMES, dict(preset='small', **options_of(name)))

def batch_of(case): return dict(case.batch(), nouns=[['star'], ['grass', 'sky']])

# ---------------------------------------------------------------- the pretended device itself

def test_devices_do_not_mix(cuda):
    "As on a GPU: a number on the CPU may join, a row may not; nothing is read without being brought."
    here = torch.ones(3, 3)
    there = here.to('cuda')
    agree((there @ there).cumsum(0), (here @ here).cumsum(0))
    agree(there*torch.tensor(2.), here*2)
    assert there.sum().item() == 9 and there.cpu().numpy().shape == (3, 3) and len(there.nonzero()) == 9
    generator = torch.Generator()
    wrong = [lambda: there+here, lambda: torch.cat([there, here]), lambda: here[there > 0], lambda: there.numpy(),
             lambda: torch.rand(3, device='cuda', generator=generator)]
    for work in wrong:
        with pytest.raises((RuntimeError, TypeError)): work()

def test_autocast_is_that_of_cuda(cuda):
    "Products in bfloat16, sums of exponentials in float32."
    x = torch.randn(4, 4, device='cuda')
    with cast('bf16'): product,share = x @ x, (x @ x).softmax(-1)
    assert (product.dtype, share.dtype) == (torch.bfloat16, torch.float32)

# ---------------------------------------------------------------- towers and frameworks

@functools.cache
def families():
    "Each family of towers with a small CLIP that has one."
    found = {}
    for name in shipped_clips():
        if name in ('photo-lite1', 'photo-lite2'): continue # of photo-lite0's family, from packages of their own
        clip = ClipBackbone.create(name)
        found.setdefault(next(k for k,v in TOWERS.items() if v is clip.kind), name)
    return found

def test_each_family_of_towers_has_a_small_clip(): assert set(families()) == set(TOWERS)

@pytest.mark.parametrize('precision', FIRST_PRECISION)
@pytest.mark.parametrize('family', list(TOWERS))
def test_towers(cuda, family, precision):
    "Maps, cells, regions in each way, whole images and names."
    clip = ClipBackbone.create(families()[family])
    images = torch.rand(2, 3, 64, 64)
    regions = [torch.zeros(2, 64, 64, dtype=torch.bool) for _ in images]
    for r in regions: r[0, :40, :40],r[1, 20:] = True,True
    ways = [lambda c, x, r: torch.cat([m.flatten() for m in c(x).values()]), lambda c, x, r: c.dense_embeddings(x),
            lambda c, x, r: c.encode_image(x)]
    ways += [lambda c, x, r, mode=mode: c.region_embeddings(x, r, mode=mode)
             for mode in ('attention', 'crop', 'tight')]
    ways += [lambda c, x, r: c.encode_text(NAMES)]
    with torch.no_grad():
        here = [way(clip, images, regions) for way in ways]
        there = clip.fresh_copy().to('cuda')
        for way,wanted in zip(ways, here):
            with cast(precision): got = way(there, images.to('cuda'), [r.to('cuda') for r in regions])
            agree(got, wanted) if precision == 'no' else agree(got.float().isfinite(), wanted.isfinite())

@pytest.mark.parametrize('precision', PRECISIONS)
@pytest.mark.parametrize('name', list_frameworks())
def test_frameworks(cuda, name, precision):
    "Every loss of a training batch, and every kind of answer."
    case = case_of(name)
    seg,batch = case.build().to('cuda'),to_device(batch_of(case), 'cuda')
    with seeded(0), cast(precision): terms = seg.loss(batch)
    here = case.build()
    with seeded(0): wanted = here.loss(batch_of(case)) # and its norms see the batch, too
    assert set(terms) == set(wanted)
    for k,v in terms.items():
        assert v.device.type == 'cuda' and v.isfinite(), k
        if precision == 'no': agree(v, wanted[k].detach(), 1e-4)
    images = case.batch()['images']
    for kind in seg.kinds:
        # images come from the CPU, as a reader gives them
        with cast(precision): answer = seg.predict(images, NAMES[::-1], kind=kind)
        if kind == 'boxes': # a table of boxes for each image
            assert all(t.device.type == 'cuda' for table in answer for t in table.values())
            continue
        assert answer.device.type == 'cuda'
        if precision == 'no':
            assert (values_of(answer) == here.predict(images, NAMES[::-1], kind=kind)).float().mean() > .99

def test_things_of_images_as_a_reader_gives_them(cuda):
    case = case_of('mask2former')
    images = case.batch()['images']
    found = instances(case.build().to('cuda'), images)
    assert len(found) == len(images) and found[0].masks.device.type == 'cuda'

def test_labels_of_no_class_are_told_before_the_device_gives_up(cuda):
    logits = torch.randn(1, 3, 4, 4).to('cuda')
    labels = torch.full((1, 4, 4), 7).to('cuda')
    for loss in (contract.pixel_loss, class_loss):
        with pytest.raises(OpenTransError, match='Labels .7. are'): loss(logits, labels)

def test_a_new_head_is_where_its_tower_is(cuda):
    anchor = as_anchor(ClipBackbone.create('shapes-vit', pretrained=None).to('cuda'), classes=3)
    assert {p.device.type for p in anchor.parameters()} == {'cuda'}

@pytest.mark.parametrize('name', FIRST_FRAMEWORK)
def test_evaluation(cuda, name):
    "Whole: images of the reader, two looks, metrics."
    seg = case_of(name).build().to('cuda')
    world = ShapesWorld('val', n=2, size=64)
    found = evaluate(seg, world, batch_size=2, flip=True)
    assert 0 <= found['miou'] <= 1 and found['n_images'] == 2
    if 'panoptic' in seg.kinds: assert 0 <= evaluate(seg, world, kind='panoptic')['pq'] <= 1

# ---------------------------------------------------------------- distillation

def rows(n=5, seed=0):
    return torch.nn.functional.normalize(torch.randn(n, 8, generator=torch.Generator().manual_seed(seed)), dim=1)

@pytest.mark.parametrize('precision', PRECISIONS)
@pytest.mark.parametrize('name', list(LOSSES))
def test_losses(cuda, name, precision):
    "Of distillation, by their names."
    here = [rows(seed=i) for i in range(3)]
    with cast(precision): got = LOSSES[name](*(x.to('cuda') for x in here))
    agree(got, LOSSES[name](*here), 1e-5 if precision == 'no' else .1)

@pytest.mark.parametrize('mode, pairs, amp',
                         [('attention', 'batch', False), ('attention', 'image', True), ('crop', 'batch', True),
                          ('tight', 'image', False)])
def test_a_step_of_distillation(cuda, mode, pairs, amp):
    "Forward: teacher, student, names and loss, with embeddings that are remembered."
    world = ShapesWorld('train', n=2, size=64)
    def losses(device):
        clip = contract.tiny_backbone().to(device)
        train = DistillTrainer(clip, world, batch_size=2, student_mode=mode, teacher_mode=mode, pairs=pairs,
                               precision='bf16' if amp else None)
        return list(train.losses(clip, n=2))
    for got,wanted in zip(losses('cuda'), losses('cpu')): agree(got, wanted.detach(), .2 if amp else 1e-4)

def test_losses_of_features_go_where_the_model_is(cuda):
    "The teacher was copied from a CLIP that stays on the CPU."
    clip = contract.tiny_backbone()
    train = FeatureTrainer(clip, [torch.rand(2, 3, 64, 64)])
    model = clip.fresh_copy().to('cuda')
    agree(next(train.losses(model, 1)), torch.zeros(()), 1e-5)

# ---------------------------------------------------------------- masks

def criterion_works(name):
    world = ShapesWorld('train', n=2, size=64)
    clip = contract.tiny_backbone(width=2).to('cuda') # SparseGPT goes through it column by column
    train = DistillTrainer(clip, world, batch_size=2)
    return SparseMask.by(name, clip, .5, losses=lambda model: train.losses(clip, 1))

# ALPS begins with what SparseGPT needs, and takes as long again
LONG = {'alps': pytest.mark.slow}

@pytest.mark.parametrize('name', [pytest.param(c, marks=LONG.get(c, ())) for c in CRITERIA
                                  if ('criterion', c) not in CANNOT])
def test_criteria(cuda, name):
    "Scores of weights on the device, and the choice among them."
    assert abs(criterion_works(name).density-.5) < 1e-3

def test_what_cannot_be_pretended_cannot(cuda):
    "Each entry of CANNOT is a thing that there is, and that fails; one that works belongs into the tests above."
    for (what,name),why in CANNOT.items():
        assert what == 'criterion' and name in CRITERIA
        with pytest.raises(RuntimeError, match='(?i)context|device'): criterion_works(name)

@pytest.mark.parametrize('kind', ['plain', 'foreach', 'fused'])
def test_a_mask_in_force(cuda, kind):
    "Zeros stay zeros under each kind of AdamW."
    clip = contract.tiny_backbone().to('cuda')
    mask = SparseMask.random(clip, .3, seed=0)
    opt = torch.optim.AdamW(clip.parameters(), lr=.1, **({} if kind == 'plain' else {kind: True}))
    with mask.apply(clip):
        for _ in range(2):
            for p in clip.parameters(): p.grad = torch.ones_like(p)
            opt.step()
        weights = {n: values_of(w) for n,w in mask.weights(clip).items()}
    assert all(not w[~mask[n]].any() and w[mask[n]].any() for n,w in weights.items())

def test_algorithm_1(cuda):
    "Rounds of a training that moves weights without gradients."
    clip = contract.tiny_backbone().to('cuda')
    @torch.no_grad()
    def train(model):
        for p in model.parameters(): p.add_(.01)
    mask,history = imp(clip, train, density=.5, p=.3, rewind='start')
    assert abs(mask.density-.5) < 1e-3 and len(history) == 2

# ---------------------------------------------------------------- measures

@pytest.mark.parametrize('family', list(TOWERS))
def test_spectra(cuda, family):
    "The alphas of layers are those of the CPU, and so is the spectrum of one."
    clip = ClipBackbone.create(families()[family])
    weights = {layer.name: layer.weight for layer in layers(clip)}
    some = dict(list(weights.items())[::max(1, len(weights)//12)]) # each takes a second on a pretended device
    here,there = analyze(some),analyze({name: weight.to('cuda') for name,weight in some.items()})
    assert (here.to_frame().alpha - there.to_frame().alpha).abs().max() < 1e-6
    weight = torch.randn(16, 8, 3, 3)
    for kind in (torch.float32, torch.bfloat16, torch.float8_e5m2):
        agree(esd(weight.to(kind).to('cuda')), esd(weight.to(kind))) # rounding is judged otherwise

def test_spectra_of_a_model_on_the_device(cuda):
    clip = contract.tiny_backbone(width=2)
    here,there = analyze(clip),analyze(clip.fresh_copy().to('cuda'))
    assert (here.to_frame().alpha - there.to_frame().alpha).abs().max() < 1e-6

@pytest.mark.parametrize('kernel', ['linear', 'rbf'])
@pytest.mark.parametrize('maps', ['flatten', 'pool', 2])
def test_similarity(cuda, maps, kernel):
    "CKA of two towers over batches from the CPU."
    similar_on_both(lambda a, b, images, names: similarity.cka(a, b, images, names, maps=maps, kernel=kernel))

def test_similarity_as_released(cuda):
    similar_on_both(similarity.paper_cka)

def similar_on_both(measure):
    "A table of two towers is that of the CPU."
    images = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)).split(4)
    def table(device):
        a,b = (contract.tiny_backbone(seed, width=4).visual.to(device).eval() for seed in (0, 1))
        return measure(a, b, images, ['layer1', 'layer4'])
    assert (table('cuda')-table('cpu')).abs().max().max() < 1e-4

def test_metrics(cuda):
    "Answers of the device beside truths of the CPU."
    truth = torch.tensor([[0, 1, 1], [2, 2, 255]])
    for target in (truth, truth.to('cuda')):
        iou = SemanticIoU(3).update(truth.clamp(max=2).to('cuda'), target).compute()
        assert iou['miou'] == 1
        pairs = torch.stack([target, target*0], -1)
        quality = PanopticQuality([True, False, False])
        assert quality.update(torch.stack([truth, truth*0], -1).to('cuda'), pairs).compute()['pq'] > 0
