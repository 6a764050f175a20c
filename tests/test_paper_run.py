"""The README's commands on a small tree of the seven data sets, studies at the paper's settings, and what a log
hears."""
import dataclasses, json, os, shutil, subprocess, sys
from pathlib import Path
import pytest
import torch
from opentrans import experiments as ex
from opentrans.data import ShapesWorld, Vocabulary
from opentrans.errors import OpenTransError
from opentrans.experiments import arms, registry
from opentrans.experiments import scale as sizes
from opentrans.runtime import progress, time_left
from opentrans.training import Recipe, released_size
from conftest import train_on_small_crops
from test_cli import fails, opentrans, tree # noqa: F401, a fixture

COCO = ex.SCALES['coco']
SMALL = dict(backbone='shapes-rn', preset='small', batch_size=2, loaders=0, domain=1, val=1)
PAPER_STUDY = ('study', 'frameworks', '--scale', 'coco', '--device', 'cpu', '--pretrained', 'shapes-rn')
TINY = [part for name, value in SMALL.items() for part in ('--set', f'{name}={value}')]

def test_studies_of_the_paper_have_the_stride_of_each_framework():
    "16 for DeepLabV3 alone, as the commands have it; the generated world has its own everywhere."
    strides = {name: COCO.of(name).output_stride for name in ('deeplabv3', 'mask2former', 'fcclip', 'faseg', 'fpn')}
    assert strides == dict(deeplabv3=16, mask2former=32, fcclip=32, faseg=32, fpn=32)
    assert COCO.of().output_stride == 16 and dataclasses.replace(COCO, framework='fpn').of().output_stride == 32
    assert dataclasses.replace(COCO, output_stride=8).of('deeplabv3').output_stride == 8
    assert dataclasses.replace(COCO, backbone='ViT-B-16').of('deeplabv3').output_stride == 32
    assert all(ex.SCALES[name].of(f) == ex.SCALES[name] for name in ('shapes', 'gpu') for f in ('deeplabv3', 'fpn'))

def test_studies_of_the_paper_look_as_the_command_does():
    "The released size of each set, classes of the truth, and readers; the generated world as it is."
    from opentrans.cli.defaults import _looks
    for framework in ('deeplabv3', 'fcclip'):
        for name, data in (('val', 'coco_panoptic'), ('cityscapes_19', 'cityscapes_19')):
            looks = arms._evaluation_options(COCO, name, framework)
            assert looks == _looks(framework, data, False, workers=4, device='cpu')
            assert looks | released_size(framework, data) == looks
    assert arms._evaluation_options(COCO, 'val', '') == arms._evaluation_options(COCO, 'val', 'deeplabv3')
    assert arms._evaluation_options(ex.SCALES['shapes'], 'val', '') == {}

def test_studies_of_the_paper_put_names_into_the_prompts_of_the_framework(monkeypatch):
    "Bare names, and FC-CLIP's own; the data sets that the arms share stay as they are."
    world = dict(train=ShapesWorld('train', n=1, size=32), val=ShapesWorld('val', n=1, size=32))
    monkeypatch.setattr(sizes, 'open_world', lambda scale, seed: world)
    usual = world['val'].vocabulary
    seen = {name: ex.world_of(COCO, 0, name)['val'].vocabulary for name in ('mask2former', 'fcclip')}
    assert seen['mask2former'].templates == ('{}',) and seen['fcclip'] == Vocabulary(usual.entries, 'vild')
    assert world['val'].vocabulary is usual and ex.world_of(ex.SCALES['shapes'], 0) is world

def test_a_shorter_scale_is_the_same_course():
    """Warm-up, rest, each framework's course and each round are shorter by the same share, and nothing is of no
    length."""
    short = COCO.shorten(500)
    assert (short.warmup, short.iterations, short.imp_iters) == (100, 400, 10)
    courses = [sum(short.steps(name)) for name in ('deeplabv3', 'fcclip', 'faseg')]
    assert courses == [500, round(500*368_750/50_000), round(500*160_000/50_000)]
    least = COCO.shorten(2)
    assert (least.warmup, least.iterations, least.imp_iters) == (1, 1, 1)
    assert dataclasses.replace(COCO, warmup=0).shorten(5).warmup == 0
    with pytest.raises(OpenTransError): COCO.shorten(1)
    def queries(scale): return registry._study_scale('frameworks', scale, None, None)[0].query_iterations
    assert queries('shapes') == 160, "the study's own"
    shapes = ex.SCALES['shapes']
    assert queries(shapes.shorten(30)) == 4 and queries(shapes.changed(dict(query_iterations='7'))) == 7

def test_sizes_of_a_study_are_read_from_texts():
    "Numbers, names, switches and lists; what is none is said in a sentence."
    told = COCO.changed(dict(batch_size='8', precision='bf16', freeze='.25', paper='false',
                             sets='voc_20, context_59'))
    assert (told.batch_size, told.precision, told.freeze, told.paper) == (8, 'bf16', .25, False)
    assert told.sets == ('voc_20', 'context_59')
    wrong = dict(batch='8', batch_size='many', paper='perhaps', precision='fp8', accumulate='0', iterations='1.5')
    for name, text in wrong.items():
        with pytest.raises(OpenTransError): COCO.changed({name: text})

def test_arms_of_a_study_are_chosen_by_their_names(tmp_path):
    "Their file has a name of its own, and an arm that is none is said before anything runs."
    assert [a.name for a in registry._chosen_arms('frameworks', ['random', 'dense'])] == ['dense', 'random']
    file = ex.result_file('frameworks', 'r', 1, 'coco', arms=['dense', 'random'])
    assert file.name == 'frameworks-coco-dense-random-1seeds.json'
    every = ex.get_study('frameworks').arm_names
    names = {ex.result_file('frameworks', 'r', 1, arms=chosen).name
             for chosen in (None, every, every[1:], every[:-1])}
    assert len(names) == 4 and all(len(name) < 100 for name in names)
    message = fails('study', 'frameworks', '--arm', 'thick', '--out', tmp_path/'o')
    assert "Unknown arm of the study 'frameworks'" in message
    assert 'cannot be chosen' in fails('study', 'alpha', '--arm', 'dense', '--out', tmp_path/'o')
    assert "Unknown size of a study 'batch'" in fails('study', 'ratio', '--set', 'batch=1', '--out', tmp_path/'o')
    assert 'NAME=VALUE' in fails('study', 'ratio', '--set', 'batch', '--out', tmp_path/'o')
    assert 'leave --all out' in fails('study', '--all', '--arm', 'dense', '--out', tmp_path/'o')
    assert "Unknown scale 'huge'" in fails('study', 'ratio', '--scale', 'huge', '--out', tmp_path/'o')
    assert not (tmp_path/'o').exists()

def test_what_a_study_is_about_is_not_changed_by_a_size(tmp_path):
    "A study of a small tower has that tower, and a file of settings brings no weights of its own."
    other = ('study', 'tower-vit', '--set', 'backbone=shapes-convnext', '--out', tmp_path/'o')
    assert 'not about shapes-convnext' in fails(*other)
    for change in ('backbone=hf-hub:someone/tower', 'pretrained=openai'):
        (tmp_path/'c.json').write_text(json.dumps({'set': [change]}))
        assert 'changes no weights' in fails('study', 'ratio', '--config', tmp_path/'c.json', '--out', tmp_path/'o')
    assert not (tmp_path/'o').exists()

def test_random_weights_of_a_study_are_the_same_in_each_process():
    "They are made from a seed, so that two arms begin with the same tower."
    scale = dataclasses.replace(ex.SCALES['smoke'], pretrained='none')
    towers = []
    for _ in range(2):
        sizes._open_clip.cache_clear()
        towers.append(ex.open_clip_of(scale).visual.state_dict())
    shipped = ex.open_clip_of(ex.SCALES['smoke']).visual.state_dict()
    def same(one, other): return all(torch.equal(v, other[k]) for k, v in one.items())
    assert same(*towers) and not same(towers[0], shipped)

@pytest.fixture
def small_crops(monkeypatch):
    "A test below has crops of 512."
    train_on_small_crops(monkeypatch, 96)

def test_a_study_of_two_arms(tree, tmp_path, monkeypatch, small_crops): # noqa: F811
    """At the paper's scale, shortened by one flag: a column for each set, seen at the released sizes, and its
    command."""
    monkeypatch.setenv('DETECTRON2_DATASETS', '')
    seen, evaluate = [], arms.evaluate
    def small(seg, data, **looks):
        seen.append((looks.pop('size'), looks.pop('longest'), looks['over']))
        return evaluate(seg, data, size=48, **looks)
    monkeypatch.setattr(arms, 'evaluate', small)
    two = ('--arm', 'fpn: dense', '--arm', 'fpn: random')
    given = (*PAPER_STUDY, '--root', tree, '--iterations', 2, '--workers', 1)
    r = opentrans(*given, *two, *TINY, '--set', 'sets=voc_20', '--seeds', 1, '--out', tmp_path)
    assert r.returncode == 0, r.stderr[-2000:]
    data = json.loads((tmp_path/'frameworks-own-fpn--dense-fpn--random-1seeds.json').read_text())
    assert [x['arm'] for x in data['results']] == ['fpn: dense', 'fpn: random'] and data['claims'] == []
    assert [list(x['miou']) for x in data['results']] == [['base', 'voc_20']]*2 and len(seen) == 4
    assert {*seen} == {(800, 1333, 'truth')}
    flags = ("--arm 'fpn: dense'", '--iterations 2', '--device cpu', '--set batch_size=2')
    assert all(flag in data['run']['command'] for flag in flags)
    assert (data['scale']['warmup'], data['scale']['iterations'], data['scale']['device']) == (1, 1, 'cpu')

SAMPLE = Path(__file__).parents[1]/'../shared/data/samples/coco_panoptic/sample_data'
MINIATURE = dict(backbone='shapes-rn', preset='small', batch_size=2, imp_batch=2, imp_crop=64, loaders=0,
                 density=.3, p=.5, checkpoint=1)
SCALES_OF_A_GPU = dict(gpu=dict(size=64, train=4, val=2, domain=1, imp_crop=0), coco=dict(sets=''))

def lay_out_sample(root):
    "The two photographs of COCO's own sample where the whole set would lie, to train and to evaluate on."
    for split in ('train', 'val'):
        places = dict(input_images=f'{split}2017', panoptic_examples=f'panoptic_{split}2017')
        for folder,place in places.items(): shutil.copytree(SAMPLE/folder, root/'coco'/place)
        (root/'coco'/'annotations').mkdir(exist_ok=True)
        shutil.copy(SAMPLE/'panoptic_examples.json', root/'coco'/'annotations'/f'panoptic_{split}2017.json')
    return root

@pytest.mark.parametrize('scale', list(SCALES_OF_A_GPU))
def test_a_scale_of_a_gpu_in_miniature(scale, tmp_path, monkeypatch):
    """Algorithm 1, warm-up, two arms, measures: the course of the scale, on a small tower, the CPU and real
    photographs for COCO."""
    if scale == 'coco' and not SAMPLE.is_dir():
        pytest.skip('the COCO sample is not at ../shared/data/samples/coco_panoptic')
    root = lay_out_sample(tmp_path/'data') if scale == 'coco' else tmp_path
    evaluate = arms.evaluate
    def small(seg, data, **looks): return evaluate(seg, data, **{**looks, 'size': 48, 'longest': None})
    monkeypatch.setattr(arms, 'evaluate', small)
    monkeypatch.setenv('DETECTRON2_DATASETS', '')
    sizes_told = [part for name,value in {**MINIATURE, **SCALES_OF_A_GPU[scale]}.items()
                  for part in ('--set', f'{name}={value}')]
    given = ('study', 'frameworks', '--scale', scale, '--device', 'cpu', '--pretrained', 'shapes-rn', '--root',
             root, '--iterations', 2)
    r = opentrans(*given, '--arm', 'dense', '--arm', 'distilled mask', *sizes_told, '--workers', 1, '--seeds', 1,
                  '--out', tmp_path/'o')
    assert r.returncode == 0, r.stderr[-2000:]
    data = json.loads((tmp_path/'o'/'frameworks-own-dense-distilled-mask-1seeds.json').read_text())
    assert [(x['arm'], round(x['density'], 2)) for x in data['results']] == [('dense', 1.), ('distilled mask', .3)]
    assert all(0 <= x['miou']['base'] <= 1 for x in data['results'])
    assert (data['scale']['warmup'], data['scale']['iterations'], data['scale']['alpha_of']) == (1, 1, 'dense')

@pytest.fixture
def log(monkeypatch, capsys):
    "What a loop tells a process that is no terminal, where a line is due at once."
    monkeypatch.setattr(sys.modules[progress.__module__], 'LINE_EVERY', 0)
    monkeypatch.delitem(sys.modules, 'ipykernel', raising=False)
    for name in ('OPENTRANS_PROGRESS', 'IN_TEST'): monkeypatch.delenv(name, raising=False)
    def of(*args, **kw):
        items = list(progress(*args, **kw))
        return items, capsys.readouterr().err.splitlines()
    return of

def test_a_log_hears_how_far_a_long_loop_is(log, monkeypatch):
    """A line a minute (here at once): what is done, and what is left; nothing where a caller tells it, or nobody
    asks."""
    items, lines = log(range(2000), 'counting')
    assert items == [*range(2000)] and len(lines) == 2000
    assert lines[0].startswith('counting: 1 of 2,000, ') and lines[-1] == 'counting: 2,000 of 2,000, 00:00 left'
    assert log(iter('ab'), 'reading') == (['a', 'b'], ['reading: 1 done', 'reading: 2 done'])
    assert log(iter('ab'), 'reading', 4)[1][0].startswith('reading: 1 of 4, ')
    assert log(range(3), 'x', lines=False) == ([0, 1, 2], [])
    monkeypatch.setattr(sys.modules[progress.__module__], 'LINE_EVERY', 60)
    assert log(range(3), 'x') == ([0, 1, 2], [])
    monkeypatch.setenv('OPENTRANS_PROGRESS', '0')
    assert log(range(3), 'x') == ([0, 1, 2], [])
    assert [time_left(s) for s in (5, 89, 300, 7200)] == ['00:05', '01:29', '05:00', '2:00:00']

def run_quietly(args, **more):
    "A command in a process of its own."
    env = dict(os.environ, OMP_NUM_THREADS='1', OPENTRANS_PROGRESS='0', ACCELERATE_USE_CPU='true')
    command = [sys.executable, '-W', 'ignore', *map(str, args)]
    r = subprocess.run(command, capture_output=True, text=True, env=env, **more)
    assert r.returncode == 0, r.stderr[-3000:]
    return r

@pytest.mark.slow
def test_the_commands_of_the_readme_one_after_the_other(tree, tmp_path): # noqa: F811
    """Prune in two processes; to each framework by the paper's recipe: transfer, evaluate, segment; a study of two
    arms."""
    clip = ('--backbone', 'shapes-rn', '--pretrained', 'shapes-rn', '--data', 'coco_panoptic', '--root', tree)
    two = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2')
    mask = tmp_path/'m.safetensors'
    short = ('--iters', 1, '--batch-size', 2, '--device', 'cpu')
    run_quietly([*two, '-m', 'opentrans.cli', 'prune', *clip, '--out', mask, *short])
    for framework in ('deeplabv3', 'mask2former', 'fcclip', 'faseg', 'fpn'):
        run = tmp_path/framework
        few = ('--iterations', 8, '--batch-size', 2, '--crop', 64, '--limit', 1)
        r = opentrans('transfer', mask, '--framework', framework, *clip, *few, '--out', run, '--json')
        assert r.returncode == 0, r.stderr[-2000:]
        assert f'recipe: paper of {framework}' in r.stderr and abs(json.loads(r.stdout)['density']-.1) < 5e-4
        all_seven = ('--data', 'all', '--root', tree, '--short-side', 48, '--out', tmp_path/f'{framework}-all')
        r = opentrans('evaluate', '--model', run, *all_seven, '--json')
        assert r.returncode == 0 and len(json.loads(r.stdout)['table']) == 7, r.stderr[-2000:]
        photo = next((tree/'coco'/'val2017').iterdir())
        picture = ('--model', run, '--out', tmp_path/f'{framework}.png')
        r = opentrans('segment', photo, 'sky, road, sofa | couch', *picture, '--json')
        assert r.returncode == 0 and set(json.loads(r.stdout)) <= {'sky', 'road', 'sofa'}, r.stderr[-2000:]
    given = (*PAPER_STUDY, '--root', tree, '--iterations', 2, '--workers', 1)
    two = ('--arm', 'dense', '--arm', 'distilled mask')
    r = opentrans(*given, *two, *TINY, '--seeds', 1, '--out', tmp_path/'study')
    assert r.returncode == 0, r.stderr[-2000:]
    rows = json.loads((tmp_path/'study'/'frameworks-own-dense-distilled-mask-1seeds.json').read_text())
    assert [list(x['miou']) for x in rows['results']] == [['base', *COCO.sets]]*2
    assert [x['density'] for x in rows['results']] == [1., pytest.approx(.1, abs=5e-4)]
    claims = {c['claim'] for c in rows['claims']}
    assert claims == {'DeepLabV3 with the transferred mask is better than dense DeepLabV3'}

def test_some_samples_of_files_are_read_as_the_files_are(tree): # noqa: F811
    """A view of files is cut and read small as the files themselves; one that transforms its samples is not read
    past."""
    from opentrans.data import View, open_dataset, read_augmented
    data = open_dataset('coco_panoptic', tree, 'train')
    for view, at in ((View(data, [2, 1]), 0), (View(View(data), [2, 1]), 0)):
        one, other = (read_augmented(d, i, 32, [0], (.1, .5)) for d, i in ((view, at), (data, 2)))
        assert torch.equal(one['image'], other['image']) and torch.equal(one['labels'], other['labels'])
    dark = View(data, [2], lambda sample, i: dict(sample, image=torch.zeros_like(sample['image'])))
    assert not read_augmented(dark, 0, 32, [0], (.1, .5))['image'].any()

FPN = ('--backbone', 'shapes-rn', '--framework', 'fpn', '--data', 'coco_panoptic', '--crop', 64)

def test_a_dry_run_on_files(tree, tmp_path, small_crops): # noqa: F811
    "What a run on a data set of files needs is measured, and nothing is written."
    r = opentrans('finetune', *FPN, '--root', tree, '--out', tmp_path/'o', '--dry-run', '--json')
    assert r.returncode == 0, r.stderr[-2000:]
    told = json.loads(r.stdout)
    assert (told['images'], told['batch_size']) == (3, 28) and told['hours'] > 0 and told['load_per_image'] > 0
    r = opentrans(*PAPER_STUDY, '--root', tree, '--arm', 'fpn: dense', *TINY, '--dry-run', '--out', tmp_path/'o')
    assert r.returncode == 0 and 'fpn' in r.stdout and not (tmp_path/'o').exists(), r.stderr[-2000:]

FULL = (MemoryError(), torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB'),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"))

@pytest.mark.parametrize('error', FULL)
def test_a_full_memory_is_a_sentence(monkeypatch, error):
    "Of Python, of a GPU and of torch on the CPU; another error of torch's is none."
    def fail(*args, **kw): raise error
    monkeypatch.setattr('opentrans.heavy_tail.analyze', fail)
    assert 'out of memory' in fails('alpha', code=1) and '--accumulate' in fails('alpha', code=1)
    def other(*args, **kw): raise RuntimeError('The size of tensor a must match')
    monkeypatch.setattr('opentrans.heavy_tail.analyze', other)
    with pytest.raises(RuntimeError): opentrans('alpha')

def test_a_plan_for_cards_that_cannot_share_a_batch_is_refused(tree, tmp_path): # noqa: F811
    "28 images on eight cards: the dry run says what the run would say."
    flags = (*FPN, '--root', tree, '--out', tmp_path/'o')
    assert 'multiple of 8' in fails('finetune', *flags, '--dry-run', '--processes', 8)

def test_the_stored_measurements_are_of_the_papers_recipes(script):
    """What is counted of a framework, and how many texts the names of the seven sets are; all are steps of the
    script."""
    bench = script('bench_paper_run')
    file = Path(bench.__file__).with_suffix('.json')
    kept = json.loads(file.read_text())['steps']
    counted = [name for name in bench.FRAMEWORKS if f'count-{name}' in kept]
    assert {'text', 'tower'} <= {*kept} <= {*bench.steps()} and counted
    for name in counted:
        step, recipe = kept[f'count-{name}'], Recipe.paper(name)
        assert (step['side'], step['batch'], step['iterations']) == (
            recipe.crop, recipe.batch_size, recipe.iterations)
        assert 0 < step['macs'] and 0 < step['counted'] and step['seen'] == [800, 1067]
    assert all(v['seconds'] > 0 and v.get('bytes', 1) > 0 for v in kept.values() if 'seconds' in v)
    words = {name: Vocabulary(bench.VOCABULARIES[name].entries, '{}') for name in bench.SETS}
    assert kept['text']['prompts'] == sum(len(texts) for v in words.values() for texts in v.prompts())
    assert bench.line((1, 5., 30), (3, 9., 50)) == dict(seconds=2., seconds_fixed=3., bytes=10., bytes_fixed=20.)

SLOWER = [pytest.param(name, marks=pytest.mark.slow) for name in ('mask2former', 'fcclip', 'faseg')]

@pytest.mark.parametrize('name', ['deeplabv3', 'fpn', *SLOWER])
def test_a_framework_costs_as_much_as_its_images(name, one_thread):
    "As many multiply-accumulates, but for what is done with the names, and as much memory."
    from opentrans.cost import cost, training_memory
    from opentrans.frameworks import build
    from opentrans.frameworks.contract import tiny_backbone
    seg = build(name, tiny_backbone(), vocabulary=['sky', 'road', 'sea'], preset='small', seed=0).eval()
    one, same, three = (cost(seg, size).macs for size in ((3, 64, 64), (1, 3, 64, 64), (3, 3, 64, 64)))
    assert one == same and 2.5*one < three <= 3*one
    few, many = (training_memory(seg, (n, 3, 64, 64))['activations'] for n in (2, 4))
    assert 1.8*few < many < 2.2*few

def test_readers_are_shared_by_the_processes_of_a_machine(monkeypatch):
    "Up to four each, as the cores allow, and one at least."
    from opentrans.cli.defaults import _readers
    monkeypatch.setattr(os, 'cpu_count', lambda: 16)
    def each(processes):
        monkeypatch.setenv('LOCAL_WORLD_SIZE', str(processes))
        return _readers(None, (), False)
    assert [each(n) for n in (1, 4, 8, 32)] == [4, 4, 2, 1]
    assert _readers(7, (), False) == 7
    assert _readers(None, (), True) is None and _readers(None, ['workers=3'], False) is None
