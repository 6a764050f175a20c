"Fine-tuning under fault: killed, out of disk, poisoned, resumed by mistake."
import functools, importlib, json, os, random, shutil, textwrap
from pathlib import Path
import numpy as np
import pytest
import torch
from mutations import check_reader, digest
from hypothesis import given, settings, strategies as st
from opentrans.clip import ClipBackbone
from opentrans.core import LayerSelection
from opentrans.errors import OpenTransError
from opentrans.files import load_tensors
from opentrans.data import ShapesWorld, View, Vocabulary, read_sample
from opentrans.errors import FormatError, OtherRun
from opentrans.files import save_json, save_tensors
from opentrans.training import (
    batch_indices, build_optimizer, Checkpoint, compare_runs, evaluate, finetune, load_framework, plot_runs,
    read_settings, Recipe, run_settings, same_size_batches, seen_size, WEIGHTS_FILE)
from opentrans.frameworks import build
from opentrans.frameworks.contract import tiny_backbone
from opentrans.pruning import SparseMask
from conftest import until
from forked import Forked, python

KILLS = 5

@pytest.fixture(scope='module')
def faults(tmp_path_factory):
    """A run left alone; one that is killed at five random moments and resumed; one on a disk that takes no file
    above 1 MB. (folder, killed, exit code, messages)"""
    d = tmp_path_factory.mktemp('faults')
    words = ['-W', 'ignore', Path(__file__).with_name('killed_finetune.py'), d, KILLS, random.randrange(10**6)]
    p = python(*words, env=dict(os.environ, OMP_NUM_THREADS='1'), cwd=d)
    assert p.returncode == 0, p.stderr[-2000:]
    died,code = map(int, p.stdout.split()[-2:])
    return d,died,code,p.stderr

def test_killed_and_resumed_is_the_same_run(faults):
    """kill -9 at five random moments: weights, optimizer, history and log end bit for bit as in a run that was left
    alone."""
    d,died,_,_ = faults
    assert died == KILLS, f'only {died} of {KILLS} children were killed while they ran'
    (a,ma),(b,mb) = (load_tensors(d/f/'last.safetensors') for f in ('whole', 'killed'))
    assert a.keys() == b.keys() and json.loads(ma['iteration']) == 48 and ma == mb
    for k in a: assert torch.equal(a[k], b[k]), f'{k} differs after {KILLS} kills'
    assert (d/'whole'/'history.csv').read_text() == (d/'killed'/'history.csv').read_text()
    assert not [f
                for f in os.listdir(d/'killed')
                if f not in ('last.safetensors', 'history.csv',
                             '.lock')], 'what a killed writer left is still there'

def test_full_disk_is_one_message_and_nothing_half_written(faults):
    d,_,code,messages = faults
    assert code == 2 and 'WriteError: Cannot write' in messages and 'last.safetensors' in messages, messages[-500:]
    assert {*os.listdir(d/'full')} <= {'notes.txt', '.lock'}, 'something half-written was left behind'

@pytest.fixture
def world(): return ShapesWorld(n=6, size=32)

def new(world, **kw):
    return build('deeplabv3', tiny_backbone(), vocabulary=world.vocabulary, preset='small',
                 **dict(dict(width=16, seed=0), **kw))
quick = Recipe.tiny().replace(iterations=4, batch_size=2)

def test_cut_checkpoint_is_refused(tmp_path, world):
    finetune(new(world), world, quick.replace(iterations=1), checkpoint_dir=tmp_path)
    whole = (tmp_path/'last.safetensors').read_bytes()
    (tmp_path/'last.safetensors').write_bytes(whole[:len(whole)//2])
    with pytest.raises(OpenTransError, match='not a whole safetensors file'):
        finetune(new(world), world, quick.replace(iterations=1), checkpoint_dir=tmp_path)
    assert len((tmp_path/'last.safetensors').read_bytes()) == len(
        whole)//2, 'a file that could not be read was overwritten'

@pytest.mark.parametrize('change', ['recipe', 'data', 'selection', 'mask', 'framework'])
def test_a_run_of_other_settings_is_refused(tmp_path, world, change):
    mask = SparseMask.random(tiny_backbone().tower, .5, seed=0)
    half = LayerSelection(mask.names[:5], mask.names[5:], 'by hand')
    run = dict(framework=lambda: new(world), data=world, recipe=quick.replace(iterations=1), selection=half,
               mask=mask)
    def go(framework, data, recipe, **kw): return finetune(framework(), data, recipe, checkpoint_dir=tmp_path, **kw)
    go(**run)
    before = (tmp_path/'last.safetensors').read_bytes()
    other = dict(recipe=run['recipe'].replace(lr=.5), data=ShapesWorld(n=7, size=32),
                 selection=LayerSelection(mask.names[:4], mask.names[4:], 'by hand'), mask=None,
                 framework=lambda: new(world, width=24))[change]
    with pytest.raises(OpenTransError, match='had other settings'): go(**dict(run, **{change: other}))
    assert (tmp_path/'last.safetensors').read_bytes() == before

@pytest.mark.parametrize('what', ('text_encoder', 'prompts', 'output_stride'))
def test_a_run_on_other_things_beside_its_weights_is_refused(tmp_path, world, what):
    """The text encoder, the prompts and the stride are in no checkpoint: a run that went on with others would be one of
    two models. A file of an older run says nothing of them, and goes on."""
    def go(clip, data):
        seg = build('deeplabv3', clip, vocabulary=data.vocabulary, preset='small', width=16, seed=0)
        return finetune(seg, data, quick, checkpoint_dir=tmp_path)
    whole = go(tiny_backbone(), world)
    other = ShapesWorld(n=len(world), size=32)
    if what == 'prompts': other.vocabulary = Vocabulary(world.vocabulary.entries, ['a drawing of a {}.'])
    clip = tiny_backbone(seed=what == 'text_encoder')
    if what == 'output_stride': clip = ClipBackbone.create('shapes-rn', output_stride=16)
    path = tmp_path/'last.safetensors'
    before = path.read_bytes()
    with pytest.raises(OtherRun, match=f'{what} was'): go(clip, other)
    assert path.read_bytes() == before
    tensors,meta = load_tensors(path)
    settings = json.loads(meta['settings'])
    del settings[what]
    save_tensors(tensors, path, dict(meta, settings=settings))
    assert go(tiny_backbone(), world).equals(whole)

def test_the_history_beside_a_checkpoint_has_all_its_rows(tmp_path, world, monkeypatch):
    "Killed between the last checkpoint and the history, or in a folder that went away: it is as of an unbroken run."
    def go(folder, **kw): finetune(new(world), world, quick, checkpoint_dir=tmp_path/folder, checkpoint_every=1, **kw)
    def history(folder): return (tmp_path/folder/'history.csv').read_text()
    def lose(framework, row):
        if row['iteration'] == 2: shutil.rmtree(tmp_path/'lost')
    go('whole')
    go('lost', callback=lose)
    assert history('lost') == history('whole')
    def killed(history):
        if len(history.rows) == quick.iterations: raise KeyboardInterrupt
        write(history)
    kind = importlib.import_module('opentrans.training.finetune')._History
    write = kind.write
    with monkeypatch.context() as patch:
        patch.setattr(kind, 'write', killed)
        with pytest.raises(KeyboardInterrupt): go('killed')
    go('killed')
    assert history('killed') == history('whole')

def test_a_run_that_has_ended_can_be_lengthened(tmp_path, world):
    "Four iterations, then four more: bit for bit the run of eight, where the learning rate does not know the end."
    steady = quick.replace(schedule='constant')
    def go(folder, recipe, **kw): return finetune(new(world), world, recipe, checkpoint_dir=tmp_path/folder, **kw)
    go('parts', steady)
    with pytest.raises(OpenTransError, match='iterations was 4, is 8'): go('parts', steady.replace(iterations=8))
    go('parts', steady.replace(iterations=8), lengthen=True)
    go('whole', steady.replace(iterations=8))
    parts,whole = (load_tensors(tmp_path/name/'last.safetensors')[0] for name in ('parts', 'whole'))
    assert parts.keys() == whole.keys()
    for name in parts: assert torch.equal(parts[name], whole[name]), name
    with pytest.raises(OpenTransError, match='iterations was 8, is 4'): go('parts', steady, lengthen=True)

def test_what_is_lengthened_is_the_same_run_that_has_ended(tmp_path, world):
    def stop(framework, row):
        if row['iteration'] == 1: raise ZeroDivisionError
    def go(recipe, **kw): return finetune(new(world), world, recipe, checkpoint_dir=tmp_path, checkpoint_every=1, **kw)
    with pytest.raises(ZeroDivisionError): go(quick, callback=stop)
    longer = quick.replace(iterations=8)
    with pytest.raises(OpenTransError, match='iterations was 4, is 8'): go(longer, lengthen=True)
    go(quick)
    with pytest.raises(OpenTransError, match='lr was'): go(longer.replace(lr=.5), lengthen=True)
    go(Recipe.tiny().shorten(8).replace(batch_size=2, schedule=quick.schedule), lengthen=True)

def test_exploding_run_stops_and_keeps_its_checkpoint(tmp_path, world):
    "A learning rate that blows the weights up: the run ends with a message, and no checkpoint holds a NaN."
    wild = quick.replace(iterations=60, optimizer='sgd', lr=1e18, clip_grad=0., schedule='constant', lr_warmup=0)
    with pytest.raises(OpenTransError, match='not finite'):
        finetune(new(world), world, wild, checkpoint_dir=tmp_path, checkpoint_every=1)
    if (tmp_path/'last.safetensors').exists():
        tensors,_ = load_tensors(tmp_path/'last.safetensors')
        assert all(t.isfinite().all()
                   for k,t in tensors.items() if k.startswith('model.') and t.is_floating_point())

def test_frozen_layers_rest_and_cost_no_memory(world):
    """The optimizer is built after freezing: frozen layers have no state in it and keep every bit, weight decay or
    not."""
    seg = new(world)
    mask = SparseMask.magnitude(seg.tower, .3)
    half = LayerSelection(mask.names[1::2], mask.names[::2], 'every second')
    with half.apply(seg):
        held = {id(p) for g in build_optimizer(seg, quick).param_groups for p in g['params']}
        params = dict(seg.tower.named_parameters())
        assert not held & {id(params[n]) for n in half.freeze} and {id(params[n]) for n in half.train} <= held
    for optimizer in ('sgd', 'adamw'):
        before = {n: params[n].detach().clone() for n in half.freeze}
        finetune(seg, world, quick.replace(iterations=2, optimizer=optimizer, weight_decay=.5), selection=half)
        assert all(torch.equal(params[n], before[n]) for n in half.freeze)

def test_parts_of_a_batch_are_the_batch(world):
    """Gradients summed over parts are those of the whole batch, up to the share of ignored pixels; here none is
    ignored."""
    class Whole(torch.utils.data.Dataset):
        vocabulary = world.vocabulary
        ignore = 255
        name = 'whole'
        def __len__(self): return 4
        def __getitem__(self, i):
            s = world[i]
            return dict(s, labels=s['labels'].where(s['labels'] != 255, 0))
    r = quick.replace(iterations=1, batch_size=4, norm='frozen', flip=0., optimizer='sgd', lr=.01, clip_grad=0.)
    one,two = new(world, loss_stride=1),new(world, loss_stride=1)
    for seg in (one, two): # the head's norms see parts only: hold them still
        for m in seg.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                m.momentum = 0.
                m.train = lambda mode=True, m=m: torch.nn.Module.train(m, False)
    a,b = finetune(one, Whole(), r),finetune(two, Whole(), r.replace(accumulate=4))
    assert a.loss[0] == pytest.approx(b.loss[0], rel=1e-5)
    for (n,p),q in zip(one.state_dict().items(), two.state_dict().values()):
        assert torch.allclose(p.float(), q.float(), atol=1e-5), n

@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), b=st.integers(1, 20), seed=st.integers(0, 5))
def test_every_epoch_has_each_sample_once(n, b, seed):
    seen = [k for i in range(-(-3*n//b)) for k in batch_indices(n, b, i, seed)]
    for e in range(len(seen)//n): assert sorted(seen[e*n:(e+1)*n]) == list(range(n))

def test_evaluation_agrees_with_a_plain_loop(world):
    "The figures are those of a loop over images, classes and pixels."
    seg,val = new(world).eval(),ShapesWorld('val', n=3, size=32)
    r = evaluate(seg, val, batch_size=2)
    pred = [seg.predict(s['image'][None], val.vocabulary)[0] for s in val]
    for k,name in enumerate(val.vocabulary.names):
        both = sum(((p == k) & (s['labels'] == k)).sum().item() for p,s in zip(pred, val))
        either = sum((((p == k) | (s['labels'] == k)) & (s['labels'] != val.ignore)).sum().item()
                     for p,s in zip(pred, val))
        assert r['iou'][name] == pytest.approx(both/either, nan_ok=True) if either else np.isnan(r['iou'][name])
    assert r['groups']['novel'] == pytest.approx(
        np.nanmean([r['iou'][val.vocabulary.names[k]] for k in val.groups['novel']]))

def test_best_weights_are_kept(tmp_path, world):
    h = finetune(new(world), world, quick, checkpoint_dir=tmp_path, val=ShapesWorld('train', n=2, size=32, seed=1),
                 eval_every=1)
    t,meta = load_tensors(tmp_path/'best.safetensors')
    assert float(meta['miou']) == pytest.approx(h.miou.max()) and int(meta['iteration']) == h.miou.idxmax() + 1
    best = load_framework(new(world), tmp_path/'best.safetensors')
    assert evaluate(best, ShapesWorld('train', n=2, size=32, seed=1))['miou'] == pytest.approx(h.miou.max())

# evaluation beside the programs that the field uses

# on more threads, sums fall otherwise where two classes tie
def test_miou_equals_detectron2(tmp_path, world, one_thread):
    "The same predictions and label files through detectron2's SemSegEvaluator."
    evaluation = pytest.importorskip('detectron2.evaluation')
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from PIL import Image
    from opentrans.data import open_dataset
    rng,names = np.random.default_rng(0),'sky,road,car,tree,fence'
    for i in range(5):
        labels = rng.integers(0, 4, (4, 5)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        labels[:, :3] = 255                 # 'fence' is in no picture
        for kind,a in (('images', np.stack([labels*40]*3, -1)), ('labels', labels)):
            (tmp_path/kind).mkdir(exist_ok=True)
            Image.fromarray(a.astype(np.uint8)).save(tmp_path/kind/f'{i}.png')
    data = open_dataset('folder', tmp_path, names=names)
    seg = build('deeplabv3', tiny_backbone(), vocabulary=data.vocabulary, preset='small', width=16, seed=0).eval()
    for over in ('truth', 'either'):
        ours = evaluate(seg, data, batch_size=2, over=over)
        name = f'opentrans_{tmp_path.name}_{over}'
        DatasetCatalog.register(name,
                                lambda: [dict(file_name=str(f.image), sem_seg_file_name=str(f.labels))
                                         for f in data.files])
        MetadataCatalog.get(name).set(stuff_classes=names.split(','), ignore_label=255)
        judge = evaluation.SemSegEvaluator(name, distributed=False)
        judge.reset()
        with torch.no_grad():
            for f,s in zip(data.files, data):
                judge.process([dict(file_name=str(f.image))], [dict(sem_seg=seg(s['image'][None], seg.text())[0])])
        theirs = judge.evaluate()['sem_seg']
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
        if over == 'truth': assert 100*ours['miou'] == pytest.approx(theirs['mIoU']) and 0 < ours['miou'] < 1
        assert 100*ours['pixel_accuracy'] == pytest.approx(theirs['pACC'])
        for n in names.split(',')[:4]: assert 100*ours['iou'][n] == pytest.approx(theirs[f'IoU-{n}'], nan_ok=True)

class Said(torch.nn.Module):
    "A framework that has its answers ready."
    kinds,name = ('semantic', 'panoptic'),'said'
    def __init__(self, answers):
        super().__init__()
        self.answers,self.at = answers,0
        self.weight = torch.nn.Parameter(torch.zeros(1))
    def text(self, words): return torch.zeros(len(words), 4)
    def semantic(self, images, text):
        return torch.stack([a[..., 0].where(a[..., 0] < len(text), 0)
                            for a in self.answers[self.at:self.at+len(images)]])
    def panoptic(self, images, text, isthing=None):
        self.at += len(images)
        return torch.stack(self.answers[self.at-len(images):self.at])

def crowded(s, i):
    "The last thing of a scene becomes a crowd: labelled, but no region."
    at = s['isthing'].nonzero().flatten()
    if not len(at): return s
    keep = torch.arange(len(s['regions'])) != at[-1]
    return dict(s, **{k: s[k][keep] for k in ('regions', 'region_classes', 'isthing')})

def panoptic_case(n=6):
    "Truth with crowds, and answers that are the truth moved aside, with some of it lost and some invented."
    from opentrans.data import View
    from opentrans.training import panoptic_truth
    from opentrans.data import collate
    data = View(ShapesWorld('train', n=n, size=64, seed=4), transform=crowded)
    g,answers = torch.Generator().manual_seed(0),[]
    for s in data:
        m = panoptic_truth(collate([s]), data.ignore)[0].roll((1, 2), (0, 1))
        m[..., 1].clamp_(min=0)
        for k in m[..., 1].unique().tolist():
            if torch.rand((), generator=g) < .25:
                m[m[..., 1] == k] = torch.tensor([int(torch.randint(0, len(data.vocabulary), (), generator=g)),
                                                  40+k])
        m[:12, -12:] = torch.tensor([6, 99])
        answers.append(m)
    return data,answers

def test_pq_equals_panopticapi(tmp_path):
    "Truth and answers on disk in COCO's format, crowds among them, through COCO's own program."
    api = pytest.importorskip('panopticapi.evaluation')
    from PIL import Image
    from panopticapi.utils import id2rgb
    from opentrans.data import write_coco_panoptic
    data,answers = panoptic_case()
    path = write_coco_panoptic(data, tmp_path)
    truth = json.loads(path.read_text())
    assert any(i['iscrowd'] for a in truth['annotations'] for i in a['segments_info'])
    ids,pairs = {c: c+1 for c in range(len(data.vocabulary))},[]
    (tmp_path/'said').mkdir()
    for a,m in zip(truth['annotations'], answers):
        seg = torch.zeros(m.shape[:2], dtype=torch.long)
        info = []
        stuff = {}
        for c,k in m.reshape(-1, 2).unique(dim=0).tolist():
            if c == data.ignore: continue
            known = stuff.setdefault(c, len(info)+1) if c not in data.things else len(info)+1
            seg[(m == torch.tensor([c, k])).all(-1)] = known
            if known == len(info)+1: info.append(dict(id=known, category_id=ids[c]))
        Image.fromarray(id2rgb(seg.numpy())).save(tmp_path/'said'/a['file_name'])
        pairs.append((a, dict(a, segments_info=info)))
    categories = {c['id']: c for c in truth['categories']}
    stat = api.pq_compute_single_core(0, pairs, str(tmp_path/'coco/panoptic_val2017'), str(tmp_path/'said'),
                                      categories)
    ours = evaluate(Said(answers), data, kind='panoptic', batch_size=2)
    for key,isthing in ((None, None), ('things', True), ('stuff', False)):
        theirs,_ = stat.pq_average(categories, isthing=isthing)
        mine = ours[key] if key else ours
        for k in ('pq', 'sq', 'rq'): assert mine[k] == pytest.approx(theirs[k], abs=1e-9), (key, k)
    assert .1 < ours['pq'] < .95

def test_panoptic_evaluation(tmp_path):
    "The truth itself has PQ 1; a crowd is neither found nor missed; data without instances is refused."
    data,answers = panoptic_case(3)
    from opentrans.data import collate
    from opentrans.training import panoptic_truth
    perfect = [panoptic_truth(collate([s]), data.ignore)[0] for s in data]
    assert all((m[..., 1] == -1).any() for m in perfect[:1])
    r = evaluate(Said([m.clone() for m in perfect]), data, kind='panoptic')
    assert r['pq'] == 1 == r['miou'] and r['things']['pq'] == 1 and r['settings']['kind'] == 'panoptic'
    assert evaluate(Said(answers[:3]), data, kind='panoptic', batch_size=1)['pq'] < 1
    with pytest.raises(OpenTransError, match='one look'): evaluate(Said(answers), data, kind='panoptic', flip=True)
    flat = View_without_instances(data)
    with pytest.raises(OpenTransError, match='panoptic=True'): evaluate(Said(answers), flat, kind='panoptic')
    from opentrans.frameworks import list_frameworks
    if 'mask2former' in list_frameworks():
        seg = build('mask2former', tiny_backbone(), vocabulary=data.vocabulary, preset='small', seed=0)
        assert 0 <= evaluate(seg, data, kind='panoptic', limit=1)['pq'] <= 1

def test_panoptic_truth_is_the_readers_map():
    "The map that the reader has and the one that is laid from masks of regions are the same, and so is the score."
    from opentrans.data import collate, panoptic_of, read_sample
    from opentrans.training import panoptic_truth
    world = ShapesWorld('val', n=4, size=48)
    for i in range(4):
        laid = panoptic_truth(collate([world[i]]), world.ignore)[0]
        assert (torch.equal(read_sample(world, i, 'map')['panoptic'], laid)
                and not len(read_sample(world, i, 'map')['regions']))
    packed = dict(world.packed(0))
    packed['isregion'] = packed['isregion'].copy()
    packed['isregion'][1] = False                                                                  # a crowd
    from opentrans.data import unpack
    assert torch.equal(panoptic_of(packed), panoptic_truth(collate([unpack(packed)]), world.ignore)[0])
    seg = build('mask2former', tiny_backbone(), vocabulary=world.vocabulary, preset='small', seed=0)
    # has no packed form: masks of regions are made
    masks = View(world, transform=lambda sample, i: sample)
    assert evaluate(seg, world, kind='panoptic')['pq'] == evaluate(seg, masks, kind='panoptic')['pq']

class View_without_instances:
    instances = False
    def __init__(self, data): self.data = data
    def __len__(self): return len(self.data)
    def __getitem__(self, i): return self.data[i]
    def __getattr__(self, name): return getattr(self.data, name)

# what is told and kept

def test_a_run_is_told_to_tensorboard_and_log(tmp_path, world, capsys):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    h = finetune(new(world), world, quick.replace(iterations=2), checkpoint_dir=tmp_path, tensorboard=True,
                 print_every=2)
    # nothing is left to do, nothing is told twice
    finetune(new(world), world, quick.replace(iterations=2), checkpoint_dir=tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path/'tensorboard'))
    events.Reload()
    assert [(e.step, round(e.value, 4)) for e in events.Scalars('loss')] == [
        (i, round(v, 4)) for i,v in enumerate(h.loss)]
    assert capsys.readouterr().err.count('iteration 2/2') == 1
    with pytest.raises(OpenTransError, match='checkpoint_dir'): finetune(new(world), world, quick, tensorboard=True)

def test_a_log_gets_new_columns(tmp_path, world):
    "The column of the first evaluation comes in the middle of a run: the file stays a table."
    import pandas as pd
    h = finetune(new(world), world, quick, checkpoint_dir=tmp_path, checkpoint_every=1,
                 val=ShapesWorld('train', n=1, size=32), eval_every=3)
    t = pd.read_csv(tmp_path/'history.csv')
    assert list(t) == list(h) and t.miou.notna().tolist() == [False, False, True, True]

def test_unreadable_picture_in_a_run(tmp_path):
    """A picture that cannot be read ends the run with its name, and the checkpoint of before is whole; skipped, the
    run goes on."""
    from PIL import Image
    from opentrans.data import open_dataset
    for i in range(6):
        for kind,a in (('images', np.full((32, 32, 3), 40*i, np.uint8)),
                       ('labels', np.full((32, 32), i%2, np.uint8))):
            (tmp_path/kind).mkdir(exist_ok=True)
            Image.fromarray(a).save(tmp_path/kind/f'{i}.png')
    data = open_dataset('folder', tmp_path, names='sky,road')
    bad = batch_indices(6, 2, 2)[0]
    (tmp_path/'images'/f'{bad}.png').write_bytes(b'')
    def make(data):
        return build('deeplabv3', tiny_backbone(), vocabulary=data.vocabulary, preset='small', width=16, seed=0)
    with pytest.raises(OpenTransError, match=f'{bad}.png'):
        finetune(make(data), data, quick, checkpoint_dir=tmp_path/'run', checkpoint_every=1)
    assert json.loads(load_tensors(tmp_path/'run'/'last.safetensors')[1]['iteration']) == 2
    with pytest.warns(UserWarning, match='1 of 6'):
        rest = open_dataset('folder', tmp_path, names='sky,road', corrupt='skip')
    assert len(finetune(make(rest), rest, quick)) == 4

RECIPES = [('deeplabv3', 'paper'), ('mask2former', 'paper'), ('fcclip', 'paper'), ('faseg', 'paper'),
           ('deeplabv3', 'released'), ('mask2former', 'released')]

@pytest.mark.parametrize('name,source', RECIPES)
def test_the_loss_falls_by_every_recipe_that_is_offered_by_name(name, source, one_thread):
    "A recipe that joins one source's optimizer with another's clipping trains nothing, and no setting shows it."
    world = ShapesWorld('train', n=16, size=80)
    clip = ClipBackbone.create('shapes-rn', pretrained='shapes-rn', output_stride=16)
    framework = build(name, clip, vocabulary=world.vocabulary, preset='small')
    recipe = getattr(Recipe, source)(name).shorten(16).replace(crop=0, scale=(1., 1.), batch_size=4)
    loss = finetune(framework, world, recipe).loss
    assert loss[-4:].mean() < .9*loss[:4].mean()

# files that were damaged or forged, and two runs in one folder

@functools.cache
def backbone(): return tiny_backbone(width=4)

def small(seed=0):
    return build('deeplabv3', backbone().fresh_copy(), vocabulary=['red', 'sand'], preset='small', width=8,
                 low_level=4, seed=seed)

@functools.cache
def _first(seed):
    seg = small(seed)
    return seg, {name: tensor.clone() for name,tensor in seg.state_dict().items()}

def again(seed=0):
    "What `small` gives, made once: always the same framework, with its first weights."
    seg, weights = _first(seed)
    seg.load_state_dict(weights)
    return seg

def trained(scaler=None):
    "A framework and its optimizer after one step."
    seg = small()
    opt = build_optimizer(seg, quick)
    batch = dict(images=torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
                 labels=torch.zeros(2, 32, 32, dtype=torch.long))
    sum(seg.loss(batch).values()).backward()
    opt.step()
    return seg, opt

class Two:
    "As much of a data set as `run_settings` looks at."
    name,vocabulary = 'two',['red', 'sand']
    def __len__(self): return 4

@pytest.fixture
def checkpoint(tmp_path):
    "A checkpoint of a run after one step, with a gradient scaler."
    seg, opt = trained()
    made = Checkpoint(tmp_path, run_settings(small(), Two(), quick))
    made.save(seg, opt, 1, [dict(iteration=0, loss=2.5, ce=2.5)], ['iteration', 'loss', 'ce', 'miou'],
              torch.amp.GradScaler('cpu', init_scale=1024.))
    return made

def load_into(checkpoint, target, path):
    "What `load` gives of another file in the checkpoint's place."
    checkpoint.file.path = Path(path)
    seg, opt, scaler = target
    return checkpoint.load(seg, opt, scaler), target

def blank(seed=5):
    seg = again(seed)
    return seg, build_optimizer(seg, quick), torch.amp.GradScaler('cpu', init_scale=2.)

def everything(target): return digest(target[0], target[1], target[2].state_dict())

def test_a_damaged_checkpoint_changes_nothing(checkpoint):
    """Flipped bits, forged contents with a right checksum: refused before a weight, a moment or the scaler has
    moved."""
    good, path = checkpoint.path, checkpoint.path
    told = check_reader(good, lambda target, path: load_into(checkpoint, target, path), blank, everything,
                        same=lambda result: (result[0], everything(result[1])))
    assert told['refused'] > told['accepted']
    (iteration, rows), target = load_into(checkpoint, blank(), path)
    assert iteration == 1 and rows == [dict(iteration=0, loss=2.5, ce=2.5)] and target[2].get_scale() == 1024

def forged(checkpoint):
    "Name -> tensors and texts of a checkpoint that no run writes."
    tensors, meta = load_tensors(checkpoint.path)
    moment = next(k for k in tensors if k.endswith('.exp_avg_sq'))
    step = moment.replace('.exp_avg_sq', '.step')
    def change(**more): return {**tensors, **{k.replace('__', '.'): v for k,v in more.items()}}
    nan, bias = float('nan'), tensors['model.proj.bias']
    return dict(nan_weights=(change(model__proj__bias=bias*nan), meta),
                int8_weights=(change(model__proj__bias=bias.to(torch.int8)), meta),
                infinite_moment=({**tensors, moment: tensors[moment]/0}, meta),
                negative_moment=({**tensors, moment: tensors[moment]-1}, meta),
                late_step=({**tensors, step: torch.tensor(7.)}, meta),
                no_state=({k: t for k,t in tensors.items() if not k.startswith('optimizer.')}, meta),
                no_state_told=({k: t for k,t in tensors.items() if not k.startswith('optimizer.')},
                               dict(meta, optimizer='[]')),
                one_moment_gone=({k: t for k,t in tensors.items() if k != moment}, meta),
                far=(tensors, dict(meta, iteration='1000000000')), beyond=(tensors, dict(meta, iteration='5')),
                negative=(tensors, dict(meta, iteration='-1')), half=(tensors, dict(meta, iteration='0.5')),
                true=(tensors, dict(meta, iteration='true')),
                short_history=(change(history=tensors['history'][:0]), meta),
                wide_history=(change(history=tensors['history'][:, :2]), meta),
                flat_history=(change(history=tensors['history'].flatten()), meta),
                float_history=(change(history=tensors['history'].view(torch.float64)), meta),
                no_history=({k: t for k,t in tensors.items() if k != 'history'}, meta),
                no_loss=(tensors, dict(meta, columns='["iteration", "x", "ce", "miou"]')),
                twice=(tensors, dict(meta, columns='["iteration", "loss", "loss", "miou"]')),
                scaler_gone=(tensors, dict(meta, scaler='{}')),
                scaler_nan=(tensors, dict(meta, scaler=meta['scaler'].replace('1024.0', 'NaN'))),
                scaler_zero=(tensors, dict(meta, scaler=meta['scaler'].replace('1024.0', '0.0'))),
                scaler_text=(tensors, dict(meta, scaler=meta['scaler'].replace('1024.0', '"x"'))),
                more=({**tensors, 'more': bias}, meta),
                a_layer_gone=({k: t for k,t in tensors.items() if k != 'model.proj.bias'}, meta),
                newer=(tensors, dict(meta, version='9')), other=(tensors, dict(meta, format='opentrans-mask')))

def test_forged_checkpoints_are_refused_in_a_sentence(checkpoint, tmp_path):
    for name,(tensors, meta) in forged(checkpoint).items():
        save_tensors(tensors, tmp_path/'forged.safetensors', meta)
        target = blank()
        before = everything(target)
        with pytest.raises(OpenTransError):
            load_into(checkpoint, target, tmp_path/'forged.safetensors')
            pytest.fail(f'{name} was read')
        assert everything(target) == before, f'{name} was refused, and applied in part'

def test_a_seed_of_any_size_is_resumed(tmp_path):
    "JSON readers hold no whole number of 20 digits, but the settings of a run do."
    world = ShapesWorld(n=4, size=32)
    recipe = quick.replace(iterations=1, seed=2**80+1)
    first = finetune(new(world), world, recipe, checkpoint_dir=tmp_path)
    assert finetune(new(world), world, recipe, checkpoint_dir=tmp_path).equals(first)
    with pytest.raises(OtherRun, match='recipe.seed'):
        finetune(new(world), world, recipe.replace(seed=2**80+2), checkpoint_dir=tmp_path)

def test_weights_of_the_first_edition_load(tmp_path):
    "Models and checkpoints of 0.1 have no checksum: their weights are read, and a run is not resumed from them."
    from safetensors.torch import save_file
    seg = small(3)
    save_file(seg.state_dict(), tmp_path/'model.safetensors')
    save_file({f'model.{k}': t for k,t in seg.state_dict().items()}, tmp_path/'last.safetensors',
              dict(iteration='1', columns='[]', settings='{}', scaler='{}'))
    torch.save(dict(state_dict=seg.state_dict()), tmp_path/'model.pth')
    for name in ('model.safetensors', 'last.safetensors', 'model.pth'):
        assert digest(load_framework(small(), tmp_path/name)) == digest(seg), name
    with pytest.raises(FormatError, match='opentrans 0.1'): Checkpoint(tmp_path, {}).load(small(), None)

@pytest.mark.parametrize('name', ['best.safetensors', 'model.pth'])
def test_damaged_weights_change_nothing(tmp_path, name):
    seg, good = small(3), tmp_path/name
    if good.suffix == '.pth': torch.save(seg.state_dict(), good)
    else:
        save_tensors({f'model.{k}': t for k,t in seg.state_dict().items()}, good, dict(iteration=3, miou=.5),
                     WEIGHTS_FILE)
    check_reader(good, load_framework, again, digest, same=digest if good.suffix != '.pth' else None)

def test_a_damaged_selection_is_refused_or_read(tmp_path):
    LayerSelection(['a', 'b'], ['c'], 'by hand').to_json(tmp_path/'selection.json')
    check_reader(tmp_path/'selection.json', lambda target, path: LayerSelection.from_json(path))

def test_a_damaged_result_is_refused_or_compared(tmp_path):
    seg, world = small(), ShapesWorld(n=2, size=32)
    seg.vocabulary = world.vocabulary
    result = dict(evaluate(seg, world), params=3, active_params=2.5, macs=9, active_macs=8., frozen=['a'],
                  density=.5)
    save_json(result, tmp_path/'result.json')
    def read(target, path): return compare_runs([path]).to_markdown()
    check_reader(tmp_path/'result.json', read)

@pytest.mark.parametrize('suffix', ['.json', '.yaml'])
def test_damaged_settings_are_refused_or_a_recipe(tmp_path, suffix):
    good = tmp_path/f'recipe{suffix}'
    told = dict(preset='tiny', lr='1e-3', milestones=[3, 4], batch_size=4, schedule='step', channels_last=False,
                flip=.5)
    if suffix == '.json': save_json(told, good)
    else: good.write_text('\n'.join(f'{k}: {json.dumps(v)}' for k,v in told.items()))
    check_reader(good, lambda target, path: Recipe.of(read_settings(path)))

anything = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
                        max_leaves=5)

@settings(max_examples=300, deadline=None)
@given(values=st.dictionaries(st.sampled_from([*Recipe().to_dict(), 'preset', 'framework']),
                              anything | st.sampled_from(['tiny', 'paper', 'fpn', '1e3', '0.5', 'true', '3,4']),
                              max_size=3))
def test_any_values_make_a_recipe_or_a_sentence(values):
    try: recipe = Recipe.of(values)
    except OpenTransError as error: assert len(str(error)) < 1000
    else: assert all(0 <= recipe.lr_at(i) < float('inf') for i in (0, 1, recipe.iterations))

HOLD = textwrap.dedent('''
    import signal, sys
    import torch
    from opentrans.data import ShapesWorld
    from opentrans.frameworks import build
    from opentrans.frameworks.contract import tiny_backbone
    from opentrans.training import Recipe, finetune

    folder, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))     # as in the test: sums in another order are other sums

    def wait(framework, row):
        if row['iteration'] != 1: return
        print('at work', flush=True)
        signal.pause()

    world = ShapesWorld(n=6, size=32)
    seg = build('deeplabv3', tiny_backbone(), vocabulary=world.vocabulary, preset='small', width=16, seed=0)
    recipe = Recipe.tiny().replace(iterations=4, batch_size=2)
    finetune(seg, world, recipe, checkpoint_dir=folder, checkpoint_every=1, callback=wait)
''')

def test_a_folder_is_free_when_its_run_is_dead(tmp_path, tmp_path_factory, world):
    """While a process trains in a folder another is refused; after kill -9 what it left half-written is swept, and
    the run goes on."""
    whole = finetune(new(world), world, quick)
    holder = Forked(['-W', 'ignore', '-c', HOLD, tmp_path, torch.get_num_threads()], dict(os.environ), tmp_path,
                    tmp_path_factory.mktemp('said'))
    try:
        until(lambda: holder.out.read_text() == 'at work\n' or holder.poll() is not None, 'it does not train')
        with pytest.raises(OtherRun, match='Another run is at work'):
            finetune(new(world), world, quick, checkpoint_dir=tmp_path)
    finally:
        holder.kill()
        holder.wait()
    (tmp_path/'.last-0123abcd.part.safetensors').write_bytes(b'half')
    told = []
    again = finetune(new(world), world, quick, checkpoint_dir=tmp_path,
                     callback=lambda framework, row: told.append(row['iteration']))
    assert told == [2, 3] and np.allclose(again.loss, whole.loss) and not list(tmp_path.glob('.last-*'))

@pytest.mark.parametrize('what', ['weight', 'running_mean', 'running_var'])
@pytest.mark.parametrize('value', ['nan', 'inf'])
def test_a_model_that_is_not_finite_gets_no_score(world, what, value):
    "Weights, and what batch norms have seen: a variance of infinity would silence a channel without a NaN."
    seg = new(world)
    with torch.no_grad(): getattr(seg.decoder.low[1], what)[0] = float(value)
    with pytest.raises(OpenTransError, match='not finite'): evaluate(seg, world)

def test_a_poisoned_picture_gets_no_score(world):
    "Weights are finite, a picture is not: the message names it."
    class Poisoned(torch.utils.data.Dataset):
        vocabulary = world.vocabulary
        ignore = 255
        name = 'poisoned'
        def __len__(self): return 3
        def __getitem__(self, i):
            return dict(world[i], image=world[i]['image']*(float('nan') if i == 2 else 1), id=f'picture {i}')
    with pytest.raises(OpenTransError, match='picture 2'): evaluate(new(world), Poisoned(), batch_size=1)
    assert evaluate(new(world), Poisoned(), limit=2)['n_images'] == 2

def test_names_are_drawn_as_they_are_called():
    "Neither a formula nor a name that begins with _ is lost in the plot of runs."
    runs = {name: dict(miou=.1*i, active_macs=1e6*(i+1), active_params=2e6*(i+1), settings=dict(framework=name))
            for i,name in enumerate(('$x_{$', '_hidden', 'a<b>'))}
    axis = plot_runs(compare_runs(runs))
    axis.figure.canvas.draw()
    assert len(axis.get_legend_handles_labels()[1]) == 3

def test_runs_of_one_name_are_told_apart(tmp_path):
    "Folders of one name by their paths; results that are no file stay numbers."
    result = dict(miou=.5)
    folders = [tmp_path/parent/'run' for parent in 'ab']
    for folder in folders: save_json(result, folder/'result.json')
    table = compare_runs([result, result, *folders])
    assert list(table.index) == ['run 0', 'run 1', *map(str, folders)]

def test_scales_may_be_a_tensor():
    world = ShapesWorld('val', n=2, size=32)
    seg = new(world)
    listed = evaluate(seg, world, scales=(.5, 1.))
    assert evaluate(seg, world, scales=torch.tensor([.5, 1.]))['iou'] == pytest.approx(listed['iou'], nan_ok=True)

class ManySizes(ShapesWorld):
    "Scenes of three sizes, as a photographer's folder holds them."
    def packed(self, i):
        return ShapesWorld(self.split, n=self.n, size=((48, 64), (64, 48), (56, 56))[i*7 % 3],
                           seed=self.seed).packed(i)

def test_size_of_batches_and_readers_do_not_enter_a_result():
    """Images that wait for others of their size, read in this process or another, with norms that have seen
    training: the same sums, class by class."""
    scenes = ManySizes('val', n=14)
    seg = build('deeplabv3', tiny_backbone(), vocabulary=scenes.vocabulary, preset='small', width=16, seed=0)
    finetune(seg, ShapesWorld('val', n=14, size=48), quick)
    alone = evaluate(seg, scenes, batch_size=1)
    for how in (dict(batch_size=8), dict(batch_size=3), dict(batch_size=8, workers=2)):
        found = evaluate(seg, scenes, **how)
        assert {k: v for k,v in found['iou'].items() if v == v} == {
            k: v for k,v in alone['iou'].items() if v == v}, how
    full = [len(batch['ids']) for batch in same_size_batches(scenes, 4, waiting=64)]
    assert len(full) < len([*same_size_batches(scenes, 4)]) and sum(full) == 14

def test_few_wait_where_images_are_large(monkeypatch):
    "What waits is bounded in pixels, too."
    module = importlib.import_module('opentrans.training.evaluate')
    scenes = ManySizes('val', n=9)
    monkeypatch.setattr(module, '_HELD', 3*56*56)
    held = [len(batch['ids']) for batch in same_size_batches(scenes, 8, waiting=64)]
    assert max(held) <= 3 and sum(held) == 9

def test_mean_iou_reads_no_region_masks(monkeypatch):
    """Masks of regions are made for panoptic quality alone; a data set or subclass that reads in its own way is
    asked in that way."""
    made = []
    for name in ('samples', 'shapes'):
        module = importlib.import_module(f'opentrans.data.{name}')
        whole = module.unpack
        monkeypatch.setattr(module, 'unpack',
                            lambda packed, regions=True, whole=whole: made.append(regions)
                            or whole(packed, regions))
    world = ShapesWorld('val', n=3, size=32)
    seg = build('mask2former', tiny_backbone(), vocabulary=world.vocabulary, preset='small', seed=0)
    evaluate(seg, View(world, [2, 0]))
    assert made == [False, False]
    evaluate(seg, world, limit=1, kind='panoptic')
    assert made[2:] == [False]                 # its truth is one map of segments, straight from the reader
    class Dark(ShapesWorld):
        def __getitem__(self, i): return dict(super().__getitem__(i), image=super().__getitem__(i)['image']*0)
    dark = read_sample(Dark('val', n=1, size=32), 0, regions=False)
    assert not dark['image'].any() and len(dark['regions']) == 0 and torch.equal(dark['labels'], world[0]['labels'])

class Torn(ShapesWorld):
    def packed(self, i):
        if i == 2: raise OpenTransError("The picture 'b.jpg' is torn.")
        return super().packed(i)

def test_what_a_reader_cannot_read_is_one_sentence():
    "The sentence of an error in another process is the sentence here."
    world = Torn('val', n=4, size=32)
    with pytest.raises(OpenTransError, match="^The picture 'b.jpg' is torn.$"):
        evaluate(new(world), world, workers=1)

def test_sizes_of_the_evaluation_are_detectron2s():
    "Short side 800, long side at most 1333, rounded as the released code's reader rounds."
    transforms = pytest.importorskip('detectron2.data.transforms')
    rng = random.Random(0)
    for _ in range(300):
        height = rng.randint(20, 3000)
        width = rng.randint(20, 3000)
        size = rng.choice((512, 640, 800, 1024))
        longest = rng.choice((800, 1333, 2560))
        assert seen_size(height, width, size, longest) == transforms.ResizeShortestEdge.get_output_shape(
            height, width, size, longest)

def test_the_mean_over_the_truth_is_detectron2s():
    "A class that is only predicted counts as 0 in one mean, and does not count in the other."
    world = ShapesWorld('val', n=2, size=32)
    seg = new(world)
    either,truth = (evaluate(seg, world, over=over) for over in ('either', 'truth'))
    seen = {int(c) for i in range(2) for c in world[i]['labels'].unique() if c != world.ignore}
    of_truth = [v for k,v in enumerate(either['iou'].values()) if k in seen]
    assert abs(truth['miou']-sum(of_truth)/len(of_truth)) < 1e-9 and truth['miou'] >= either['miou']
    assert truth['settings']['over'] == 'truth'

def test_panoptic_quality_at_another_size():
    """Masks are resized to the size of the truth before segments are chosen; at the images' own size nothing
    changes."""
    world = ShapesWorld('val', n=2, size=64)
    seg = build('mask2former', tiny_backbone(), vocabulary=world.vocabulary, preset='small', seed=0, score=0.)
    plain,same,larger = (evaluate(seg, world, kind='panoptic', **how)
                         for how in ({}, dict(size=64, longest=90), dict(size=96, longest=96)))
    assert plain['pq'] == same['pq'] and larger['settings']['size'] == 96 and larger['sq'] == larger['sq']
    with pytest.raises(OpenTransError, match='leave out flip'): evaluate(seg, world, kind='panoptic', flip=True)
