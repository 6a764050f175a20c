"Distillation inside Algorithm 1: `imp` with `DistillTrainer`, from the first round to a continued run."
import contextlib, copy, json, shutil, warnings
import numpy as np
import pytest
import torch
from opentrans.clip import ClipBackbone, small_clip
from opentrans.errors import OpenTransError
from opentrans.files import load_metadata, load_tensors, save_tensors
from opentrans.distill import DistillTrainer, distances, FeatureTrainer, tgkd_loss, vgkd_loss
from opentrans.pruning import SparseMask, imp

CONFIG = dict(embed_dim=32, vision_cfg=dict(layers=[1, 1, 1, 1], width=8, head_width=32, image_size=64),
              text_cfg=dict(context_length=12, width=32, heads=2, layers=1),
              tokens=['a</w>', 'photo</w>', 'of</w>', '.</w>', 'left</w>', 'right</w>', 'top</w>'])

class Halves(torch.utils.data.Dataset):
    "Samples in memory: two regions each, of two of three names."
    vocabulary = ['left', 'right', 'top']
    name = 'halves'
    ignore = 255
    groups = {}
    def __init__(self, n=6):
        g = torch.Generator().manual_seed(0)
        self.images = torch.rand(n, 3, 64, 96, generator=g)
    def __len__(self): return len(self.images)
    def __getitem__(self, i):
        m = torch.zeros(2, 64, 96, dtype=torch.bool)
        m[0,:,:40], m[1,:,40:] = True, True
        c = torch.tensor([0, 1] if i % 2 else [2, 1])
        return dict(image=self.images[i], labels=c[m.int().argmax(0)], regions=m, region_classes=c,
                    isthing=torch.ones(2).bool(), id=str(i))

def tiny_clip(width=8):
    config = dict(CONFIG, vision_cfg=dict(CONFIG['vision_cfg'], width=width))
    return ClipBackbone.from_model(*small_clip(config, seed=0), 'tiny')

@pytest.fixture
def clip(): return tiny_clip()

def trainer(clip, **kwargs):
    return DistillTrainer(clip, Halves(), **{**dict(iterations=3, lr=1e-3, batch_size=3), **kwargs})

def test_imp_with_distillation(clip):
    start = copy.deepcopy(clip.state_dict())
    train = trainer(clip)
    mask,history = imp(clip, train, density=.3, p=.3)
    assert (abs(mask.density-.3) < 5e-4
            and list(history.loss) == pytest.approx([history.loss[i] for i in range(len(history))])
            and history.loss.notna().all())
    assert not any('attnpool' in n or n == 'conv1.weight'
                   for n in mask.names), 'the attention pool and the first convolution stay dense'
    for n in mask.names: assert (clip.visual.get_parameter(n)[~mask[n]] == 0).all()
    assert all(torch.equal(v, start[k])
               for k,v in train.teacher.state_dict().items()), 'the teacher must stay the dense CLIP'
    assert mask != SparseMask.magnitude(clip.fresh_copy(), .3), 'training between prunings must matter'
    assert len(train.log) == len(history)*3 and [r['round'] for r in train.log[::3]] == list(range(len(history)))
    fresh = clip.fresh_copy()
    with mask.apply(fresh):
        assert all(torch.equal(v, start[k])
                   for k,v in fresh.state_dict().items() if k.removeprefix('visual.') not in mask.names)

def test_a_continued_run_is_the_run(clip, tmp_path):
    whole,_ = imp(clip.fresh_copy(), trainer(clip), density=.4, p=.3, checkpoint_dir=tmp_path/'whole')
    def stops(model, round):
        if round == 1: raise KeyboardInterrupt
        return train(model, round)
    train = trainer(clip)
    stops.settings = train.settings
    stops.state_dict = train.state_dict
    stops.load_state_dict = train.load_state_dict
    with pytest.raises(KeyboardInterrupt):
        imp(clip.fresh_copy(), stops, density=.4, p=.3, checkpoint_dir=tmp_path/'cut')
    again,_ = imp(clip.fresh_copy(), trainer(clip), density=.4, p=.3, checkpoint_dir=tmp_path/'cut')
    assert again == whole
    with pytest.raises(OpenTransError, match='lr was 0.001, is 0.1'):
        imp(clip.fresh_copy(), trainer(clip, lr=.1), density=.4, p=.3, checkpoint_dir=tmp_path/'cut')

def test_seed_of_imp_decides_the_order(clip):
    a,b,c = (imp(clip.fresh_copy(), trainer(clip), density=.5, p=.5, seed=s)[1].loss.tolist() for s in (0, 0, 1))
    assert a == b and a != c

@pytest.mark.parametrize('loss', ['released', lambda v, r, t: (v @ r.T).mean()])
def test_losses_get_what_they_can_multiply_in_mixed_precision(clip, loss):
    got = trainer(clip, loss=loss, iterations=1, precision='bf16')(clip.fresh_copy())
    assert got['loss'] == pytest.approx(trainer(clip, loss=loss, iterations=1)(clip.fresh_copy())['loss'], abs=.3)

def test_losses_without_training_change_nothing(clip):
    "Batch norms of a model in training mode, too, and gradients are there whatever mode torch is in."
    images = [torch.rand(2, 3, 64, 64)]
    for train in (trainer(clip), FeatureTrainer(clip, images)):
        wanted = next(train.losses(clip, 1)).item()
        model = clip.fresh_copy().train()
        before = copy.deepcopy(model.state_dict())
        with torch.no_grad(): loss = next(train.losses(model, 1))
        assert loss.item() == wanted and loss.requires_grad
        assert all(module.training for module in model.modules())
        for name,value in model.state_dict().items(): assert value.equal(before[name]), name

@pytest.mark.parametrize('freeze, why', [(('layer1', 'nosuch'), "'nosuch'"), (('',), 'No parameter is left')])
def test_what_cannot_be_frozen_freezes_nothing(clip, freeze, why):
    with pytest.raises(OpenTransError, match=why): trainer(clip, freeze=freeze)(clip)
    assert all(param.requires_grad for param in clip.parameters())

def test_settings_take_numbers_of_numpy_and_no_negative_norm(clip):
    assert trainer(clip, seed=np.int64(2)).settings == trainer(clip, seed=2).settings
    for clip_grad in (-1., float('nan'), 'x'):
        with pytest.raises(OpenTransError, match='clip_grad'): FeatureTrainer(clip, [], clip_grad=clip_grad)

def test_class_labels_are_not_a_target(clip):
    """Only names that are in the regions enter: permuting the label map changes nothing, permuting names of equal
    text neither."""
    class Other(Halves):
        def __getitem__(self, i):
            return {k: v for k,v in super().__getitem__(i).items() if k in ('image', 'regions', 'region_classes')}
    runs = []
    for data in (Halves(), Other()):
        model = clip.fresh_copy()
        runs.append(DistillTrainer(clip, data, iterations=2, lr=1e-3, batch_size=3, seed=0)(model)['loss'])
    assert runs[0] == runs[1]
    assert DistillTrainer(clip, Halves(), loss='vgkd', iterations=2, lr=1e-3, batch_size=3,
                          seed=0)(clip.fresh_copy())['loss'] > 0

def test_workers_give_the_same_run(clip):
    a,b = (trainer(clip, seed=0, workers=w)(clip.fresh_copy())['loss'] for w in (0, 2))
    assert a == pytest.approx(b, rel=1e-5)

def test_masked_training_keeps_zeros_and_settings(clip):
    mask = SparseMask.magnitude(clip, .2)
    clip.visual.conv1.weight.requires_grad_(False)
    before = clip.visual.conv1.weight.clone()
    with mask.apply(clip): trainer(clip, weight_decay=.1)(clip)
    assert all((clip.visual.get_parameter(n)[~mask[n]] == 0).all() for n in mask.names)
    assert (torch.equal(clip.visual.conv1.weight, before) and not clip.visual.conv1.weight.requires_grad
            and not clip.training)

def test_full_size_rn50_distils():
    clip = ClipBackbone.create('RN50', seed=0)
    out = DistillTrainer(clip, Halves(2), iterations=1, batch_size=1, lr=1e-4)(clip)
    assert out['loss'] > 0 and not clip.training

@pytest.mark.parametrize('n', [1, 2, 30])
def test_losses_of_few_and_many(n):
    v,r,t = (torch.nn.functional.normalize(torch.randn(n, 16), dim=1) for _ in range(3))
    v.requires_grad_()
    if n == 1:
        assert tgkd_loss(v, r, t).item() == pytest.approx((v-r).norm().item(),
                                                          rel=1e-5) == pytest.approx(
            vgkd_loss(v, r).item(), rel=1e-5)
    (tgkd_loss(v, r, t)+vgkd_loss(v, r)).backward()
    assert v.grad.isfinite().all() and distances(r, r).diag().abs().max() == 0

def test_a_trainer_that_is_cold_in_a_later_round_says_so(clip):
    "A function around it, without its state_dict, would hide from imp what has to be stored."
    train = trainer(clip)
    with pytest.warns(UserWarning, match='without what it remembered'): train(clip.fresh_copy(), 1)
    fresh = trainer(clip)
    fresh.load_state_dict(train.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fresh(clip.fresh_copy(), 2)

def changed(**parts): return lambda state: dict(state, **{k: change(state[k]) for k, change in parts.items()})

STATES = {
    'nothing': lambda state: {},
    'a part that is missing': lambda state: {k: t for k, t in state.items() if k != 'log'},
    'a part that is unknown': lambda state: dict(state, more=torch.zeros(1)),
    'fewer embeddings than keys': changed(embeddings=lambda t: t[1:]),
    'embeddings of another teacher': changed(embeddings=lambda t: t[:, :-1]),
    'embeddings of another type': changed(embeddings=lambda t: t.half()),
    'embeddings that are NaN': changed(embeddings=lambda t: t*float('nan')),
    'images that are not there': changed(keys=lambda t: t + 100),
    'images below zero': changed(keys=lambda t: t - 100),
    'one region twice': changed(keys=lambda t: t*0),
    'keys that are no whole numbers': changed(keys=lambda t: t.float()),
    'a log of another shape': changed(log=lambda t: t[:, :2]),
    'a log that is infinite': changed(log=lambda t: t/0)}

@pytest.mark.parametrize('what', STATES)
def test_what_a_trainer_did_not_remember_is_refused(clip, what):
    "With nothing changed: it goes on as if it had not been asked."
    train, asked = trainer(clip, seed=0), trainer(clip, seed=0)
    first = train(clip.fresh_copy(), 0)
    with pytest.raises(OpenTransError, match='remembered'): asked.load_state_dict(STATES[what](train.state_dict()))
    assert not asked._cache and not asked.log and asked(clip.fresh_copy(), 0) == first

def test_a_teacher_of_other_weights_is_another_run(clip, tmp_path):
    "So are other names of the classes, and another size of the memory, which decides over the last bits."
    class Others(Halves): vocabulary = ['left', 'right', 'middle']
    imp(clip.fresh_copy(), trainer(clip), density=.5, p=.5, checkpoint_dir=tmp_path)
    model, tok = small_clip(CONFIG, seed=1)
    other = ClipBackbone.from_model(model, tok, 'tiny')
    for name, train in dict(teacher=trainer(clip, teacher=other),
                            names=DistillTrainer(clip, Others(), iterations=3, lr=1e-3, batch_size=3),
                            cache_mb=trainer(clip, cache_mb=1)).items():
        with pytest.raises(OpenTransError, match=f'other settings: {name} was'):
            imp(clip.fresh_copy(), train, density=.5, p=.5, checkpoint_dir=tmp_path)

def test_a_model_that_diverges_in_its_last_iteration_is_told(clip):
    "The loss of the last iteration is a number, the weights after it are not."
    class Breaks(torch.optim.SGD):
        def step(self, closure=None):
            with torch.no_grad():
                for p in self.param_groups[0]['params']: p.fill_(float('nan'))
    train = trainer(clip, iterations=1, optimizer=lambda params: Breaks(params, lr=.1))
    with pytest.raises(OpenTransError, match='not finite .the model after round 0'): train(clip.fresh_copy(), 0)

def test_a_teacher_that_is_not_finite_is_refused(clip):
    bad = clip.fresh_copy()
    with torch.no_grad(): bad.visual.conv1.weight.fill_(float('nan'))
    with pytest.raises(OpenTransError, match='the teacher'): trainer(clip, teacher=bad)

@pytest.mark.parametrize('name,options',
                         [('mask2former',
                           dict(hidden=32, mask_dim=32, queries=8, pixel_layers=1, layers=2, heads=4, pixel_ffn=32,
                                ffn=32, points=64)), ('deeplabv3', dict(width=32, dilations=(1, 2)))])
def test_algorithm_1_as_released(clip, name, options, tmp_path):
    """The framework's kd term alone finds a mask of the tower; the head that other terms would train moves only
    where kd needs it, and the run goes on after a break."""
    from opentrans.frameworks import build
    def made():
        return build(name, clip.fresh_copy(), vocabulary=['left', 'right', 'top'], preset='released', seed=0,
                     **options)
    def released(seg): return DistillTrainer.released(seg, Halves(), iterations=3, batch_size=2, lr=1e-3, crop=None)
    with pytest.warns(UserWarning,
                      match='grounding loss is left out') if name == 'mask2former' else contextlib.nullcontext():
        train = released(seg := made())
    start = copy.deepcopy(seg.state_dict())
    mask,history = imp(seg, train, density=.6, p=.3, checkpoint_dir=tmp_path, checkpoint_every=1)
    moved = {n for n,t in seg.state_dict().items() if not torch.equal(t, start[n])}
    assert (abs(mask.density-.6) < 5e-4 and history.loss.notna().all()
            and all(n.startswith(('conv', 'layer', 'downsample')) for n in mask.names))
    assert (any(n.startswith('backbone.') for n in moved)
            and not {'nothing', 'log_scale'} & moved), 'the class loss has trained'
    assert not list(tmp_path.glob('teacher-*')), 'a framework teaches itself; the trainer has no teacher to keep'

def test_a_framework_goes_on_within_a_round(clip, tmp_path):
    """Losses that draw random points, and a head that learns: the states of generators and optimizer are those of
    the unbroken run."""
    from opentrans.frameworks import build
    def run(folder, stop=None):
        seg = build('mask2former', clip.fresh_copy(), vocabulary=['left', 'right', 'top'], preset='small', seed=0)
        train = DistillTrainer(seg, Halves(), iterations=4, batch_size=2, lr=1e-3, segmentation=1.)
        save, saved = train._save_within, []
        def stops(*args):
            save(*args)
            saved.append(1)
            if len(saved) == stop: raise KeyboardInterrupt
        train._save_within = stops
        return seg, imp(seg, train, density=.6, p=.3, checkpoint_dir=folder, checkpoint_every=1)[0]
    whole,mask = run(tmp_path/'whole')
    for stop in (2, 4):
        with pytest.raises(KeyboardInterrupt): run(tmp_path/'cut', stop)
        assert (tmp_path/'cut'/'round.safetensors').exists()
    cut,other = run(tmp_path/'cut')
    assert mask == other and all(torch.equal(t, whole.state_dict()[n]) for n,t in cut.state_dict().items())

def _rewrite(file, change):
    tensors,meta = load_tensors(file)
    change(tensors, meta)
    save_tensors(tensors, file, meta)

FORGED = dict(losses=lambda t, m: t.update({'training/losses': t['training/losses'][:1]}),
              windows=lambda t, m: t.update({'training/windows': torch.zeros(3, dtype=torch.uint8)}),
              generators=lambda t, m: t.pop('training/generators.torch'),
              numpy=lambda t, m: t['training/generators.numpy'].fill_(-1),
              python=lambda t, m: t['training/generators.python'].fill_(-1),
              optimizer=lambda t, m: t.update({'training/optimizer.visual.conv1.weight.exp_avg': torch.zeros(2)}),
              memory=lambda t, m: t.pop('training/memory.log'),
              place=lambda t, m: m.update(training='{"iteration": 9, "empty": 0, "seed": "0"}'),
              words=lambda t, m: m.update(training='{"iteration": "2"}'),
              seed=lambda t, m: m.update(training='{"iteration": 2, "empty": 0, "seed": "1"}'),
              weights=lambda t, m: t.pop('model/visual.conv1.weight'),
              nan=lambda t, m: t['model/visual.conv1.weight'].fill_(float('nan')),
              began=lambda t, m: m.update(began='{"weights": "x"}'))

@pytest.fixture(scope='module')
def broken(tmp_path_factory):
    "A run that was left within its second round, with teacher embeddings on disk."
    model,tok = small_clip(CONFIG, seed=0)
    clip,folder = ClipBackbone.from_model(model, tok, 'tiny'),tmp_path_factory.mktemp('broken')
    train = trainer(clip)
    save = train._save_within
    def stops(within, *args):
        save(within, *args)
        if within.round == 1: raise KeyboardInterrupt
    train._save_within = stops
    with pytest.raises(KeyboardInterrupt):
        imp(clip.fresh_copy(), train, density=.4, p=.3, checkpoint_dir=folder, checkpoint_every=2)
    return clip,folder

def goes_on(clip, folder):
    net = clip.fresh_copy()
    mask,_ = imp(net, trainer(clip), density=.4, p=.3, checkpoint_dir=folder, checkpoint_every=2)
    return mask,net.state_dict()

@pytest.mark.parametrize('what', FORGED)
def test_forged_checkpoints_within_a_round_are_refused(broken, tmp_path, what):
    """With a checksum that fits: one sentence, the files as they were, and without the forged file the run goes on
    from its last whole round."""
    clip,folder = broken
    shutil.copytree(folder, tmp_path/'run')
    _rewrite(tmp_path/'run'/'round.safetensors', FORGED[what])
    before = {p.name: p.read_bytes() for p in (tmp_path/'run').iterdir()}
    with pytest.raises(OpenTransError): goes_on(clip, tmp_path/'run')
    assert {p.name: p.read_bytes() for p in (tmp_path/'run').iterdir()} == before

def test_teacher_embeddings_are_computed_once(broken, tmp_path, monkeypatch):
    """A run that goes on asks the teacher nothing, and ends as the unbroken one, also from the last whole round;
    damaged and missing files are told."""
    clip,folder = broken
    whole,state = goes_on(clip, tmp_path/'new')
    for name in ('run', 'round'): shutil.copytree(folder, tmp_path/name)
    (tmp_path/'round'/'round.safetensors').unlink()
    asked = []
    real = ClipBackbone.region_embeddings
    monkeypatch.setattr(ClipBackbone, 'region_embeddings',
                        lambda self, *args, mode='attention', **kw: (
                            asked.append(1) if mode == 'crop' else None, real(self, *args, mode=mode, **kw))[1])
    for name in ('run', 'round'):
        mask,end = goes_on(clip, tmp_path/name)
        assert mask == whole and all(torch.equal(end[k], state[k]) for k in state)
    assert not asked
    file = tmp_path/'run'/'teacher-00000.safetensors'
    assert (file.exists()
            and json.loads(load_metadata(file)['settings'])['teacher'] == trainer(clip).settings['teacher'])
    for name,spoil,told in (('gone', lambda f: f.unlink(), 'is gone'),
                            ('cut', lambda f: f.write_bytes(f.read_bytes()[:-9]), 'not a whole'),
                            ('other', lambda f: _rewrite(f, lambda t, m: t['keys'].fill_(99)), 'damaged')):
        shutil.copytree(folder, tmp_path/name)
        spoil(tmp_path/name/'teacher-00000.safetensors')
        with pytest.raises(OpenTransError, match=told): goes_on(clip, tmp_path/name)

def test_disk_space_for_embeddings_is_bounded(clip, tmp_path):
    """What finds no room is computed again, to the same bits; without disk space the checkpoint holds them, as far
    as memory goes."""
    whole,_ = imp(clip.fresh_copy(), trainer(clip), density=.4, p=.3)
    for disk_mb in (0, 1e-4, 1):
        folder = tmp_path/str(disk_mb)
        train = trainer(clip, disk_mb=disk_mb)
        mask,_ = imp(clip.fresh_copy(), train, density=.4, p=.3, checkpoint_dir=folder)
        rows = sum(len(load_tensors(f)[0]['keys']) for f in folder.glob('teacher-*'))
        assert ((rows, len(load_tensors(folder/'imp.safetensors')[0]['train/keys'])) == {0: (0, 12),
                                                                                         1: (12, 0)}.get(
                    disk_mb, (rows, 0)) and rows*32*4 <= disk_mb*2**20)
        if disk_mb != 1e-4: assert mask == whole
