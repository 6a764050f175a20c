"Data across modules and on disk: the real samples, every written format read back, damaged files, loaders with workers."
import json, pickle, random, warnings
from pathlib import Path
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from opentrans.core import OpenTransError
from opentrans.data import (VOCABULARIES, Augmented, ShapesWorld, View, Vocabulary, augment, collate, list_datasets, open_dataset, read_segments, resize_short,
                            write_coco_panoptic)

SAMPLES = Path(__file__).parents[1]/'../shared/data/samples'
needs_coco = pytest.mark.skipif(not (SAMPLES/'coco_panoptic').is_dir(), reason='the COCO sample is not at ../shared/data/samples/coco_panoptic')
needs_ade = pytest.mark.skipif(not (SAMPLES/'ade20k').is_dir(), reason='the ADE20K sample is not at ../shared/data/samples/ade20k')

def same(a, b):
    assert set(a) == set(b)
    for k in a: assert torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype if torch.is_tensor(a[k]) else a[k] == b[k], f'{k} differs'

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
        assert s['regions'].sum((1, 2)).tolist() == [i['area'] for i in infos], 'the area of a region is not that of its annotation'
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
    assert words[0] == {'wall', 'building', 'sky', 'tree', 'road', 'grass', 'plant'}, 'numbers are off by one: 1 is wall and 0 is nothing'
    raw = np.array(Image.open(data.files[0].labels)).astype(int)
    assert torch.equal(data[0]['labels'], torch.from_numpy(np.where(raw == 0, 255, raw-1)))

# what is written is what is read

@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 300), h=st.integers(1, 40), w=st.integers(1, 40))
def test_any_panoptic_sample_survives_the_disk(tmp_path_factory, seed, k, h, w):
    rng = np.random.default_rng(seed); ignore = 255 if k <= 255 else 65535
    seg = rng.integers(0, rng.integers(1, 9)+1, (h, w)); ids = [i for i in np.unique(seg) if i]
    classes = rng.integers(0, k, len(ids)); labels = np.full((h, w), ignore)
    for i,c in zip(ids, classes): labels[seg == i] = c
    crowd = (seg == 0) & (rng.random((h, w)) < .3); labels[crowd] = rng.integers(0, k)           # labelled, but of no region
    s = dict(image=torch.from_numpy(rng.integers(0, 256, (3, h, w))).float()/255, labels=torch.from_numpy(labels), id='x', ignore=ignore,
             regions=torch.from_numpy(seg[None] == np.array(ids, int).reshape(-1, 1, 1)), region_classes=torch.from_numpy(classes), isthing=torch.from_numpy(classes % 2 == 0))
    class One(torch.utils.data.Dataset):
        name,groups,vocabulary,things = 'one',dict(even=list(range(0, k, 2))),Vocabulary([f'class {i},c{i}' for i in range(k)], 'vild'),frozenset(range(0, k, 2))
        def __len__(self): return 1
        def __getitem__(self, i): return s
    root = tmp_path_factory.mktemp('any'); write_coco_panoptic(One(), root); back = open_dataset('coco_panoptic', root)
    same(s, back[0])
    assert (back.vocabulary, back.groups, back.things, back.ignore) == (One.vocabulary, One.groups, One.things, ignore)

def test_overlapping_regions_cannot_be_written(tmp_path):
    s = dict(ShapesWorld(n=1)[0]); s['regions'] = s['regions'].clone(); s['regions'][:2,0,0] = True
    world = ShapesWorld(n=1)
    with pytest.raises(OpenTransError, match='overlap'): write_coco_panoptic(View(world, transform=lambda *_: s), tmp_path)
    with pytest.raises(OpenTransError, match='panoptic_val2017.json'): open_dataset('coco_panoptic', tmp_path)     # the JSON comes last: half a data set is none

def test_a_write_that_is_cut_short_is_no_data_set(tmp_path):
    def stop(s, i):
        if i == 3: raise KeyboardInterrupt
        return s
    with pytest.raises(KeyboardInterrupt): write_coco_panoptic(View(ShapesWorld(n=6), transform=stop), tmp_path)
    with pytest.raises(OpenTransError, match='missing: coco/annotations/panoptic_val2017.json'): open_dataset('coco_panoptic', tmp_path)

# damage

def street(root, n=6, classes=11, h=36, w=48):
    rng = np.random.default_rng(0)
    for i in range(n):
        for kind,a in (('images', rng.integers(0, 256, (h, w, 3))), ('labels', rng.integers(0, classes+1, (h//6, w//6)).repeat(6, 0).repeat(6, 1))):
            (root/kind).mkdir(parents=True, exist_ok=True); Image.fromarray(a.astype(np.uint8)).save(root/kind/f'{i:03d}.png')
    return ','.join(f'class {i}' for i in range(classes))

@pytest.mark.parametrize('kind', ['images', 'labels'])
def test_files_cut_at_any_byte(tmp_path, kind):
    names = street(tmp_path); path = tmp_path/kind/'002.png'; whole = path.read_bytes(); rng = random.Random(0)
    for n in [0, 1, 8, 33]+[rng.randrange(40, len(whole)-20) for _ in range(6)]:
        path.write_bytes(whole[:n])
        data = open_dataset('folder', tmp_path, names=names, ignore=11)
        with pytest.raises(OpenTransError, match='002.png'): data[2]
        assert data.check().problem.ne('').tolist() == [False, False, True, False, False, False]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always'); data = open_dataset('folder', tmp_path, names=names, ignore=11, corrupt='skip')
        assert [s['id'] for s in data] == ['000', '001', '003', '004', '005'] and list(data.skipped) == ['002'] and '002.png' in str(said[-1].message)

def test_labels_outside_the_vocabulary_are_fatal_even_when_skipping(tmp_path):
    names = street(tmp_path)
    for corrupt in ('raise', 'skip'):
        with pytest.raises(OpenTransError, match=r"label map '.*000.png' holds 11, outside the 11 classes"): open_dataset('folder', tmp_path, names=names, corrupt=corrupt)[0]
    labels = tmp_path/'labels/000.png'
    Image.fromarray(np.zeros((36, 48, 3), np.uint8)).save(labels)
    with pytest.raises(OpenTransError, match='not colours'): open_dataset('folder', tmp_path, names=names)[0]
    Image.fromarray(np.zeros((35, 48), np.uint8)).save(labels)
    with pytest.raises(OpenTransError, match='are 48x35 pixels, their image .* 48x36'): open_dataset('folder', tmp_path, names=names)[0]
    Image.fromarray(np.full((36, 48), 70000, np.int32)).save(tmp_path/'labels/000.tif'); labels.unlink()
    with pytest.raises(OpenTransError, match='outside'): open_dataset('folder', tmp_path, names=names)[0]

def test_a_street_folder_as_a_loader_meets_it(tmp_path):
    names = street(tmp_path, n=3, h=360, w=480)
    data = pickle.loads(pickle.dumps(open_dataset('folder', tmp_path, names=names, ignore='11,255')))
    b = next(iter(DataLoader(Augmented(data, 128), batch_size=3, collate_fn=collate)))
    assert b['images'].shape == (3, 3, 128, 128) and len(data.vocabulary) == 11 and all(set(s['labels'].unique().tolist()) <= {*range(11), 255} for s in data)
    assert data.check(n=2).index.tolist() == ['000', '002']

def test_nothing_left_to_read(tmp_path):
    street(tmp_path, n=1)
    (tmp_path/'images/000.png').write_bytes(b'no image')
    with pytest.raises(OpenTransError, match='none of its 1 images can be read'): open_dataset('folder', tmp_path, names='a', corrupt='skip')
    (tmp_path/'images/000.png').unlink()
    with pytest.raises(OpenTransError, match='no images in'): open_dataset('folder', tmp_path, names='a')

@pytest.mark.parametrize('name', [n for n in list_datasets() if n != 'shapesworld'])
def test_an_empty_folder_is_told(name, tmp_path):
    with pytest.raises(OpenTransError, match='the folder is empty; missing: .*(Get|A folder data set is) '): open_dataset(name, tmp_path, **(dict(names='a') if name == 'folder' else {}))
    with pytest.raises(OpenTransError, match='There is no folder'): open_dataset(name, tmp_path/'nowhere', **(dict(names='a') if name == 'folder' else {}))

def test_root_from_the_environment(tmp_path, monkeypatch):
    write_coco_panoptic(ShapesWorld('train', n=2), tmp_path, 'train')
    monkeypatch.setenv('DETECTRON2_DATASETS', str(tmp_path))
    assert len(open_dataset('coco_panoptic', split='train')) == 2
    monkeypatch.delenv('DETECTRON2_DATASETS'); monkeypatch.chdir(tmp_path)
    with pytest.raises(OpenTransError, match='DETECTRON2_DATASETS'): open_dataset('coco_panoptic', split='train')

# loaders

def test_workers_see_the_same_samples():
    data = Augmented(ShapesWorld(n=6, size=48), 48)
    load = lambda data, **kw: list(DataLoader(data, batch_size=4, collate_fn=collate, **kw))
    for other in (load(data, num_workers=2), load(pickle.loads(pickle.dumps(data)))):      # workers that are spawned get the data set by pickle
        for a,b in zip(load(data), other):
            assert torch.equal(a['images'], b['images']) and torch.equal(a['labels'], b['labels']) and a['ids'] == b['ids']
            assert all(torch.equal(x, y) for x,y in zip(a['regions'], b['regions']))

WORLD = ShapesWorld(n=1, size=(40, 56))

@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.tuples(st.integers(1, 70), st.integers(1, 70)), low=st.floats(.05, 1), high=st.floats(1, 3))
def test_augment_keeps_regions_and_labels_together(seed, size, low, high):
    a = augment(WORLD[0], size, seed, scale=(low, high))
    assert a['image'].shape[1:] == a['labels'].shape == a['regions'].shape[1:] == size and 0 <= a['image'].min() and a['image'].max() <= 1
    assert len(a['regions']) == len(a['region_classes']) == len(a['isthing'])
    assert ((a['labels'] == 255) | a['regions'].any(0)).all() and (a['regions'].sum(0) <= 1).all()
    for r,c in zip(a['regions'], a['region_classes']): assert (a['labels'][r] == c).all() and r.any()

# words

@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.text('abc d', min_size=1, max_size=6).filter(str.strip), min_size=1, max_size=3), min_size=1, max_size=12))
def test_any_vocabulary_travels(tmp_path_factory, words):
    try: v = Vocabulary(words, 'clip_7')
    except OpenTransError as e: assert 'twice' in str(e); return
    assert len(set(v.names)) == len(v) and [v.index(n) for n in v.names] == list(range(len(v))) == [v.index(e) for e in v.entries]
    path = tmp_path_factory.mktemp('v')/'v.json'; v.to_file(path)
    assert Vocabulary.from_file(path) == v and hash(Vocabulary.from_file(path)) == hash(v)
    assert v + v == v and v.subset(range(len(v))) == v and [len(p) for p in v.prompts()] == [7*len(s) for s in v.synonyms]
