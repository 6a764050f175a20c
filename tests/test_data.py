"""Data across modules and on disk: the real samples, every written format read back, damaged files, loaders with
workers."""
import json, pickle, random, warnings
from pathlib import Path
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader
from mutations import COUNT, check_reader
from opentrans.errors import OpenTransError
from opentrans.data import (
    augment, Augmented, collate, label_lut, list_datasets, open_dataset, read_augmented, read_image, read_segments,
    resize_short, ShapesWorld, unpack, View, VOCABULARIES, Vocabulary, write_coco_panoptic)
from opentrans.data.samples import _draw
from opentrans.data.readers import _numbered
from opentrans.training import batches, Recipe

SAMPLES = Path(__file__).parents[1]/'../shared/data/samples'
needs_coco = pytest.mark.skipif(not (SAMPLES/'coco_panoptic').is_dir(),
                                reason='the COCO sample is not at ../shared/data/samples/coco_panoptic')
needs_ade = pytest.mark.skipif(not (SAMPLES/'ade20k').is_dir(),
                               reason='the ADE20K sample is not at ../shared/data/samples/ade20k')

def same(a, b):
    assert set(a) == set(b)
    for k in a:
        assert (torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype if torch.is_tensor(a[k])
                else a[k] == b[k]), f'{k} differs'

# the real samples

@needs_coco
def test_real_coco_sample_says_what_its_json_says():
    data = open_dataset('coco_panoptic', SAMPLES/'coco_panoptic')
    d = json.loads((SAMPLES/'coco_panoptic/sample_data/panoptic_examples.json').read_text())
    cats = {c['id']: c for c in d['categories']}
    official = [c['name'] for c in json.loads((SAMPLES/'coco_panoptic/panoptic_coco_categories.json').read_text())]
    assert data.vocabulary == VOCABULARIES['coco_panoptic'] and len(data) == len(d['annotations']) == 2
    for s,a in zip(data, d['annotations']):
        infos = [i for i in a['segments_info'] if not i['iscrowd']]
        assert len(infos) < len(a['segments_info']), 'both samples hold a crowd, which is no region'
        assert [official[c] for c in s['region_classes']] == [cats[i['category_id']]['name'] for i in infos]
        areas = [i['area'] for i in infos]
        assert s['regions'].sum((1, 2)).tolist() == areas, 'the area of a region is not that of its annotation'
        assert s['isthing'].tolist() == [bool(cats[i['category_id']]['isthing']) for i in infos]
        crowd = sum(i['area'] for i in a['segments_info'] if i['iscrowd'])
        assert (s['labels'] != 255).sum() - s['regions'].any(0).sum() == crowd, 'crowds must be labelled'

@needs_coco
def test_real_coco_sample_equals_a_plain_loop():
    "The reader's table look-up against the loop that everyone would write first."
    data = open_dataset('coco_panoptic', SAMPLES/'coco_panoptic')
    for f,s in zip(data.files, data):
        raw,labels = read_segments(f.labels),torch.full(s['labels'].shape, 255)
        rgb = np.array(Image.open(f.labels)).astype(int)
        assert (raw == rgb[...,0] + 256*rgb[...,1] + 256**2*rgb[...,2]).all()
        for seg in f.segments: labels[torch.from_numpy(raw == seg['id'])] = data.categories[seg['category_id']]
        assert torch.equal(labels, s['labels'])

@needs_coco
def test_real_coco_sample_written_and_read_back(tmp_path):
    data = View(open_dataset('coco_panoptic', SAMPLES/'coco_panoptic'), transform=lambda s,i: resize_short(s, 64))
    quantised = [dict(s, image=(s['image']*255).round()/255) for s in data]
    write_coco_panoptic(data, tmp_path)
    back = open_dataset('coco_panoptic', tmp_path)
    assert back.vocabulary == VOCABULARIES['coco_panoptic'] and back.things == data.things
    for a,b in zip(quantised, back): same(a, b)

@needs_ade
def test_real_ade_sample():
    data = open_dataset('ade20k_150', SAMPLES/'ade20k')
    assert len(data) == 3 and (data.check().problem == '').all()
    words = [{data.vocabulary.names[c] for c in s['region_classes']} for s in data]
    assert words[0] == {'wall', 'building', 'sky', 'tree', 'road', 'grass',
                        'plant'}, 'numbers are off by one: 1 is wall and 0 is nothing'
    raw = np.array(Image.open(data.files[0].labels)).astype(int)
    assert torch.equal(data[0]['labels'], torch.from_numpy(np.where(raw == 0, 255, raw-1)))

# what is written is what is read

@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 300), h=st.integers(1, 40), w=st.integers(1, 40))
def test_any_panoptic_sample_survives_the_disk(tmp_path_factory, seed, k, h, w):
    rng = np.random.default_rng(seed)
    ignore = 255 if k <= 255 else 65535
    seg = rng.integers(0, rng.integers(1, 9)+1, (h, w))
    ids = [i for i in np.unique(seg) if i]
    classes = rng.integers(0, k, len(ids))
    labels = np.full((h, w), ignore)
    for i,c in zip(ids, classes): labels[seg == i] = c
    crowd = (seg == 0) & (rng.random((h, w)) < .3)
    labels[crowd] = rng.integers(0, k)           # labelled, but of no region
    s = dict(image=torch.from_numpy(rng.integers(0, 256, (3, h, w))).float()/255, labels=torch.from_numpy(labels),
             id='x', ignore=ignore, regions=torch.from_numpy(seg[None] == np.array(ids, int).reshape(-1, 1, 1)),
             region_classes=torch.from_numpy(classes), isthing=torch.from_numpy(classes % 2 == 0))
    class One(torch.utils.data.Dataset):
        name = 'one'
        groups = dict(even=list(range(0, k, 2)))
        vocabulary = Vocabulary([f'class {i},c{i}' for i in range(k)], 'vild')
        things = frozenset(range(0, k, 2))
        def __len__(self): return 1
        def __getitem__(self, i): return s
    root = tmp_path_factory.mktemp('any')
    write_coco_panoptic(One(), root)
    back = open_dataset('coco_panoptic', root)
    same(s, back[0])
    assert (back.vocabulary, back.groups, back.things, back.ignore) == (
        One.vocabulary, One.groups, One.things, ignore)

def test_overlapping_regions_cannot_be_written(tmp_path):
    s = dict(ShapesWorld(n=1)[0])
    s['regions'] = s['regions'].clone()
    s['regions'][:2,0,0] = True
    world = ShapesWorld(n=1)
    with pytest.raises(OpenTransError, match='overlap'):
        write_coco_panoptic(View(world, transform=lambda *_: s), tmp_path)
    # the JSON comes last: half a data set is none
    with pytest.raises(OpenTransError, match='panoptic_val2017.json'): open_dataset('coco_panoptic', tmp_path)

def test_a_write_that_is_cut_short_is_no_data_set(tmp_path):
    def stop(s, i):
        if i == 3: raise KeyboardInterrupt
        return s
    def is_none():
        with pytest.raises(OpenTransError, match='missing: coco/annotations/panoptic_val2017.json'):
            open_dataset('coco_panoptic', tmp_path)
    with pytest.raises(KeyboardInterrupt): write_coco_panoptic(View(ShapesWorld(n=6), transform=stop), tmp_path)
    is_none()
    write_coco_panoptic(ShapesWorld(n=6), tmp_path)
    assert len(open_dataset('coco_panoptic', tmp_path)) == 6
    other = ShapesWorld(n=6, seed=1)
    with pytest.raises(KeyboardInterrupt): write_coco_panoptic(View(other, transform=stop), tmp_path)
    is_none() # of the pictures three would be old and three new

# damage

def street(root, n=6, classes=11, h=36, w=48):
    rng = np.random.default_rng(0)
    for i in range(n):
        for kind,a in (('images', rng.integers(0, 256, (h, w, 3))),
                       ('labels', rng.integers(0, classes+1, (h//6, w//6)).repeat(6, 0).repeat(6, 1))):
            (root/kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(a.astype(np.uint8)).save(root/kind/f'{i:03d}.png')
    return ','.join(f'class {i}' for i in range(classes))

@pytest.mark.parametrize('kind', ['images', 'labels'])
def test_files_cut_at_any_byte(tmp_path, kind):
    names = street(tmp_path)
    path = tmp_path/kind/'002.png'
    whole = path.read_bytes()
    rng = random.Random(0)
    for n in [0, 1, 8, 33]+[rng.randrange(40, len(whole)-20) for _ in range(6)]:
        path.write_bytes(whole[:n])
        data = open_dataset('folder', tmp_path, names=names, ignore=11)
        with pytest.raises(OpenTransError, match='002.png'): data[2]
        assert data.check().problem.ne('').tolist() == [False, False, True, False, False, False]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            data = open_dataset('folder', tmp_path, names=names, ignore=11, corrupt='skip')
        assert ([s['id'] for s in data] == ['000', '001', '003', '004', '005'] and list(data.skipped) == ['002']
                and '002.png' in str(said[-1].message))

def test_labels_outside_the_vocabulary_are_fatal_even_when_skipping(tmp_path):
    names = street(tmp_path)
    for corrupt in ('raise', 'skip'):
        with pytest.raises(OpenTransError, match=r"label map '.*000.png' holds 11, outside the 11 classes"):
            open_dataset('folder', tmp_path, names=names, corrupt=corrupt)[0]
    labels = tmp_path/'labels/000.png'
    Image.fromarray(np.zeros((36, 48, 3), np.uint8)).save(labels)
    with pytest.raises(OpenTransError, match='not colours'): open_dataset('folder', tmp_path, names=names)[0]
    Image.fromarray(np.zeros((35, 48), np.uint8)).save(labels)
    with pytest.raises(OpenTransError, match='are 48x35 pixels, their image .* 48x36'):
        open_dataset('folder', tmp_path, names=names)[0]
    Image.fromarray(np.full((36, 48), 70000, np.int32)).save(tmp_path/'labels/000.tif')
    labels.unlink()
    with pytest.raises(OpenTransError, match='outside'): open_dataset('folder', tmp_path, names=names)[0]

def test_a_street_folder_as_a_loader_meets_it(tmp_path):
    names = street(tmp_path, n=3, h=360, w=480)
    data = pickle.loads(pickle.dumps(open_dataset('folder', tmp_path, names=names, ignore='11,255')))
    b = next(iter(DataLoader(Augmented(data, 128), batch_size=3, collate_fn=collate)))
    assert (b['images'].shape == (3, 3, 128, 128) and len(data.vocabulary) == 11
            and all(set(s['labels'].unique().tolist()) <= {*range(11), 255} for s in data))
    assert data.check(n=2).index.tolist() == ['000', '002']

def test_nothing_left_to_read(tmp_path):
    street(tmp_path, n=1)
    (tmp_path/'images/000.png').write_bytes(b'no image')
    with pytest.raises(OpenTransError, match='none of its 1 images can be read'):
        open_dataset('folder', tmp_path, names='a', corrupt='skip')
    (tmp_path/'images/000.png').unlink()
    with pytest.raises(OpenTransError, match='no images in'): open_dataset('folder', tmp_path, names='a')

@pytest.mark.parametrize('name', [n for n in list_datasets() if n != 'shapesworld'])
def test_an_empty_folder_is_told(name, tmp_path):
    with pytest.raises(OpenTransError, match='the folder is empty; missing: .*(Get|A folder data set is) '):
        open_dataset(name, tmp_path, **(dict(names='a') if name == 'folder' else {}))
    with pytest.raises(OpenTransError, match='There is no folder'):
        open_dataset(name, tmp_path/'nowhere', **(dict(names='a') if name == 'folder' else {}))

def test_root_from_the_environment(tmp_path, monkeypatch):
    write_coco_panoptic(ShapesWorld('train', n=2), tmp_path, 'train')
    monkeypatch.setenv('DETECTRON2_DATASETS', str(tmp_path))
    assert len(open_dataset('coco_panoptic', split='train')) == 2
    monkeypatch.delenv('DETECTRON2_DATASETS')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OpenTransError, match='DETECTRON2_DATASETS'): open_dataset('coco_panoptic', split='train')

# loaders

def test_workers_see_the_same_samples():
    data = Augmented(ShapesWorld(n=6, size=48), 48)
    def load(data, **kw): return list(DataLoader(data, batch_size=4, collate_fn=collate, **kw))
    # workers that are spawned get the data set by pickle
    for other in (load(data, num_workers=2), load(pickle.loads(pickle.dumps(data)))):
        for a,b in zip(load(data), other):
            assert (torch.equal(a['images'], b['images']) and torch.equal(a['labels'], b['labels'])
                    and a['ids'] == b['ids'])
            assert all(torch.equal(x, y) for x,y in zip(a['regions'], b['regions']))

WORLD = ShapesWorld(n=1, size=(40, 56))

@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.tuples(st.integers(1, 70), st.integers(1, 70)), low=st.floats(.05, 1),
       high=st.floats(1, 3))
def test_augment_keeps_regions_and_labels_together(seed, size, low, high):
    a = augment(WORLD[0], size, seed, scale=(low, high))
    assert (a['image'].shape[1:] == a['labels'].shape == a['regions'].shape[1:] == size and 0 <= a['image'].min()
            and a['image'].max() <= 1)
    assert len(a['regions']) == len(a['region_classes']) == len(a['isthing'])
    assert ((a['labels'] == 255) | a['regions'].any(0)).all() and (a['regions'].sum(0) <= 1).all()
    for r,c in zip(a['regions'], a['region_classes']): assert (a['labels'][r] == c).all() and r.any()

# what could be taken for something else

def folder(root, images, labels):
    "A folder data set; paths relative to `images` and `labels`, with their pixels."
    for kind, files in (('images', images), ('labels', labels)):
        for name, a in files.items():
            (root/kind/name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(a)).save(root/kind/name)
    return root

GREY, ZERO = np.full((6, 8, 3), 90, np.uint8), np.zeros((6, 8), np.uint8)

@pytest.mark.parametrize('kind, files',
                         [('images', ['x.jpg', 'x.png']), ('images', ['x.png', 'x.PNG']),
                          ('images', ['x.tif', 'x.tiff']), ('label maps', ['x.png', 'x.tif'])])
def test_files_of_one_name_are_a_problem(kind, files, tmp_path):
    "One of them would vanish, and which one depends on the alphabet."
    two = {name: (GREY if kind == 'images' else ZERO) for name in files}
    one = {'y.png': GREY, **(two if kind == 'images' else {'x.png': GREY})}, {
        'y.png': ZERO, **({'x.png': ZERO} if kind == 'images' else two)}
    folder(tmp_path, *one)
    with pytest.raises(OpenTransError, match=f"x: 2 {kind} have this name: .*{files[0]}"):
        open_dataset('folder', tmp_path, names='a')
    with pytest.warns(UserWarning, match='1 of 2 images are left out'):
        data = open_dataset('folder', tmp_path, names='a', corrupt='skip')
    assert [f.id for f in data.files] == ['y'] and files[0] in data.skipped['x'] and files[1] in data.skipped['x']
    assert data.check().problem['x'] == data.skipped['x']

def test_one_name_in_several_folders_is_no_problem(tmp_path):
    folder(tmp_path, {'a/x.png': GREY, 'b/x.jpg': GREY}, {'a/x.png': ZERO, 'b/x.png': ZERO})
    assert [f.id for f in open_dataset('folder', tmp_path, names='a').files] == ['a/x', 'b/x']

def test_names_that_differ_in_their_case_are_named(tmp_path):
    folder(tmp_path, {'Street.png': GREY, 'y.png': GREY}, {'street.png': ZERO, 'y.png': ZERO})
    with pytest.raises(OpenTransError,
                       match="no label map for 'Street.png', but 'street.png': write both in the same case"):
        open_dataset('folder', tmp_path, names='a')

def test_splits_within_images_and_labels(tmp_path):
    "The layout images/train, images/val: the split that is asked for, and nothing of the other."
    folder(tmp_path, {'train/x.png': GREY, 'train/z.png': GREY, 'val/x.png': GREY},
           {'train/x.png': ZERO, 'train/z.png': ZERO, 'val/x.png': ZERO})
    assert [[f.id for f in open_dataset('folder', tmp_path, split, names='a').files]
            for split in ('val', 'train', '')] == [['x'], ['x', 'z'], ['train/x', 'train/z', 'val/x']]
    with pytest.raises(OpenTransError, match="no folder 'test', only train, val"):
        open_dataset('folder', tmp_path, 'test', names='a')
    for bad in ('../..', 'a\0b', 5): # none of them is a folder of the data set
        with pytest.raises(OpenTransError, match='split'): open_dataset('folder', tmp_path, bad, names='a')

def test_two_images_that_would_be_written_to_one_file(tmp_path):
    folder(tmp_path, {'a/b.png': GREY, 'a__b.png': GREY}, {'a/b.png': ZERO, 'a__b.png': ZERO})
    with pytest.raises(OpenTransError, match="'a/b' and 'a__b' would both be written"):
        write_coco_panoptic(open_dataset('folder', tmp_path, names='a'), tmp_path/'out')

# do names and numbers belong together?

def binary(root, values, n=3, kind=np.uint8):
    a = np.resize(np.repeat(values, 8), (6, 8)).astype(kind)
    return folder(root, {f'{i}.png': GREY for i in range(n)}, {f'{i}.png': a for i in range(n)})

class Constant(torch.nn.Module):
    "Says class 0 everywhere."
    kinds = ('semantic',)
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
    def text(self, names): return torch.zeros(len(names), 1)
    def semantic(self, x, text): return torch.zeros(len(x), *x.shape[-2:], dtype=torch.long)

def test_a_foreground_written_as_255_is_told(tmp_path):
    "Labels 0 and 255 with two names: the foreground is left out, and a constant prediction has a mean IoU of 1."
    from opentrans.training import evaluate
    data = open_dataset('folder', binary(tmp_path, [0, 255]), names='background,coin')
    report = data.check()
    said = "'coin' never occurs in the labels of 3 images, while 0.5 of their pixels are left out (255)"
    assert said in report.problem['all images']
    assert (report.problem.drop('all images') == '').all()
    with pytest.warns(UserWarning, match="'coin' never occurs"): assert evaluate(Constant(), data)['miou'] == 1
    with pytest.warns(UserWarning, match="'coin' never occurs"): data.check(n=2)
    with pytest.warns(UserWarning, match="'coin' never occurs"):
        assert evaluate(Constant(), View(data, [0, 1]))['miou'] == 1
    honest = open_dataset('folder', tmp_path, names='background,coin', ignore=None)
    with pytest.raises(OpenTransError, match='holds 255, outside the 2 classes'): honest[0]

@pytest.mark.parametrize('values, names, said',
                         [([0, 1], 'a,b,c',
                           "'c' never occurs in the labels of 3 images. Do names and numbers belong together"),
                          ([1, 2], 'a,b,c', "'a' never occurs"),
                          ([0, 1, 255], 'a,b,c', "'c' never occurs .*left out"),
                          ([255], 'a,b', 'every pixel is left out in 3 of 3 images'),
                          ([0, 255], 'a,b,c,d,e,f,g,h,i', "'g' and 2 more never occur ")])
def test_names_and_numbers_that_seem_not_to_fit_are_told(values, names, said, tmp_path):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        report = open_dataset('folder', binary(tmp_path, values), names=names).check()
    import re
    assert re.search(said, ' '.join([*report.problem, *(str(w.message) for w in told)]))

@pytest.mark.parametrize('values, names', [([0, 1], 'a,b'), ([0, 1, 255], 'a,b'), ([0], 'a')])
def test_names_and_numbers_that_fit_are_no_problem(values, names, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        report = open_dataset('folder', binary(tmp_path, values), names=names).check()
    assert len(report) == 3 and (report.problem == '').all()

def test_numbers_from_one_are_told(tmp_path):
    data = open_dataset('folder', binary(tmp_path, [1, 2]), names='a,b')
    with pytest.raises(OpenTransError,
                       match='holds 2, outside the 2 classes .* if the first class is number 1, give number 0 a '
                             'name'):
        data[0]

def test_255_is_a_class_where_there_are_more(tmp_path):
    "With 300 names, 255 is one of them, and 65535 is what is left out."
    data = open_dataset('folder', binary(tmp_path, [255, 65535], kind=np.uint16),
                        names=[f'class {i}' for i in range(300)])
    assert (set(data[0]['labels'].unique().tolist()) == {255, 65535} and data.ignore == 65535
            and data[0]['region_classes'].tolist() == [255])

@pytest.mark.parametrize('ignore',
                         ['x', '', -1, 65536, [1, 'a'], 1.5, True, float('nan'), [[1]], '1;2', '1'*5000, None,
                          'none'])
def test_values_to_leave_out_are_numbers(ignore, tmp_path):
    binary(tmp_path, [0])
    if ignore is None: assert len(open_dataset('folder', tmp_path, names='a', ignore=ignore)) == 3
    else:
        with pytest.raises(OpenTransError, match='values to leave out are whole numbers'):
            open_dataset('folder', tmp_path, names='a', ignore=ignore)

@pytest.mark.parametrize('labels',
                         [np.array([[-1, 0]], np.int32), np.array([[70000, 0]], np.int32),
                          np.array([[300, 0]], np.uint16), np.array([[2**31-1, 0]], np.int32)])
def test_numbers_outside_the_names_are_told_in_every_type(labels, tmp_path):
    "A number that is too large for a type must not come back as a class."
    folder(tmp_path, {'x.png': GREY[:1,:2]}, {'x.tif': labels})
    with pytest.raises(OpenTransError, match=f'holds {labels[0,0]}, outside the 2 classes'):
        open_dataset('folder', tmp_path, names='a,b')[0]
    assert 'outside' in open_dataset('folder', tmp_path, names='a,b').check().problem['x']

def test_tables_of_numbers_that_cannot_be():
    for bad in (dict(offset=-1), dict(void=[70000]), dict(void=[-1]), dict(void=['a']), dict(ids=[1]),
                dict(ids=[0, 1, 65536])):
        with pytest.raises(OpenTransError): label_lut(3, **bad)
    with pytest.raises(OpenTransError): label_lut(70_000)

# small, empty, odd

@pytest.mark.parametrize('h, w', [(1, 1), (1, 300), (300, 1), (2, 3)])
def test_images_of_few_pixels(h, w, tmp_path):
    data = open_dataset('folder',
                        folder(tmp_path, {'x.png': np.full((h, w, 3), 9, np.uint8)},
                               {'x.png': np.zeros((h, w), np.uint8)}), names='a')
    for s in (data[0], data.packed(0)):
        for a in (augment(s, 8, 0), augment(s, (1, 5), 1), augment(s, None, 2), augment(s, 16, 3, scale=None),
                  resize_short(s, 5), resize_short(s, 1), resize_short(s, 3, max_size=4)):
            assert (a['image'].shape[1:] == a['labels'].shape == a['regions'].shape[1:]
                    and min(a['labels'].shape) >= 1)
            assert set(a['labels'].unique().tolist()) <= {0, 255}
    assert collate([data[0], augment(data[0], 4, 0)])['images'].shape == (2, 3, max(h, 4), max(w, 4))
    write_coco_panoptic(data, tmp_path/'out')
    same(open_dataset('coco_panoptic', tmp_path/'out')[0], data[0])

@pytest.mark.parametrize('bad',
                         [dict(size=0), dict(size=-3), dict(size=(4,)), dict(size=(4, 5, 6)), dict(size='a'),
                          dict(size=2.5), dict(size=10**9), dict(size=float('nan')), dict(scale=(0, 0)),
                          dict(scale=(-1, 1)), dict(scale=(2, 1)), dict(scale=(1,)), dict(scale=5),
                          dict(scale=(1, float('inf'))), dict(scale=(float('nan'), 1)), dict(scale=(1e9, 1e9)),
                          dict(flip=-1), dict(flip=2), dict(flip=None), dict(flip='a'), dict(seed=-1),
                          dict(seed='a'), dict(seed=1.5)])
def test_crops_that_cannot_be(bad):
    with pytest.raises(OpenTransError, match=f'{list(bad)[0]}='):
        augment(WORLD[0], **{**dict(size=8, seed=0), **bad})
    with pytest.raises(OpenTransError, match=f'{list(bad)[0]}='): Augmented(WORLD, **{**dict(size=8), **bad})
    if 'size' in bad and not isinstance(bad['size'], tuple):
        with pytest.raises(OpenTransError): resize_short(WORLD[0], **bad)
        with pytest.raises(OpenTransError): ShapesWorld(**bad)

def test_data_sets_without_images_are_told(tmp_path):
    voc = tmp_path/'VOCdevkit/VOC2012'
    for name in ('JPEGImages/a.jpg', 'SegmentationClass/a.png'):
        (voc/name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ZERO).save(voc/name)
    (voc/'ImageSets/Segmentation').mkdir(parents=True)
    listing = voc/'ImageSets/Segmentation/val.txt'
    listing.write_text('')
    for corrupt in ('raise', 'skip'):
        with pytest.raises(OpenTransError, match='not one image'): open_dataset('voc_20', tmp_path, corrupt=corrupt)
    listing.write_bytes(b'\xff\xfe')
    with pytest.raises(OpenTransError, match='val.txt'): open_dataset('voc_20', tmp_path)
    listing.write_text('a\n../../../etc/passwd\n')
    with pytest.raises(OpenTransError, match='no image for'): open_dataset('voc_20', tmp_path)
    with pytest.raises(OpenTransError, match='n=-1'): ShapesWorld(n=-1)

def test_pipes_and_folders_among_the_images(tmp_path):
    "A data set with a pipe in it is told at once, and skipped at once."
    import os
    folder(tmp_path, {'a.png': GREY, 'b.png': GREY, 'c.png': GREY}, {'a.png': ZERO, 'b.png': ZERO, 'c.png': ZERO})
    for name in ('images/b.png', 'labels/c.png'): (tmp_path/name).unlink()
    os.mkfifo(tmp_path/'images/b.png')
    (tmp_path/'labels/c.png').mkdir()
    data = open_dataset('folder', tmp_path, names='a')
    problems = data.check().problem
    assert problems['a'] == '' and 'it is a pipe or a device' in problems['b'] and 'it is a folder' in problems['c']
    with pytest.warns(UserWarning, match='2 of 3 images are left out'):
        assert len(open_dataset('folder', tmp_path, names='a', corrupt='skip')) == 1

def test_instance_maps_are_skipped_with_their_image(tmp_path):
    "ADE20K's instances are a third file of each image."
    top = tmp_path/'ADEChallengeData2016'
    for name in 'ab':
        for place, a in ((f'images/validation/{name}.jpg', GREY), (f'annotations/validation/{name}.png', ZERO+1),
                         (f'annotations_instance/validation/{name}.png', np.dstack([ZERO]*3))):
            (top/place).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(a).save(top/place)
    cut = top/'annotations_instance/validation/b.png'
    for damage in (lambda: cut.write_bytes(cut.read_bytes()[:45]), lambda: Image.fromarray(ZERO).save(cut),
                   cut.unlink):
        damage()
        with pytest.warns(UserWarning, match='1 of 2 images are left out'):
            data = open_dataset('ade20k_150', tmp_path, panoptic=True, corrupt='skip')
        assert [s['id'] for s in data] == ['a'] and 'instance map' in data.skipped['b']
        with pytest.raises(OpenTransError, match='b.png'): open_dataset('ade20k_150', tmp_path, panoptic=True)[1]

def test_views_hold_samples_that_are_there():
    assert (len(View(WORLD, np.array([0]))
                or ()) == len(View(WORLD, torch.tensor([0]))) == len(View(WORLD, [-1])) == 1
            and len(View(WORLD, [])) == 0)
    for bad in ([1], [-2], ['a'], [None], [.5]):
        with pytest.raises(OpenTransError, match='has 1 samples'): View(WORLD, bad)

@pytest.mark.parametrize('root', [5, b'x', ['a'], 'x'*5000, 'a\0b', '~nobody-here/x', ''])
def test_roots_that_are_no_folders(root, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ('folder', 'coco_panoptic', 'ade20k_150'):
        with pytest.raises(OpenTransError):
            open_dataset(name, root, **(dict(names='a') if name == 'folder' else {}))

# files of annotations

def coco_json(root):
    "A data set of three small scenes, and its JSON file."
    return write_coco_panoptic(ShapesWorld('val', n=3, size=16), root)

def city_json(root):
    stem = 'ulm_000000_000019'
    for name, a in ((f'leftImg8bit/val/ulm/{stem}_leftImg8bit.png', GREY),
                    (f'gtFine/cityscapes_panoptic_val/{stem}_gtFine_panoptic.png',
                     np.dstack([ZERO+7, ZERO, ZERO]))):
        (root/'cityscapes'/name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(a).save(root/'cityscapes'/name)
    path = root/'cityscapes/gtFine/cityscapes_panoptic_val.json'
    path.write_text(
        json.dumps(
            dict(
                annotations=[dict(image_id=stem, file_name=f'{stem}_gtFine_panoptic.png',
                                  segments_info=[dict(id=7, category_id=7, iscrowd=0)])])))
    return path

def ade_json(root):
    for name, a in (('images/validation/a.jpg', GREY),
                    ('ade20k_panoptic_val/a.png', np.dstack([ZERO+7, ZERO, ZERO]))):
        (root/'ADEChallengeData2016'/name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(a).save(root/'ADEChallengeData2016'/name)
    path = root/'ADEChallengeData2016/ade20k_panoptic_val.json'
    path.write_text(
        json.dumps(
            dict(
                annotations=[dict(image_id='a', file_name='a.png',
                                  segments_info=[dict(id=7, category_id=0, iscrowd=0)])])))
    return path

JSONS = dict(coco=(coco_json, 'coco_panoptic', {}), cityscapes=(city_json, 'cityscapes_19', dict(panoptic=True)),
             ade=(ade_json, 'ade20k_150', dict(panoptic=True)))

@pytest.mark.parametrize('kind', JSONS)
def test_mutated_annotations_are_read_or_told(kind, tmp_path):
    """Whatever a JSON file of annotations says, a data set comes out whose every sample can be read or told, or one
    sentence."""
    make, name, options = JSONS[kind]
    path = make(tmp_path/'data')
    good = tmp_path/path.name
    good.write_bytes(path.read_bytes())
    def read(_, changed):
        path.write_bytes(changed.read_bytes())
        data = open_dataset(name, tmp_path/'data', **options)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            data.check()
        return data
    assert check_reader(good, read)['refused'] > COUNT/3

@pytest.mark.parametrize('change, said',
                         [(lambda d: d['annotations'][0].pop('segments_info'),
                           'annotations.0.segments_info: field required'),
                          (lambda d: d.pop('annotations'), 'annotations: field required'),
                          (lambda d: d.pop('images'), "no 'images'"),
                          (lambda d: d['annotations'][0].update(segments_info=None), 'segments_info'),
                          (lambda d: d['annotations'][0]['segments_info'][0].update(id=-1),
                           'greater than or equal to 1'),
                          (lambda d: d['annotations'][0]['segments_info'][0].update(id=2**24), 'less than'),
                          (lambda d: d['annotations'][0]['segments_info'][0].update(id=1.5), 'valid integer'),
                          (lambda d: d['annotations'][0]['segments_info'][0].update(category_id='7'),
                           'valid integer'),
                          (lambda d: d['annotations'].append(d['annotations'][0]), 'more than once'),
                          (lambda d: d['images'].append(d['images'][0]), 'id of images 0 more than once'),
                          (lambda d: d['categories'].append(d['categories'][0]), 'more than once'),
                          (lambda d: d['categories'][0].update(name=7), 'valid string'),
                          (lambda d: d['categories'][0].update(name=''), 'empty name'),
                          (lambda d: d['categories'][1].update(name=d['categories'][0]['name']), 'twice'),
                          (lambda d: d['annotations'][0].update(file_name='../../x.png'), 'no path within'),
                          (lambda d: d['annotations'][0].update(file_name='/etc/passwd'), 'no path within'),
                          (lambda d: d['images'][0].update(file_name='a\0b'), 'no path within'),
                          (lambda d: d['annotations'][0].update(image_id=77),
                           'image_id 77 is not among the images'),
                          (lambda d: d.update(info=dict(opentrans=dict(templates=['{0.__class__}']))),
                           'Prompt template'),
                          (lambda d: d.update(info=dict(opentrans=dict(groups=dict(a=[999])))),
                           "'a' names class 999"),
                          (lambda d: d.update(info=dict(opentrans=[1])), 'info.opentrans'),
                          (
                              lambda d: d['annotations'][0]['segments_info'].append(
                                  dict(d['annotations'][0]['segments_info'][0])), 'more than once'),
                          (lambda d: d['annotations'][0]['segments_info'][0].update(category_id=10**10),
                           'names category 10000000000')])
def test_annotations_that_cannot_be(change, said, tmp_path):
    path = coco_json(tmp_path)
    d = json.loads(path.read_text())
    change(d)
    path.write_text(json.dumps(d))
    with pytest.raises(OpenTransError, match=said) as told: open_dataset('coco_panoptic', tmp_path)[0]
    assert len(str(told.value)) < 700

def test_what_other_programs_add_to_annotations_stays_out_of_the_way(tmp_path):
    path = coco_json(tmp_path)
    whole = [open_dataset('coco_panoptic', tmp_path)[i] for i in range(3)]
    d = json.loads(path.read_text())
    d.update(licenses=[dict(id=1)], info=dict(d['info'], year=2017, url=None))
    for entry in (*d['images'], *d['annotations'], *d['categories'], *d['annotations'][0]['segments_info']):
        entry.update(note=dict(any=['thing', 1.5, None]))
    for c in d['categories']: c['isthing'] = bool(c['isthing'])
    path.write_text('\ufeff'+json.dumps(d))
    for a, b in zip(whole, open_dataset('coco_panoptic', tmp_path)): same(a, b)

def test_maps_of_one_name_in_two_folders_keep_their_own(tmp_path):
    "In `_panoptic_json`'s trees maps may lie in folders: their names tell them apart."
    from opentrans.data.datasets import _ids
    assert (_ids([dict(file_name='a/x.png'), dict(file_name='b/x.png')]) == ['a/x', 'b/x']
            and _ids([dict(file_name='x.png')]) == ['x'])

def test_outlines_of_another_size_are_told(tmp_path):
    coco = pytest.importorskip('pycocotools.mask')
    from opentrans.data import Files
    from opentrans.frameworks.detectron2 import Outlines
    Image.fromarray(GREY).save(tmp_path/'x.png')
    def data(segmentation, category=0):
        return Outlines('x', Vocabulary('a,b'),
                        [Files('x', tmp_path/'x.png', tmp_path/'x.png',
                               [dict(category_id=category, segmentation=segmentation)])])
    good = coco.encode(np.asfortranarray(ZERO+1))
    assert (data(good)[0]['regions'].all() and data([[0, 0, 8, 0, 8, 6, 0, 6]])[0]['regions'].all()
            and data(dict(size=[6, 8], counts=[0, 48]))[0]['regions'].all())
    for bad in (dict(good, size=[8, 6]), dict(good, size=[60, 80]), dict(size=[6, 8]),
                dict(size=[6, 8], counts=[0, 10**6]), dict(size=[6, 8], counts=5), [], [[1]], [['a']*6], 'x', None,
                7, dict(size=None, counts=[1])):
        with pytest.raises(OpenTransError, match="outline of 'x'"): data(bad)[0]
    for bad in (5, -1, None, 'a'):
        with pytest.raises(OpenTransError, match='names category'): data(good, bad)[0]

# words

@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.text('abc d', min_size=1, max_size=6).filter(str.strip), min_size=1, max_size=3),
                min_size=1, max_size=12))
def test_any_vocabulary_travels(tmp_path_factory, words):
    try: v = Vocabulary(words, 'clip_7')
    except OpenTransError as e:
        assert 'twice' in str(e)
        return
    assert (len(set(v.names)) == len(v)
            and [v.index(n) for n in v.names] == list(range(len(v))) == [v.index(e) for e in v.entries])
    path = tmp_path_factory.mktemp('v')/'v.json'
    v.to_file(path)
    assert Vocabulary.from_file(path) == v and hash(Vocabulary.from_file(path)) == hash(v)
    assert (v + v == v and v.subset(range(len(v))) == v
            and [len(p) for p in v.prompts()] == [7*len(s) for s in v.synonyms])


# ---- read no larger than needed, handed on packed

def photographs(root, size=(480, 640), turn=None):
    "Three smooth pictures as COCO holds them, JPEG with panoptic maps; `turn`: their EXIF orientation."
    height, width = size
    y, x = np.mgrid[:height, :width]
    waves = np.stack([127+120*np.sin(x/41+k)*np.cos(y/57-k) for k in range(3)], -1).astype(np.uint8)
    numbers = (y*3//height)*4 + x*4//width
    maps = [('sand', 'sky', 'grass', 'wood')[k % 4] for k in range(12)]
    class Pictures(list):
        vocabulary = Vocabulary(['sand', 'sky', 'grass', 'wood'])
        ignore = 255
        name = 'pictures'
        things = ()
        groups = {}
    regions = torch.from_numpy(numbers == np.arange(12)[:, None, None])
    classes = torch.tensor([['sand', 'sky', 'grass', 'wood'].index(name) for name in maps])
    image = torch.from_numpy(waves).permute(2, 0, 1).float()/255
    sample = dict(image=image, labels=classes[torch.from_numpy(numbers)], regions=regions, region_classes=classes,
                  isthing=torch.zeros(12, dtype=torch.bool), id='0', ignore=255)
    write_coco_panoptic(Pictures([dict(sample, id=str(i)) for i in range(3)]), root, 'val')
    data = open_dataset('coco_panoptic', root)
    for f in data.files:
        exif = Image.Exif()
        stored = Image.fromarray(waves)
        if turn: exif[274], stored = turn, stored.rotate(90 if turn == 6 else -90, expand=True)
        stored.save(f.image.with_suffix('.jpg'), quality=95, exif=exif)
        f.image = f.image.with_suffix('.jpg')
    return data


@pytest.mark.parametrize('turn', [None, 6, 8])
def test_a_photograph_that_is_made_small_is_read_small(tmp_path, turn):
    "Labels are those of the whole map, resized; the picture is that of the whole file but for what rounding does."
    data = photographs(tmp_path, turn=turn)
    seen = []
    for least, size in ((240, 320), (240, 320)), ((100, 130), (120, 160)), ((241, 320), (480, 640)), (
        (9, 9), (60, 80)):
        assert tuple(read_image(data.files[0].image, lambda h, w: seen.append((h, w)) or least).shape[1:]) == size
    assert set(seen) == {(480, 640)}, 'heights and widths are those of the picture as it is seen'
    sample = data[1]
    for size, scale, seed in ((64, (.5, 2.), 1), (128, (1., 1.), 2), (200, (.3, .9), 3), ((50, 90), (.5, 1.5), 4),
                              ((50, 90), None, 5)):
        got = read_augmented(data, 1, size, seed, scale)
        (h, w), (top, left, bottom, right), mirrored, crop = _draw((480, 640), size, seed, scale, .5)
        assert data.packed(1, lambda *_: (h, w))['image'].shape[1] < 480 or scale is None
        picture = interpolate(sample['image'][None], (h, w), mode='bilinear', antialias=True)[
            0, :, top:bottom, left:right]
        rows, cols = (((torch.arange(m)+.5)*n/m).long() for n, m in ((480, h), (640, w)))
        labels = sample['labels'][rows][:, cols][top:bottom, left:right]
        if mirrored: picture, labels = picture.flip(-1), labels.flip(-1)
        height, width = labels.shape
        assert (got['image'].shape == (3, *crop) and not got['image'][:, height:].any()
                and not got['image'][:, :, width:].any())
        assert ((got['image'][:, :height, :width]-picture).abs().mean() < 2/255
                and torch.equal(got['labels'][:height, :width], labels))


def test_a_packed_crop_holds_the_sample(tmp_path):
    "It is filled up where the picture ends, and unpacked the same on the CPU and on a device."
    data = photographs(tmp_path, (48, 64))
    for seed in range(8):
        plain = augment(data.packed(0), 80, seed)
        packed = augment(data.packed(0), 80, seed, packed=True)
        assert packed['image'].dtype == torch.uint8 and packed['segments'].shape == (80, 80)
        for made in (unpack(packed), unpack(packed, device='cpu')):
            same(made, plain)
        assert (not len(unpack(packed, regions=False)['regions'])
                and not len(unpack(packed, regions=False, device='cpu')['regions']))


@pytest.mark.parametrize('regions', [True, False])
def test_batches_are_the_same_from_other_processes(tmp_path, regions):
    data = photographs(tmp_path, (48, 64))
    recipe = Recipe.tiny().replace(iterations=3, batch_size=2, crop=40, scale=(.5, 2.), flip=.5)
    here, there = (list(batches(data, recipe.replace(workers=n), regions=regions)) for n in (0, 2))
    assert len(here) == len(there) == 3
    for a, b in zip(here, there):
        assert (a.keys() == b.keys()
                and all(map(torch.equal, [a['images'], a['labels'], *a['regions']],
                            [b['images'], b['labels'], *b['regions']])))
        assert a['ids'] == b['ids'] and all(map(torch.equal, a['region_classes'], b['region_classes']))


@given(st.lists(st.integers(0, 2**24-1), min_size=1, max_size=9, unique=True), st.integers(0, 2**32-1))
def test_segments_are_numbered_as_pixel_by_pixel(ids, seed):
    rng = np.random.default_rng(seed)
    ids = np.array(ids)
    raw = rng.choice(np.append(ids, 12345), (5, 7)).repeat(rng.integers(1, 4), 1).astype(np.int32)
    where, strange = _numbered(raw, ids)
    known = np.isin(raw, ids)
    assert (ids[where[known]] == raw[known]).all() and set(strange) == set(raw[~known])

# data sets of one's own

class Own(torch.utils.data.Dataset):
    "What `Samples` asks for, and no more; with labels alone, if `keys` say so."
    vocabulary = Vocabulary(['sky', 'road'])
    ignore = 255
    def __init__(self, *keys): self.keys = keys
    def __len__(self): return 2
    def __getitem__(self, i):
        labels = torch.zeros(6, 9, dtype=torch.int64)
        labels[3:] = 1
        regions = torch.stack([labels == 0, labels == 1])
        sample = dict(image=torch.full((3, 6, 9), i/2), labels=labels, regions=regions, id=f'a{i}', ignore=255,
                      region_classes=torch.tensor([0, 1]), isthing=torch.tensor([False, True]))
        return {k: sample[k] for k in self.keys or sample}

LABELS = ('image', 'labels', 'id', 'ignore')

def test_samples_may_have_labels_alone():
    sample = Own(*LABELS)[0]
    for s in (resize_short(sample, 4), augment(sample, 16, 1), augment(sample, 16, 1, regions=False)):
        assert set(s) == set(LABELS)
    assert augment(sample, 16, 1)['labels'].shape == (16, 16)
    assert set(collate([sample, sample])) == {'images', 'labels', 'ids', 'ignore'}

def test_own_data_is_written(tmp_path):
    with pytest.raises(OpenTransError, match='which classes are things'): write_coco_panoptic(Own(), tmp_path)
    with pytest.raises(OpenTransError, match='no regions'): write_coco_panoptic(Own(*LABELS), tmp_path, things=[])
    write_coco_panoptic(Own(), tmp_path, things=[1])
    data = open_dataset('coco_panoptic', tmp_path)
    assert data.name == 'Own' and data.things == {1} and torch.equal(data[0]['labels'], Own()[0]['labels'])
    assert len(data.check(0)) == 0

def test_options_of_a_data_set_are_its_named_arguments(monkeypatch):
    from opentrans.data import register_dataset
    from opentrans.data.datasets import _DATASETS
    monkeypatch.setattr('opentrans.data.datasets._DATASETS', dict(_DATASETS))
    @register_dataset('more')
    def more(root, split, size=3, **others): return size, others
    @register_dataset('corrupt')
    def corrupt(root, split, corrupt='?'): return corrupt
    assert open_dataset('more', size=4) == (4, dict(corrupt='raise'))
    assert open_dataset('corrupt', corrupt='skip') == 'skip'
    with pytest.raises(OpenTransError, match='it takes: size'): open_dataset('more', others=3)

@pytest.mark.parametrize('domain', ['home', 'night', 'crowd', 'sketch'])
def test_scenes_may_be_tall_and_narrow(domain):
    world = ShapesWorld('val', domain, n=4, size=(400, 16))
    assert all(world[i]['labels'].shape == (400, 16) for i in range(4))

def test_a_short_side_is_one_number():
    for size in ((32, 32), 0, 2.): pytest.raises(OpenTransError, resize_short, WORLD[0], size)
    with pytest.raises(OpenTransError): resize_short(WORLD[0], 32, (64, 64))

def test_windows_have_a_side_above_zero():
    from opentrans.data import class_colours, ImageBatches
    for crop in (-5, 2.5): pytest.raises(OpenTransError, ImageBatches, WORLD, crop=crop)
    assert class_colours(np.int64(3)).tolist() == class_colours(3).tolist()

def test_views_count_from_the_end():
    crops = Augmented(WORLD, 16)
    same(crops[-1], crops[len(crops)-1])
    assert View(WORLD, [0, 0], transform=lambda s,i: i)[-1] == 1
    for view in (crops, View(WORLD)): pytest.raises(IndexError, lambda: view[len(view)])
