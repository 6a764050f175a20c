"Frameworks as the rest of the package meets them: found when asked for, of the paper's size, and carrying a mask."
import copy
import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from opentrans.clip import ClipBackbone
from opentrans.errors import OpenTransError
from opentrans.core import layers
from opentrans.data import ShapesWorld, Vocabulary
from opentrans.training import evaluate, finetune, multi_scale_logits, multi_scale_scores, Recipe
from opentrans.frameworks import build, check_framework, contract, get_framework, list_frameworks, queries
from opentrans.frameworks.catseg import class_loss
from opentrans.frameworks.closed import build_closed
from opentrans.frameworks.contract import best_class, tiny_backbone
from opentrans.frameworks.faseg import StagedBackbone
from opentrans.frameworks.instances import instances
from opentrans.frameworks.training_free import attention_weights
from opentrans.pruning import SparseMask
from forked import python

def count_parameters(module): return sum(p.numel() for p in module.parameters())

LAZY = """
import sys
from forked import forget_package
forget_package()
from opentrans.frameworks import list_frameworks, get_framework
name = 'opentrans.frameworks.deeplabv3'
assert 'deeplabv3' in list_frameworks()
assert name not in sys.modules, 'listing imports the adapters'
get_framework('deeplabv3')
assert name in sys.modules
"""

def test_adapters_are_imported_when_they_are_built(tmp_path):
    run = python('-c', LAZY, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]

def test_every_name_on_the_list_can_be_got():
    for name in list_frameworks(): assert get_framework(name).name == name
    with pytest.raises(OpenTransError, match="Did you mean 'deeplabv3'"): get_framework('deeplabv2')

@pytest.fixture(scope='module')
def full():
    "DeepLabV3 on CLIP RN50 with random weights, at the paper's size."
    clip = ClipBackbone.create('RN50', pretrained=None, output_stride=16)
    return build('deeplabv3', clip, vocabulary=['thing', 'stuff'])

def test_deeplab_has_the_papers_parameters(full):
    "40.37 M: trunk without attention pool, pyramid, decoder; the projection into the text space is counted apart."
    parts = full.tower.attnpool,full.aspp,full.decoder,full.proj
    pool,pyramid,decoder,projection = map(count_parameters, parts)
    assert (count_parameters(full.tower) - pool, pyramid, decoder) == (23_527_264, 15_535_104, 1_303_648)
    assert count_parameters(full) - pool - projection == 40_366_016
    assert projection == 256*1024 + 1024

def test_deeplab_pyramid_is_torchvisions(full):
    "The pyramid's weights are those of torchvision's head, name for name, so its published weights can be read."
    theirs = DeepLabHead(2048, 21, (6, 12, 18))[0]
    theirs.load_state_dict(full.aspp.state_dict())
    with torch.no_grad():
        features = full.eval().backbone(torch.rand(1, 3, 96, 128))['res5']
        assert features.shape[-2:] == (6, 8)
        assert torch.equal(theirs.eval()(features), full.aspp(features))

def test_rn50_mask_covers_54_convolutions(full):
    mask = SparseMask.random(full.tower, .1, seed=0)
    assert len(mask) == 54 and not any('attnpool' in n for n in mask)
    assert len(mask.weights(full)) == 54

def a_convnext():
    "A small CLIP on a ConvNeXt, with random weights."
    tokenizer = tiny_backbone().text.tokenizer
    vision = dict(timm_model_name='convnext_atto', timm_model_pretrained=False, timm_pool='', timm_proj='linear',
                  image_size=64)
    text = open_clip.model.CLIPTextCfg(context_length=16, vocab_size=len(tokenizer), width=64, heads=2, layers=1)
    torch.manual_seed(0)
    return ClipBackbone.from_model(open_clip.model.CLIP(64, vision, text), tokenizer, 'convnext_atto')

@pytest.mark.parametrize('backbone', ['os8', 'convnext'])
def test_contract_on_other_backbones(backbone):
    "The head asks the backbone for channels and strides: another tower needs no other code."
    clip = a_convnext() if backbone == 'convnext' else ClipBackbone.create('shapes-rn', output_stride=8)
    assert len(check_framework('deeplabv3', backbone=clip)) == 10

def test_one_mask_from_file_through_training(tmp_path):
    "Save, load, carry over, train, evaluate: zero where the mask says, in a framework that was built after it."
    world = ShapesWorld(n=8, size=48)
    clip = tiny_backbone()
    SparseMask.magnitude(clip.tower, .1).save(tmp_path/'mask.safetensors')
    mask = SparseMask.load(tmp_path/'mask.safetensors')
    seg = build('deeplabv3', clip.fresh_copy(), vocabulary=world.vocabulary, preset='small', seed=0)
    with mask.apply(seg.backbone):
        finetune(seg, world, Recipe.tiny().replace(iterations=3, batch_size=4))
        kept = sum(int(w.count_nonzero()) for w in mask.weights(seg).values())
        assert kept <= mask.kept and kept > .99*mask.kept
    original = {layer.name: layer.weight for layer in layers(clip)}
    changed = [name for name in mask if (original[name] == 0).any()]
    assert not changed, 'carrying the mask over has changed the CLIP it was made on'
    result = evaluate(seg, ShapesWorld('val', n=4, size=48))
    assert set(result['groups']) == {'base', 'novel'} and 0 <= result['miou'] <= 1
    for domain in ('night', 'crowd', 'sketch'):                       # other words, the same weights
        other = ShapesWorld('val', domain, n=2, size=48)
        assert list(evaluate(seg, other)['iou']) == list(other.vocabulary.names)

def test_names_of_another_length_do_not_fit_silently():
    seg = build('deeplabv3', tiny_backbone(), vocabulary=['red star', 'grass'], preset='small')
    batch = dict(images=torch.rand(2, 3, 32, 32), labels=torch.full((2, 32, 32), 7))
    with pytest.raises(OpenTransError, match='neither one of the 2 classes'): seg.loss(batch)
    integers = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(OpenTransError, match='float tensor'): seg.predict(integers)

def test_logits_of_a_class_do_not_depend_on_the_others():
    "A class's logit is the same among 3 names and among 300: only the argmax differs."
    seg = build('deeplabv3', tiny_backbone(), vocabulary=['red star', 'grass'], preset='small', seed=0).eval()
    text,images = text_of(seg, 300),torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(): assert torch.allclose(seg(images, text)[:, :3], seg(images, text[:3]), atol=1e-4)

def text_of(seg, classes):
    "Random text embeddings of some classes."
    generator = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(classes, seg.backbone.embed_dim, generator=generator), dim=1)

class Largest(TorchDispatchMode):
    "The number of values in the largest tensor that is made."
    def __init__(self):
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if not isinstance(tensor, torch.Tensor): continue
            self.values = max(self.values, tensor.untyped_storage().nbytes()//tensor.element_size())
        return out

@pytest.mark.parametrize('name', ['deeplabv3', 'fpn', 'mask2former', 'fcclip', 'faseg'])
def test_hundreds_of_classes_never_stand_side_by_side(name, monkeypatch):
    "The best of 847 classes, as it is or enlarged: all logits at full size are never made, the answer is theirs."
    monkeypatch.setattr(contract.Scores, 'at_once', 2**20)
    monkeypatch.setattr(queries, '_MASKS', 2**19)
    seg = build(name, tiny_backbone(), vocabulary=['red star', 'grass'], preset='small', seed=0).eval()
    text,images = text_of(seg, 847),torch.rand(1, 3, 96, 128, generator=torch.Generator().manual_seed(1))
    larger = dict(size=160, longest=200, flip=True)
    with torch.no_grad():
        with Largest() as alone: best = seg.semantic(images, text)
        with Largest() as enlarged: near = best_class(multi_scale_scores(seg, images, text, **larger))
        whole,all_looks = seg(images, text),multi_scale_logits(seg, images, text, **larger)
    assert alone.values < .3*whole.numel() and enlarged.values < .3*847*150*200, (alone.values, enlarged.values)
    for found,logits in ((best, whole), (near, all_looks)):
        top = logits.topk(2, 1).values
        sure = top[:, 0]-top[:, 1] > 1e-5*top[:, 0].abs() # where two are equal but for rounding, either is right
        assert sure.float().mean() > .9 and torch.equal(found[sure], logits.argmax(1)[sure])

def test_a_subclass_with_its_own_forward_is_asked():
    "A subclass that writes `forward` alone is evaluated by it, though its parent can make logits in pieces."
    class Turned(get_framework('fpn')):
        def forward(self, images, text_embeddings): return -super().forward(images, text_embeddings)
    seg = Turned(tiny_backbone(), vocabulary=['red star', 'grass'], width=16).eval()
    text = seg.text(['sand', 'brick', 'water'])
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): assert torch.equal(seg.semantic(images, text), seg(images, text).argmax(1))

NAMES = ['red star', 'blue disc', 'grass']

def small(name, **options): return build(name, tiny_backbone(), vocabulary=NAMES, preset='small', seed=0, **options)

@pytest.mark.parametrize('name', ['deeplabv3', 'sed', 'fcclip', 'training_free'])
def test_names_may_come_from_a_table(name):
    framework = small(name)
    image = torch.rand(1, 3, 32, 48)
    alike = [framework.predict(image, names) for names in (NAMES, pd.Index(NAMES), np.array(NAMES))]
    assert torch.equal(alike[0], alike[1]) and torch.equal(alike[0], alike[2])

@pytest.mark.parametrize('name', ['deeplabv3', 'mask2former', 'catseg', 'fcclip', 'training_free'])
def test_names_in_one_text_are_parted_by_commas_and_synonyms_by_semicolons(name):
    framework = small(name)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    apart = framework.predict(image, ['red star,star', 'grass', 'water'])
    together = framework.predict(image, 'red star; star, grass, water')
    assert torch.equal(together, apart)
    assert framework.predict(image, 'grass').unique().tolist() == [0]

@pytest.mark.parametrize('name', list_frameworks())
def test_whole_models_of_other_bits_predict(name):
    "A model that was cast as a whole, as one does to save memory, not under autocast."
    framework = small(name).eval()
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    text = framework.text()
    precise = copy.deepcopy(framework).double()
    coarse = copy.deepcopy(framework).bfloat16()
    with torch.no_grad():
        logits = framework(image, text)
        of_double = precise(image.double(), precise.text())
        of_half = coarse(image.bfloat16(), coarse.text())
    assert of_double.dtype == torch.float64 and of_half.dtype == torch.bfloat16
    assert (of_double - logits).abs().max() < 1e-4*logits.std()
    assert (of_half.float() - logits).abs().max() < .2*logits.std()
    for kind in framework.kinds:
        ours,theirs = framework.predict(image, kind=kind),precise.predict(image.double(), kind=kind)
        if kind == 'boxes': assert ours[0]['labels'].equal(theirs[0]['labels'])
        else: assert ours.equal(theirs)
        coarse.predict(image.bfloat16(), kind=kind)

def test_images_of_numpy_have_64_bits():
    framework = small('deeplabv3')
    image = torch.from_numpy(np.random.default_rng(0).random((1, 3, 32, 48)))
    assert torch.equal(framework.predict(image), framework.predict(image.float()))

def test_a_batch_without_images_is_refused_in_a_sentence():
    for name in ('deeplabv3', 'mask2former', 'sed'):
        with pytest.raises(OpenTransError, match='no image'): small(name).predict(torch.zeros(0, 3, 64, 64))

def test_labels_of_few_bits_are_read():
    logits = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(16).view(1, 4, 4) % 3
    labels[0, 0, 0] = 255
    for loss in (contract.pixel_loss, class_loss):
        assert loss(logits, labels.byte()) == loss(logits, labels.int()) == loss(logits, labels)
        with pytest.raises(OpenTransError, match='Labels .7. are'): loss(logits, labels.new_full((1, 4, 4), 7))

def test_segments_of_small_images_at_another_size():
    "What is added to small images is cut off before masks are resized."
    framework = small('faseg', kd=1.)
    framework.score = framework.overlap = 0.
    image = torch.rand(1, 3, 20, 60, generator=torch.Generator().manual_seed(0))
    assert framework.least_side > 20
    own = framework.predict(image, kind='panoptic')
    assert torch.equal(own, framework.predict(image, kind='panoptic', size=(20, 60)))
    assert framework.predict(image, kind='panoptic', size=(40, 50)).shape == (1, 40, 50, 2)
    assert len(instances(framework, image)[0].masks[0]) == 20

def test_a_loss_stride_longer_than_a_side():
    framework = small('deeplabv3', loss_stride=100)
    batch = dict(images=torch.rand(2, 3, 48, 64), labels=torch.zeros(2, 48, 64, dtype=torch.long))
    for _ in range(4): assert framework.loss(batch)['ce'].isfinite()

class Stages(nn.Module):
    "An encoder of four stages; some take images of one size alone."
    def __init__(self, side=None):
        super().__init__()
        self.side = side
        widths = (3, 8, 16, 32, 32)
        strides = (4, 2, 2, 2)
        self.stages = nn.ModuleList(map(nn.Conv2d, widths, widths[1:], strides, strides))

    def forward(self, x):
        if self.side: assert x.shape[-1] == self.side
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

def test_a_staged_backbone_of_one_size():
    clip = tiny_backbone()
    backbone = StagedBackbone(Stages(128), clip, size=128)
    assert backbone.fresh_copy().strides == backbone.strides
    assert contract.smallest_side(backbone) == 64

def test_closed_models_check_their_options_and_names():
    wrong = {"Did you mean 'queries'": dict(querys=3), 'queries of faseg-closed': dict(queries=-3)}
    for said,option in dict(wrong, ratio=dict(ratio=0)).items():
        with pytest.raises(OpenTransError, match=said): build_closed(Stages(), NAMES, 'small', **option)
    names = ['sofa,couch', 'grass']
    image = torch.rand(1, 3, 64, 64)
    for built,asked in ((names, Vocabulary(names)), (Vocabulary(names), names), (names, names)):
        assert build_closed(Stages(), built, 'small').predict(image, asked).shape == (1, 64, 64)
    model = build_closed(Stages().to('meta'), names, 'small')
    assert {p.device.type for p in model.parameters()} == {'meta'}

def test_attention_of_the_last_block_says_what_it_needs():
    queries = torch.rand(1, 2, 5, 4)
    with pytest.raises(OpenTransError, match='gaussian_neighbours'): attention_weights('naclip', queries, queries)
    with pytest.raises(OpenTransError, match='one of: clip, sclip'): attention_weights('maskclip', queries, queries)

def test_small_windows_leave_no_gap():
    clip = ClipBackbone.create('shapes-vit', pretrained=None, seed=1)
    framework = build('catseg', clip, vocabulary=NAMES, preset='small', seed=0).eval()
    scores = framework.window_scores(torch.rand(1, 3, 40, 50), framework.text(), side=64, window=24)
    assert scores.part(0, 3).isfinite().all()
