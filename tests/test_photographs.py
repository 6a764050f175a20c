"""Readers of MSRC and CamVid in each layout, mosaics of photographs, sets at one size and side by side, and the
world of the scale `photo`."""
import tarfile
from pathlib import Path
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from opentrans.data import (
    CAMVID_NAMES, collate, MSRC_NAMES, MSRC_NOVEL, open_dataset, PhotoMosaic, Resized, Together)
from opentrans.errors import OpenTransError
from opentrans.experiments.scale import open_things, SCALES

DATA = Path(__file__).resolve().parents[1]/'../shared/data'
needs_data = pytest.mark.skipif(not (DATA/'msrc').is_dir(), reason='the photographs are not at ../shared/data')

def save(array, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(array, np.uint8)).save(path)

def named(data, i):
    "The name of each pixel, None where there is none."
    return [[data.vocabulary.names[k] if k != data.ignore else None for k in row]
            for row in data[i]['labels'].tolist()]

# ---------------------------------------------------------------- MSRC and CamVid

MAP = [[1, 5, 4, 255], [0, 22, 7, 2]] # of MSRC: grass, sheep, horse, nothing; building, boat, mountain, tree
SHOWN = [['grass', 'sheep', None, None], ['building', 'boat', None, 'tree']]
COLOURS = {1: (0, 128, 0), 5: (0, 128, 128), 4: (128, 0, 128), 255: (0, 0, 0), 0: (128, 0, 0), 22: (192, 64, 0),
           7: (64, 0, 0), 2: (128, 128, 0)}

def plain_msrc(root):
    for split in ('train', 'val'):
        save(np.zeros((2, 4, 3)), root/f'msrc/images/{split}/a.png')
        save(MAP, root/f'msrc/labels/{split}/a.png')

def published_msrc(root):
    top = root/'MSRC_ObjCategImageDatabase_v2'
    for i in range(4):
        save(np.zeros((2, 4, 3)), top/f'Images/{i}_s.bmp')
        save([[COLOURS[k] for k in row] for row in MAP], top/f'GroundTruth/{i}_s_GT.bmp')

@pytest.mark.parametrize('layout', [plain_msrc, published_msrc])
def test_msrc(layout, tmp_path):
    "Numbers or colours: the same names; rare ones count nowhere, novel ones are kept back from who asks for base."
    layout(tmp_path)
    data = open_dataset('msrc', tmp_path)
    assert data.vocabulary.names == MSRC_NAMES and len(data) == 1 and named(data, 0) == SHOWN
    assert ({data.vocabulary.names[k] for k in data.groups['novel']} == set(MSRC_NOVEL)
            and len(data.groups['base']) == 15)
    base = open_dataset('msrc', tmp_path, 'train', names='base')
    assert (named(base, 0) == [['grass', None, None, None], ['building', None, None, 'tree']]
            and len(base.vocabulary) == 15)
    with pytest.raises(OpenTransError, match='base'): open_dataset('msrc', tmp_path, names='novel')

def test_camvid(tmp_path):
    "As SegNet's authors give it, and as it was published, in 32 colours."
    save(np.zeros((1, 3, 3)), tmp_path/'CamVid/val/a.png')
    save([[0, 10, 11]], tmp_path/'CamVid/valannot/a.png')
    data = open_dataset('camvid', tmp_path)
    assert data.vocabulary.names == CAMVID_NAMES and named(data, 0) == [['sky', 'bicyclist', None]]
    for i in range(4):
        save(np.zeros((1, 4, 3)), tmp_path/f'raw/701_StillsRaw_full/{i}.png')
        save([[(128, 0, 192), (64, 128, 192), (0, 0, 0), (192, 128, 64)]],
             tmp_path/f'raw/LabeledApproved_full/{i}_L.png')
    # lane markings, a pickup, void, a child
    assert named(open_dataset('camvid', tmp_path/'raw'), 0) == [['road', 'car', None, 'pedestrian']]

@needs_data
def test_the_sets_of_this_place():
    "Every label is known, and all names occur."
    for name,n,k in (('msrc', 119, 21), ('camvid', 101, 11)):
        data = open_dataset(name, DATA)
        seen = {int(c) for i in range(0, n, 3) for c in data[i]['labels'].unique()} - {data.ignore}
        assert len(data) == n and len(data.vocabulary) == k and seen == set(range(k)), name
    assert len(open_dataset('msrc', DATA, 'train', names='base')) == 347

# ---------------------------------------------------------------- mosaics

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Three classes of one colour each, so that a mask can be read off the picture."
    root = tmp_path_factory.mktemp('set')
    for name,colour in dict(n01=(255, 0, 0), n02=(0, 255, 0), n03=(0, 0, 255)).items():
        for i in range(2): save(np.full((8, 8, 3), colour), root/'set'/name/f'{i}.png')
    (root/'set'/'names.txt').write_text('n01\tcat, tabby\nn02\tdog\nn03\tboat\n')
    with tarfile.open(root/'set.tar', 'w') as tar: tar.add(root/'set', 'set')
    return root

@settings(max_examples=15)
@given(seed=st.integers(0, 1000), cut=st.sampled_from(['box', 'ellipse', 'blob']), most=st.integers(1, 7))
def test_masks_are_what_is_seen(folder, seed, cut, most):
    "Each pixel has the class of the photograph that it comes from, and the ground has none."
    data = PhotoMosaic(folder/'set', n=1, size=(40, 60), objects=(1, most), cuts=(cut,), ground='plain', seed=seed,
                       names=folder/'set'/'names.txt')
    s = data[0]
    for k in range(3):
        colour = torch.zeros(3)
        colour[k] = 1
        assert torch.equal((s['image'] == colour[:, None, None]).all(0), s['labels'] == k)
    assert torch.equal(s['regions'].any(0), s['labels'] != data.ignore) and s['regions'].sum(0).max() <= 1
    assert 1 <= len(s['regions']) <= most and torch.equal(s['labels'], data[0]['labels'])

def test_tars_and_folders_give_the_same(folder):
    one,other = PhotoMosaic(folder/'set', n=3, size=32, seed=4),PhotoMosaic(folder/'set.tar', n=3, size=32, seed=4)
    assert all(torch.equal(one[i]['image'], other[i]['image'])
               and torch.equal(one[i]['labels'], other[i]['labels']) for i in range(3))
    assert one.vocabulary.names == ('n01', 'n02', 'n03')
    told = PhotoMosaic(folder/'set.tar', names=dict(n01='cat, tabby', n02='dog', n03='boat'),
                       classes=['n03', 'n01'])
    assert told.vocabulary.entries == ('boat', 'cat,tabby')

def test_a_ground_may_have_its_name(folder):
    s = PhotoMosaic(folder/'set', n=1, size=32, ground='labelled', seed=1)[0]
    assert (s['labels'] != 255).all()

def test_coco_comes_back(folder, tmp_path):
    data = PhotoMosaic(folder/'set', n=3, size=(32, 48), seed=2)
    data.to_coco(tmp_path)
    back = open_dataset('coco_panoptic', tmp_path)
    assert [b['id'] for b in map(back.__getitem__, range(3))] == [data[i]['id'] for i in range(3)]
    for i in range(3):
        assert (torch.equal(back[i]['labels'], data[i]['labels'])
                and len(back[i]['regions']) == len(data[i]['regions']))

def test_what_makes_no_mosaic(folder, tmp_path):
    bad = {'no photographs of': dict(classes=['cat']), 'at least one scene': dict(n=0),
           'have no name': dict(names={'n01': 'cat'}), 'ground': dict(ground='sea'), 'cut': dict(cuts=('star',)),
           'larger number': dict(objects=(3, 2))}
    for message,options in bad.items():
        with pytest.raises(OpenTransError, match=message): PhotoMosaic(folder/'set', **options)
    (tmp_path/'a.tar').write_bytes(b'no tar'*200)
    with pytest.raises(OpenTransError, match='plain tar'): PhotoMosaic(tmp_path/'a.tar')
    with pytest.raises(OpenTransError): PhotoMosaic(tmp_path/'nothing.tar')
    (tmp_path/'empty').mkdir()
    with pytest.raises(OpenTransError, match='no photographs in'): PhotoMosaic(tmp_path/'empty')

# ---------------------------------------------------------------- one size, side by side

def test_one_size(tmp_path):
    plain_msrc(tmp_path)
    data = open_dataset('msrc', tmp_path)
    small = Resized(data, (4, 8))
    assert named(small, 0)[::2] == [[name for name in row for _ in range(2)] for row in SHOWN]
    assert small.groups == data.groups and small.packed(0) is small.packed(-1)
    with pytest.raises(IndexError): small.packed(1)

def test_side_by_side(folder, tmp_path):
    "Names that both have are one class; a batch may hold both."
    plain_msrc(tmp_path)
    msrc = Resized(open_dataset('msrc', tmp_path), (32, 32))
    mosaic = PhotoMosaic(folder/'set', n=2, size=32, names=dict(n01='grass', n02='dog', n03='submarine'))
    both = Together([msrc, mosaic])
    assert len(both) == 3 and both.vocabulary.names == (*MSRC_NAMES, 'submarine')
    assert named(both, 0) == named(msrc, 0) and named(both, 2) == named(mosaic, 1)
    batch = collate([both[i] for i in range(3)])
    assert batch['ignore'] == 255 and both.vocabulary.index('submarine') in both.things
    with pytest.raises(OpenTransError): Together([])

# ---------------------------------------------------------------- the scale

@needs_data
def test_the_world_of_photographs(monkeypatch):
    "Novel names are in no label of training; mosaics are of names that were kept back."
    from opentrans.experiments import SCALES
    from opentrans.experiments.scale import open_world
    monkeypatch.setenv('DETECTRON2_DATASETS', str(DATA))
    scale = SCALES['photo']
    world = open_world(scale, 0)
    assert (list(world) == ['train', 'val', 'camvid', 'mosaic']
            and tuple(world['train'][0]['image'].shape) == (3, 192, 256))
    assert (not set(world['train'].vocabulary.names) & set(MSRC_NOVEL)
            and {*world['val'].groups} == {'base', 'novel'})
    more = open_world(scale.changed(dict(mosaics='50')), 0)
    assert (len(more['train']) == 397
            and not set(more['train'].vocabulary.entries) & set(world['mosaic'].vocabulary.entries))

def test_things_of_photographs(tmp_path, monkeypatch):
    "Every fifth name of Tiny-ImageNet is looked for, and every fourth of these is in no scene of training."
    tiny = tmp_path/'tiny_imagenet'
    folders = [f'n{number:02}' for number in range(20)]
    for number,name in enumerate(folders): save(np.full((8, 8, 3), number, np.uint8), tiny/name/'0.png')
    (tiny/'names.tsv').write_text(''.join(f'{name}\tthing {name}\n' for name in folders))
    for split in ('train', 'val'):
        with tarfile.open(tiny/f'{split}.tar', 'w') as tar:
            for name in folders: tar.add(tiny/name, name)
    monkeypatch.setenv('DETECTRON2_DATASETS', str(tmp_path))
    world = open_things(SCALES['photo'], 0)
    assert world['train'].folders == ['n00', 'n05', 'n10'] and world['val'].folders == ['n00', 'n05', 'n10', 'n15']
    assert world['val'].groups == dict(base=[0, 1, 2], novel=[3]) and len(world['train']) == 250*8
    assert world['val'][0]['regions'].any() and 'thing n15' in world['val'].vocabulary.names
    monkeypatch.setenv('DETECTRON2_DATASETS', str(tiny))
    with pytest.raises(OpenTransError, match="no folder 'tiny_imagenet' in .* Give the root that has it\\."):
        open_things(SCALES['photo'], 0)

def test_a_lean_head_begins_with_what_clip_says():
    "Before any step its answer is CLIP's own; a step reaches tower and head."
    from opentrans.clip import ClipBackbone
    from opentrans.frameworks import build
    clip = ClipBackbone.create('shapes-rn', pretrained='shapes-rn')
    names = ['red star', 'grass', 'sand']
    seg = build('deeplabv3', clip, vocabulary=names, preset='small', lean=True).eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        near = torch.einsum('bdhw,kd->bkhw', clip.dense_embeddings(x), clip.encode_text(names))
        near = torch.nn.functional.interpolate(near, size=seg.embed(x).shape[-2:], mode='bilinear',
                                               align_corners=False)
        assert (seg.predict(x, names) == torch.nn.functional.interpolate(near, size=(64, 64), mode='bilinear',
                                                                         align_corners=False).argmax(
                    1)).float().mean() > .95
    seg.train()
    seg.loss(dict(images=x, labels=torch.randint(3, (1, 64, 64)), ignore=255))['ce'].backward()
    assert seg.proj.weight.grad.abs().sum() > 0 and seg.backbone.visual.layer4[0].conv1.weight.grad.abs().sum() > 0

def test_claims_have_a_column_of_photographs():
    """What is judged on photographs stands beside the same claim on the generated world; one that is judged there
    alone has a line, too."""
    from opentrans.experiments import claims_table
    import pandas as pd
    def told(claim, measured, mean, verdict):
        return dict(claim=claim, where='Tab. 1', measured=measured, mean=mean, low=mean-1, high=mean+1,
                    verdict=verdict)
    toy = pd.DataFrame([told('masks help', 'base', 5., 'holds')])
    real = pd.DataFrame([told('masks help', 'base', 3., 'holds'), told('masks help', 'novel', .5, 'undecided'),
                         told('freezing helps', 'base', -2., 'does not hold')])
    table = claims_table(toy, photographs=real)
    assert list(table.columns) == ['paper', 'base', 'photographs']
    assert table.photographs[
        'masks help'] == 'base +3.00 [+2.00, +4.00] holds; novel +0.50 [-0.50, +1.50] undecided'
    assert table.base['freezing helps'] == '' and 'does not hold' in table.photographs['freezing helps']
    assert 'photographs' not in claims_table(toy, photographs=real[:0]) and 'photographs' not in claims_table(toy)

def test_views_and_own_data_at_one_size():
    "A view of packed samples stays packed; what is transformed is resized as it is, and not put together."
    from opentrans.data import Augmented, read_sample, ShapesWorld, View
    world = ShapesWorld('val', n=3, size=32)
    view,whole = Resized(View(world, [2, 0]), (8, 9)),Resized(world, (8, 9))
    for key in ('image', 'labels', 'regions'): assert torch.equal(view[0][key], whole[2][key])
    assert Together([View(world, [1]), world])[0]['id'] == world[1]['id']
    crops = Resized(Augmented(world, 16), (8, 9))
    assert crops[0]['labels'].shape == (8, 9) and crops[0]['image'].shape == (3, 8, 9)
    assert not len(read_sample(crops, 0, False)['regions'])
    with pytest.raises(OpenTransError, match='not packed'): Together([crops])[0]

def test_borders_of_mosaics(tmp_path):
    save(np.zeros((4, 5, 3)), tmp_path/'cat/1.png')
    for bad in (dict(objects=3), dict(objects=(1.5, 3)), dict(side=.5), dict(cuts=())):
        with pytest.raises(OpenTransError): PhotoMosaic(tmp_path, **bad)
