"Studies on data of real formats, and what becomes of one that is interrupted."
import base64, dataclasses, functools, json, math, shutil, zlib
from pathlib import Path
import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from mutations import COUNT, check_reader
from opentrans import experiments as ex
from opentrans.clip import ClipBackbone
from opentrans.core import LayerSelection
from opentrans.errors import OpenTransError
from opentrans.files import load_json
from opentrans.cost import cost, training_flops
from opentrans.data import ShapesWorld, write_coco_panoptic
from opentrans.errors import FormatError, OtherRun
from opentrans.files import lock_folder, save_json
from opentrans.files.stored import _HEADER
from opentrans.frameworks import build
from conftest import train_on_small_crops
from test_plan import PLAN

SAMPLES = Path(__file__).resolve().parents[1]/'../shared/data/samples'
DISK = dataclasses.replace(ex.SCALES['smoke'], data='coco_panoptic', paper=True, batch_size=2, imp_crop=64,
                           checkpoint=1)

@pytest.fixture(autouse=True)
def small_looks(monkeypatch):
    """Scenes of 64 pixels are not seen at the released size, nor trained on in crops of 512, which takes a hundred
    times as long."""
    train_on_small_crops(monkeypatch, 64)
    monkeypatch.setattr(ex.arms, 'released_size', lambda framework, data: dict(size=64, longest=128))

@pytest.mark.filterwarnings('ignore:.*has never seen')
@pytest.mark.skipif(not SAMPLES.is_dir(), reason='the sample images are not at ../shared/data/samples')
def test_a_study_on_real_images(tmp_path, monkeypatch):
    "COCO's own files to train on, ADE20K's to evaluate on, with their 133 and 150 names."
    root = tmp_path/'datasets'
    root.mkdir()
    for p in [*(SAMPLES/'coco_panoptic').iterdir(), *(SAMPLES/'ade20k').iterdir()]:
        (root/p.name).symlink_to(p.resolve())
    monkeypatch.setenv('DETECTRON2_DATASETS', str(root))
    data = ex.run_study('similarity', tmp_path/'out', seeds=1,
                        scale=dataclasses.replace(DISK, sets=('ade20k_150',)))
    assert [r['arm'] for r in data['results']] == ['dense', 'distilled mask', 'random']
    for r in data['results']:
        # two images are too few for CKA
        assert (set(r['miou']) == {'base', 'ade20k_150'} and all(0 <= v <= 1 for v in r['miou'].values())
                and math.isnan(r['cka']))
    assert 'Real data' in data['what'] and 'mIoU ade20k_150' in data['summary']['random']
    assert load_json(tmp_path/'out'/'similarity-own-1seeds.json')['scale']['pretrained'] == ''

def test_a_long_arm_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    "Interrupted within a fine-tuning, the study does the rest of it; the result is that of an unbroken run."
    for split,n in (('train', 6), ('val', 4)):
        write_coco_panoptic(ShapesWorld(split, n=n, size=64), tmp_path/'datasets', split)
    monkeypatch.setenv('DETECTRON2_DATASETS', str(tmp_path/'datasets'))
    few = [ex.Arm('dense', tables=()), ex.Arm('half', select='alpha', tables=())]
    scale = dataclasses.replace(DISK, iterations=3)
    steps,real = [],ex.arms.finetune
    def counted(*args, callback=None, stop=None, **kw):
        def look(seg, row):
            steps.append(int(row['iteration']))
            if stop is not None and len(steps) == stop: raise KeyboardInterrupt
        return real(*args, callback=look, **kw)
    monkeypatch.setattr(ex.arms, 'finetune', counted)
    whole = ex.run_arms(scale, 0, tmp_path/'whole', arms=few)
    assert steps == [0, 0, 1, 2, 0, 1, 2] # a warm-up, and two arms
    steps.clear()
    monkeypatch.setattr(ex.arms, 'finetune', functools.partial(counted, stop=3))
    with pytest.raises(KeyboardInterrupt): ex.run_arms(scale, 0, tmp_path/'broken', arms=few)
    assert steps == [0, 0, 1] and len(list((tmp_path/'broken').glob('*.run'))) == 1
    steps.clear()
    monkeypatch.setattr(ex.arms, 'finetune', counted)
    again = ex.run_arms(scale, 0, tmp_path/'broken', arms=few)
    assert steps == [2, 0, 1, 2] and not list((tmp_path/'broken').glob('*.run'))
    for a,b in zip(whole, again): assert json.dumps({**a, 'seconds': 0}) == json.dumps({**b, 'seconds': 0})

def test_nothing_is_trained_again_if_measuring_breaks(tmp_path, monkeypatch):
    "An error in the evaluation leaves the finished checkpoint, and the next call only measures."
    for split,n in (('train', 6), ('val', 4)):
        write_coco_panoptic(ShapesWorld(split, n=n, size=64), tmp_path/'datasets', split)
    monkeypatch.setenv('DETECTRON2_DATASETS', str(tmp_path/'datasets'))
    steps = []
    real = ex.arms.finetune
    measure = ex.arms.evaluate
    monkeypatch.setattr(ex.arms, 'finetune',
                        lambda *a, **kw: real(*a, callback=lambda seg, row: steps.append(int(row['iteration'])),
                                              **kw))
    def no_memory(*a, **kw): raise MemoryError
    monkeypatch.setattr(ex.arms, 'evaluate', no_memory)
    arms = [ex.Arm('dense', tables=())]
    with pytest.raises(MemoryError): ex.run_arms(DISK, 0, tmp_path/'runs', arms=arms)
    assert steps == [0, 0, 1]
    monkeypatch.setattr(ex.arms, 'evaluate', measure)
    assert (ex.run_arms(DISK, 0, tmp_path/'runs', arms=arms)[0]['miou'] and steps == [0, 0, 1]
            and not list((tmp_path/'runs').glob('*.run')))

@pytest.mark.parametrize('breaks_at', (1, 2, 3))
def test_a_course_of_alpha_loses_no_point_of_its_own(tmp_path, monkeypatch, breaks_at):
    "Broken off behind a checkpoint and before it was measured, the last one included: it is as of an unbroken run."
    scale = dataclasses.replace(ex.SCALES['smoke'], warmup=1, iterations=2, checkpoint=1)
    whole = ex.alpha_course(scale, 0, tmp_path/'whole')
    assert whole['iterations'] == [0, 1, 2, 3]
    analyze = ex.studies.analyze
    seen = []
    def breaks(*args, **kw):
        seen.append(1)
        if len(seen) == breaks_at+1: raise KeyboardInterrupt
        return analyze(*args, **kw)
    monkeypatch.setattr(ex.studies, 'analyze', breaks)
    with pytest.raises(KeyboardInterrupt): ex.alpha_course(scale, 0, tmp_path/'broken')
    assert ex.alpha_course(scale, 0, tmp_path/'broken') == whole
    names = [sorted(path.name for path in (tmp_path/name).iterdir()) for name in ('whole', 'broken')]
    assert names[0] == names[1]

def test_images_of_several_sizes(tmp_path):
    "Similarity is measured on them, and pictures are of the images that they stand beside."
    clip = ex.open_clip_of(DISK)
    class Sizes(list):
        vocabulary = ShapesWorld(n=1).vocabulary
        ignore = 65535
        name = 'sizes'
    data = Sizes(ShapesWorld('val', n=1, size=s, seed=i)[0] for i,s in enumerate((64, 80, 64, 96)))
    seg = build('deeplabv3', clip, vocabulary=data.vocabulary, preset='small', width=8)
    s = ex.clip_similarity(seg, data, ex.open_clip_of(DISK))
    assert all(.9 < v <= 1+1e-6 for v in s.values()) # nothing was trained
    assert (ex.arms._predictions(seg, data, 4).shape == (1, 64, 64)
            and ex.arms._predictions(seg, Sizes([data[0], data[2]]), 4).shape == (2, 64, 64))

def test_a_folder_is_of_its_data_and_weights(tmp_path, monkeypatch):
    "Other images, other weights and what cannot be opened do not take over a folder's runs."
    for name,n in (('a', 4), ('b', 5)):
        for split in ('train', 'val'): write_coco_panoptic(ShapesWorld(split, n=n, size=64), tmp_path/name, split)
    monkeypatch.setenv('DETECTRON2_DATASETS', str(tmp_path/'a'))
    ex.open_run_folder(tmp_path/'runs', DISK, 0)
    assert len(ex.open_world(DISK, 0)['val']) == 4
    monkeypatch.setenv('DETECTRON2_DATASETS', str(tmp_path/'b'))
    assert len(ex.open_world(DISK, 0)['val']) == 5
    with pytest.raises(OpenTransError, match='other sizes, data or weights'):
        ex.open_run_folder(tmp_path/'runs', DISK, 0)
    with pytest.raises(OpenTransError):
        ex.run_study('ratio', tmp_path/'out', seeds=1, scale='smoke', pretrained=str(tmp_path/'typo.safetensors'))
    assert not (tmp_path/'out').exists()
    for name in ('one', 'two'): (tmp_path/name).write_bytes(name.encode())
    a,b = (dataclasses.replace(DISK, pretrained=str(tmp_path/n)) for n in ('one', 'two'))
    assert ex.weights_identity(a) != ex.weights_identity(b) and str(tmp_path) not in ex.weights_identity(a)

def test_a_folder_of_older_settings_is_known(tmp_path):
    "A size that was added later has its default in a folder that does not name it; another value is refused."
    scale = ex.SCALES['smoke']
    ex.open_run_folder(tmp_path, scale, 3)
    kept = load_json(tmp_path/'study.json')
    (tmp_path/'study.json').write_text(
        json.dumps({k: v for k,v in kept.items() if k not in ('sha256', 'domain', 'zero_shot')}))
    # these are not the defaults
    with pytest.raises(OpenTransError, match='other sizes'): ex.open_run_folder(tmp_path, scale, 3)
    (tmp_path/'study.json').write_text(
        json.dumps({k: v
                    for k,v in kept.items()
                    if k not in ('sha256', 'width', 'queries', 'sets', 'data', 'pretrained', 'device', 'paper',
                                 'checkpoint')}))
    ex.open_run_folder(tmp_path, scale, 3)
    assert load_json(tmp_path/'study.json') == kept

# files of studies: read whole, or refused in a sentence

RESULTS = Path(__file__).resolve().parents[1]/'docs'/'results'
ARM = dict(arm='dense', seed=0, framework='deeplabv3', mask=None, found='', weights='original', select='alpha',
           level='', every=True, density=1., rule='alpha', frozen=['a'], miou=dict(base=.3, novel=.1, night=.2),
           params=9, active_params=9, macs=5, active_macs=5, train_flops=1e9, cka=.5, cka_layers=None,
           cka_channels=math.nan, seconds=1.)

def test_a_damaged_arm_is_refused_or_shown(tmp_path):
    "The result of an arm, in the place where a study looks for it, and what is made of it."
    arm, scale = ex.Arm('dense', select='alpha'), ex.SCALES['smoke']
    place = ex.arm_file(tmp_path, arm, scale)
    save_json(ARM, tmp_path/'good.json', ex.ARM_FILE)
    def read(target, path):
        shutil.copy(path, place)
        frame = ex.results_frame([ex.cached_result(arm, scale, tmp_path)])
        ex.summarize(frame, [arm])
        ex.difference(frame, 'dense', 'dense', 'cka')
    check_reader(tmp_path/'good.json', read)

def stored(name, folder):
    "A stored study, with a checksum, in a folder of its own; of its runs every fifth."
    data = load_json(RESULTS/f'{name}-5seeds.json')
    save_json(dict(data, results=data['results'][::5], claims=data['claims'][:3]), folder/f'{name}-5seeds.json',
              ex.STUDY_FILE)
    return folder/f'{name}-5seeds.json'

@pytest.mark.parametrize('name', ['freezing', 'overlap', 'alpha', 'pictures', 'density'])
def test_a_damaged_study_is_refused_or_shown(tmp_path, name):
    "A stored study, read from its file; its table of claims and its means are made."
    good = stored(name, tmp_path)
    world = ex.open_world(ex.Scale(**load_json(good)['scale']), 0)
    def read(target, path):
        data = ex.load_study(name, path)
        ex.claims_table(ex.claims_frame(data['claims']))
        ex.registry._paragraphs(ex.get_study(name), data)
        if name == 'pictures': ex.figures._check_answers(ex.unpack_pictures(data['more']), world)
    check_reader(good, read)

@pytest.mark.parametrize('name', ['freezing', 'overlap', 'alpha', 'density', 'frameworks', 'similarity', 'balance'])
def test_a_forged_study_is_refused_or_drawn(tmp_path, name):
    "What passes the checks can be drawn."
    good = stored(name, tmp_path)
    def read(target, path):
        ex.plot_study(name, ex.load_study(name, path))
        plt.close('all')
    check_reader(good, read, count=12 if COUNT < 2000 else 100)

def test_every_stored_study_is_read_as_it_is():
    "The checks take what is in docs/results, and change nothing in it."
    for name in ex.list_studies():
        file = RESULTS/f'{name}-5seeds.json'
        if file.exists():
            # the header is checked, and taken off
            stored = {key: value for key,value in json.loads(file.read_text()).items() if key not in _HEADER}
            assert json.dumps(ex.load_study(name, file), sort_keys=True) == json.dumps(stored, sort_keys=True)

READERS = {'study': (ex.jobs._identity(ex.SCALES['smoke'], 3), ex.RUNS_FILE),
           'imp': (dict(round=[0, 1], density=[.9, .8], loss=[1., None]), ex.ROUNDS_FILE),
           'part': ({'0': dict(a=2., b=None), '16': dict(a=2.1, b=3.)}, ex.studies.PART_FILE),
           'course-dense': (dict(iterations=[0, 16], median=[2., 3.], layers=['a', 'b'], before=[1., 2.],
                                 after=[None, 3.]), ex.studies.COURSE_FILE)}

@pytest.mark.parametrize('kind', READERS)
def test_a_damaged_file_of_a_run_is_refused_or_read(tmp_path, kind):
    "Settings of a folder, history of Algorithm 1, courses of alpha, each where a study looks for it."
    value, file = READERS[kind]
    save_json(value, tmp_path/'good.json', file)
    (tmp_path/'run').mkdir()
    def read(target, path):
        shutil.copy(path, tmp_path/'run'/f'{kind}.json')
        if kind == 'study': ex.open_run_folder(tmp_path/'run', ex.SCALES['smoke'], 3)
        elif kind == 'imp': pd.DataFrame(ex.read_rounds(tmp_path/'run'))
        elif kind == 'part': ex.studies._alphas_so_far(tmp_path/'run'/'part.json')
        else: ex.alpha_course(ex.SCALES['smoke'], 3, tmp_path/'run')
    check_reader(tmp_path/'good.json', read)

def test_a_study_of_one_seed_is_shown(tmp_path):
    "One seed has no interval: null in the file, nan in the table, and no traceback."
    data = load_json(RESULTS/'freezing-5seeds.json')
    results = [r for r in data['results'] if r['seed'] == 0]
    claims = ex.judge_claims(ex.results_frame(results), ex.get_study('freezing').claims).to_dict('records')
    save_json(dict(data, results=results, claims=claims, seeds=[0]), ex.result_file('freezing', tmp_path, 1),
              ex.STUDY_FILE)
    ex.show_study('freezing', tmp_path, 1)
    assert 'nan' in ex.claims_table(ex.all_claims(tmp_path, 1)).base.iloc[0]

def picture(packed, shape=(1, 4, 4), **more):
    "A study's pictures, of which there is one."
    return dict(seed=0,
                arms={
                    'dense': {'val': dict(dict(shape=list(shape), data=base64.b64encode(packed).decode()),
                                          **more)}})

def test_a_bomb_among_the_pictures_is_not_opened():
    "100 MB of zeros in 100 kB: no more is opened than the picture says that it has."
    bomb = zlib.compress(bytes(10**8), 9)
    with pytest.raises(FormatError, match='another size'): ex.unpack_pictures(picture(bomb))
    with pytest.raises(FormatError, match='more than'): ex.unpack_pictures(picture(bomb, (2**16, 2**16, 2**16)))
    good = zlib.compress(bytes(range(16)))
    assert ex.unpack_pictures(picture(good))['dense']['val'].flatten().tolist() == [*range(16)]
    for bad in (dict(shape=[1, 4, 5]), dict(shape=[16]), dict(shape=[-1, 4, 4]), dict(dtype='object'),
                dict(dtype='float32'), dict(dtype='int64'), dict(data='?!'), dict(data=3)):
        with pytest.raises(FormatError): ex.unpack_pictures(picture(good, **bad))
    for data in (good[:-1], good+b'x', b'', b'no zlib'):
        with pytest.raises(FormatError): ex.unpack_pictures(picture(data))

def test_a_study_in_a_folder_of_another_is_refused(tmp_path):
    "While one study works in the folders of its seeds, another is told so; its own processes go in and out."
    scale, arms = ex.SCALES['smoke'], [ex.Arm('dense', tables=())]
    with lock_folder(tmp_path/'seed1'):
        with pytest.raises(OtherRun, match='seed1'): ex.run_arms(scale, (0, 1), tmp_path, arms=arms)
        with pytest.raises(OtherRun, match='seed1'):
            ex.find_masks(scale, (1,), tmp_path, 'local', [ex.MaskRecipe()])
    with lock_folder(tmp_path/'demo'/'.demo-runs'):
        with pytest.raises(OtherRun, match='.demo-runs'): ex.demo(tmp_path/'demo', scale='smoke', arms=arms)
    # what a study holds is its own
    with ex.hold_folders(tmp_path/'seed1'), ex.hold_folders(tmp_path/'seed1', tmp_path/'seed2'): pass
    with lock_folder(tmp_path/'seed1'), lock_folder(tmp_path/'seed2'): pass             # and free afterwards

def test_weights_of_a_run_are_checked_before_they_are_put(tmp_path):
    "A warm-up that was altered or cut short is refused."
    scale, arm = ex.SCALES['smoke'], ex.Arm('dense', tables=())
    ex.warm_up(arm, scale, 0, tmp_path)
    file = ex.start_file(tmp_path, arm, scale)
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + b'!!!!')
    with pytest.raises(FormatError, match='checksum'): ex.open_warm(arm, scale, 0, tmp_path)
    file.write_bytes(whole[:len(whole)//2])
    with pytest.raises(FormatError, match='not a whole'): ex.open_warm(arm, scale, 0, tmp_path)

@pytest.mark.parametrize('bad',
                         [dict(size=0), dict(size=10**9), dict(train=2.5), dict(density=0), dict(density=math.nan),
                          dict(p=1), dict(lr=-1), dict(lr=math.inf), dict(queries='fcclip'), dict(sets=[1]),
                          dict(paper='yes'), dict(backbone=3), dict(output_stride=7), dict(batch_size=True),
                          dict(zero_shot='400'), dict(zero_shot=0)], ids=str)
def test_sizes_of_a_study_have_ranges(bad):
    with pytest.raises(OpenTransError): dataclasses.replace(ex.SCALES['smoke'], **bad)

def test_numbers_of_a_study_have_ranges(tmp_path):
    "Refused before anything is made."
    for bad in (dict(seeds=0), dict(seeds=1.5), dict(seed=-1), dict(scheduler=0), dict(scheduler=True),
                dict(scheduler='threads'), dict(scale='huge'), dict(scale=[1])):
        with pytest.raises(OpenTransError): ex.run_study('masks', tmp_path, **bad)
        with pytest.raises(OpenTransError): ex.demo(tmp_path, **bad)
    with pytest.raises(OpenTransError, match='Unknown study'): ex.run_study(['masks'], tmp_path)
    assert not any(tmp_path.iterdir())

def test_names_are_shown_as_they_are_called():
    """Arms and data sets with formulas, markup and escape sequences in their names: in plots, on the page, in a
    table."""
    names = '$x_{$', '_hidden', '<script>alert(1)</script>', 'a|b\x1b[31m'
    arms = [ex.Arm(n, tables=('masks',)) for n in names]
    results = [dict(ARM, arm=n, seed=s, miou={'base': .1*i+.01*s, 'novel': .1, '$y$': .2})
               for i,n in enumerate(names) for s in range(3)]
    frame = ex.results_frame(results)
    for axis in (ex.plot_arms(frame, arms), ex.plot_cost(frame), ex.plot_similarity(frame),
                 ex.plot_frameworks(frame, arms)[0]):
        axis.figure.canvas.draw()
    assert len(ex.plot_arms(frame, arms).get_legend_handles_labels()[1]) == 4
    plt.close('all')
    verdicts = ex.judge_claims(frame, [ex.Claim(names[2], names[0], names[2], names[3], ('base',))])
    summary = ex.summarize(frame, arms).to_dict('index')
    sizes = dataclasses.asdict(dataclasses.replace(ex.SCALES['smoke'], framework='deeplabv3'))
    ex.report_html(dict(claims=verdicts.to_dict('records'), summary=dict(masks=summary, layers=summary),
                               scale=sizes, seeds=[0, 1, 2], tower_params=1e6,
                               zero_shot=dict(base=.5, novel=.4, chance=.1), run=dict(command=names[2])), {})
    table = ex.claims_table(verdicts)
    assert ('<script>' not in ''.join(table.index) and '\x1b' not in table.paper.iloc[0]
            and '\\|' in table.paper.iloc[0])

def test_a_clip_that_is_not_finite_gets_no_accuracy():
    clip = ex.open_clip_of(ex.SCALES['smoke'])
    with torch.no_grad(): clip.visual.conv1.weight[0] = math.nan
    with pytest.raises(OpenTransError, match='not finite'): ex.zero_shot(clip, 4)

def test_no_pictures_give_no_accuracy():
    clip = ex.open_clip_of(ex.SCALES['smoke'])
    with pytest.raises(OpenTransError, match='n=0'): ex.zero_shot(clip, 0)

# where alpha is read, and where a table is made

def _smoke(alpha_of): return dataclasses.replace(ex.SCALES['smoke'], alpha_of=alpha_of)
_TWO = [ex.Arm('dense half', select='alpha', tables=('layers',)),
        ex.Arm('sparse half', 'distilled', select='alpha', tables=('layers',))]

def test_alpha_is_read_before_or_under_the_mask(tmp_path, one_thread):
    """Before it, the sparse arm freezes what the dense one does, from the same warm-up; under it, it has a start of
    its own. Sparse it is in both."""
    runs = {}
    for alpha_of in ('dense', 'masked'):
        dense, sparse = ex.run_arms(_smoke(alpha_of), 0, tmp_path/alpha_of, 1, _TWO)
        runs[alpha_of] = sparse
        assert (sparse['density'] == pytest.approx(.5, abs=.01)
                and (dense['frozen'] == sparse['frozen']) == (alpha_of == 'dense'))
        assert len(list((tmp_path/alpha_of).glob('start-*.safetensors'))) == (1 if alpha_of == 'dense' else 2)
    clip = ex.open_clip_of(_smoke('dense'))
    seg = ex.build_framework('', clip, ex.open_world(_smoke('dense'), 0)['train'].vocabulary, _smoke('dense'), 0)
    mask = ex.open_mask('distilled', _smoke('dense'), 0, tmp_path/'dense')
    c = cost(seg, (3, 80, 80)).with_mask(mask)
    warm = training_flops(c, 1, 4)
    whole = training_flops(c, 2, 4, mask=mask, selection=LayerSelection([], runs['dense']['frozen']))
    assert runs['dense']['train_flops'] == pytest.approx(warm+whole), 'the warm-up is dense, what follows is sparse'

def test_a_mask_that_comes_late_is_waited_for(tmp_path):
    "An arm whose warm-up needs no mask still needs the mask itself."
    jobs = ex.jobs._seed_jobs(_smoke('dense'), 0, tmp_path, _TWO)
    needs = {k: deps for k,(deps,*_) in jobs.items()}
    sparse = next(k for k in needs if k[1] == 'arm' and 'then distilled' in k[2])
    assert (0, 'imp', 'distilled') in needs[sparse] and not needs[next(k for k in needs if k[1] == 'start')]

def test_the_scales_of_clip_itself_read_alpha_as_the_paper_does():
    assert {n for n,s in ex.SCALES.items() if s.alpha_of == 'dense'} == {'gpu', 'coco'}

def test_tables_are_made_in_the_framework_of_the_paper(tmp_path, monkeypatch):
    "Han et al.'s for Tab. 2, 4 and 10 where CLIP itself is trained; any other by its name, in a file of that name."
    seen = []
    monkeypatch.setattr(ex.registry, 'run_arms', lambda scale, *a: seen.append(scale) or [])
    monkeypatch.setattr(ex.registry, 'open_clip_of', lambda scale: None)
    monkeypatch.setattr(ex.registry, 'open_world', lambda scale, seed: {})
    monkeypatch.setattr(ex.registry, 'pick_device', lambda name: torch.device('cpu'))
    for name in ('freezing', 'training', 'ratio', 'masks'):
        for scale in ('shapes', 'coco', 'gpu'): ex.run_study(name, tmp_path, 1, scale=scale)
    assert [s.framework for s in seen] == ['deeplabv3', 'mask2former', 'mask2former']*3 + ['deeplabv3']*3
    ex.run_study('ratio', tmp_path, 1, framework='fpn')
    assert seen[-1].framework == 'fpn' and (tmp_path/'ratio-fpn-1seeds.json').exists()
    with pytest.raises(OpenTransError, match='Unknown framework'):
        ex.run_study('ratio', tmp_path, 1, framework='fpm')

def test_a_scale_says_how_its_arms_train():
    scale = dataclasses.replace(ex.SCALES['smoke'], precision='bf16', accumulate=64, loaders=3)
    recipe = scale.recipe(5, 'poly', 0)
    assert (recipe.precision, recipe.accumulate, recipe.workers) == ('bf16', recipe.batch_size, 3)
    for bad in (dict(precision='fp8'), dict(alpha_of='both'), dict(accumulate=0), dict(loaders=-1)):
        with pytest.raises(OpenTransError): dataclasses.replace(scale, **bad)

def test_a_study_says_what_it_needs(monkeypatch):
    """A row for each framework; hours are those of all arms and seeds, shared by the processes. On a GPU nothing
    begins that cannot fit."""
    table = ex.plan_study('masks', seeds=3, scale='smoke', scheduler=2)
    row = table.loc['deeplabv3']
    assert list(table.index) == ['deeplabv3'] and row.arms == len(ex.get_study('masks').arms) and row.fits
    assert row.total == pytest.approx(row.hours*row.arms*3/2) and 0 < row.gigabytes < row.room
    assert list(ex.plan_study('ratio', scale='smoke', framework='fpn').index) == ['fpn']
    monkeypatch.setattr(ex.registry, 'pick_device', lambda name: torch.device('cuda'))
    monkeypatch.setattr(ex.registry, 'plan_run', lambda *a, processes: dataclasses.replace(PLAN, room=1))
    monkeypatch.setattr(ex.registry, 'open_clip_of',
                        lambda scale: ClipBackbone.create('shapes-rn', pretrained='shapes-rn', output_stride=16))
    with pytest.raises(OpenTransError, match='needs about'): ex.run_study('ratio', 'nowhere', 1, scale='smoke')
    assert not Path('nowhere').exists()
