"The page of the paper's settings says what the code does; a plan of a run says what the run then needs."
import dataclasses, inspect, json, re
from pathlib import Path
import pytest
import torch
from opentrans.cli import transfer # noqa: F401
from opentrans.cli.defaults import _course, _looks, _stride # noqa: F401
from opentrans.cost import peak_memory
from opentrans.data import ShapesWorld
from opentrans.distill import DistillTrainer # noqa: F401
from opentrans.errors import OpenTransError
from opentrans.training import Recipe, RunPlan, WARMUP, device_room, finetune, plan_run, released_size # noqa: F401
from opentrans.frameworks import build, get_framework # noqa: F401
from opentrans.frameworks.contract import tiny_backbone
from opentrans.heavy_tail import LayerTable, analyze # noqa: F401
from opentrans.pruning import geometric_schedule, imp # noqa: F401

PAGE = Path(__file__).resolve().parents[1]/'nbs'/'training'/'43_plan.ipynb'

def default(function, name):
    "The default of a parameter."
    return inspect.signature(function).parameters[name].default

def rows():
    "Setting, what is here, and where, of each row of the page's table."
    text = '\n'.join(''.join(c['source'])
                     for c in json.loads(PAGE.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'markdown')
    cells = [[x.strip() for x in line.strip('|').split('|')] for line in text.split('\n') if line.startswith('| ')]
    return [(c[0], c[3], c[4].strip('`')) for c in cells if len(c) == 5 and c[4].startswith('`')]

@pytest.mark.parametrize('setting,here,where', rows())
def test_the_page_says_what_the_code_does(setting, here, where):
    "The names in the last column are imported above."
    assert str(eval(where, {**globals()})) == here, setting

def test_the_page_has_every_setting_of_a_recipe_of_the_paper():
    """What the paper's recipes set otherwise than a recipe of one's own stands on the page, or belongs to another
    page."""
    there = ' '.join(where for *_,where in rows())
    for name in ('han', 'fcclip'):
        recipe, plain = Recipe.paper(name), Recipe()
        changed = {f.name for f in dataclasses.fields(recipe) if getattr(recipe, f.name) != getattr(plain, f.name)}
        assert all(f"Recipe.paper('{name}').{f}" in there for f in changed-{'flip', 'scale', 'workers'}), changed

PLAN = RunPlan(iterations=100, images=1000, batch_size=16, processes=2, accumulate=2, fixed=1e9, per_image=1e8,
               room=2*10**9, device='cpu', step_fixed=.5, step_per_image=.25, load_per_image=.125, workers=0)

def test_a_plan_adds_up():
    assert PLAN.part == 4 and PLAN.memory == pytest.approx(1.4e9) and PLAN.fits and PLAN.least_parts() == 1
    assert (PLAN.seconds == .5*2 + .25*8 + .125*8 and dataclasses.replace(PLAN, workers=1).seconds == 3.
            and dataclasses.replace(PLAN, workers=1, load_per_image=1.).seconds == 8.)
    assert (PLAN.hours == pytest.approx(PLAN.seconds*100/3600)
            and PLAN.epoch == pytest.approx(PLAN.seconds*1000/16/60))

@pytest.mark.parametrize('room,parts',
                         [(1_810_000_000, 1), (1_800_000_000-1, 2), (1_400_000_000, 2), (1_399_000_000, 3),
                          (1_100_000_000, 8), (1_099_999_999, None)])
def test_what_cannot_fit_is_refused_with_what_can(room, parts):
    plan = dataclasses.replace(PLAN, accumulate=1, room=room)
    assert plan.least_parts() == parts
    if parts == 1: return plan.check()
    with pytest.raises(OpenTransError, match=f'accumulate={parts}' if parts else 'smaller crops'): plan.check()
    if parts: dataclasses.replace(plan, accumulate=parts).check()

@pytest.mark.parametrize('name,batch', [('deeplabv3', 6), ('mask2former', 5)])
def test_a_plan_is_near_to_what_the_run_takes(name, batch, one_thread):
    """The memory of a larger batch, which was not tried, is that of the allocator to a quarter; and nothing has
    changed by looking."""
    world = ShapesWorld('train', n=8, size=64)
    seg = build(name, tiny_backbone(), vocabulary=world.vocabulary, preset='small', seed=0)
    before = {k: v.clone() for k,v in seg.state_dict().items()}
    recipe = Recipe.tiny().replace(batch_size=batch, iterations=2)
    plan = plan_run(seg, world, recipe, samples=4)
    assert (all(torch.equal(v, before[k]) for k,v in seg.state_dict().items()) and plan.images == 8
            and plan.iterations == 2)
    weights = sum(v.numel()*v.element_size() for v in seg.state_dict().values())
    took = weights + peak_memory(lambda: finetune(seg, world, recipe))
    assert .75*took < plan.memory < 1.35*took and plan.seconds > 0 and plan.load_per_image > 0

def test_a_plan_is_of_two_images_where_one_leaves_a_norm_a_single_value():
    "DeepLabV3's pooled branch has one value a channel for one image."
    world = ShapesWorld('train', n=4, size=64)
    seg = build('deeplabv3', tiny_backbone(), vocabulary=world.vocabulary, preset='small', seed=0)
    assert plan_run(seg, world, Recipe.tiny().replace(crop=16, batch_size=4), samples=1).per_image >= 0

@pytest.mark.parametrize('kw', [dict(processes=0), dict(samples=0), dict(processes=1.5)])
def test_a_plan_of_nothing_is_refused(kw):
    world = ShapesWorld('train', n=1, size=64)
    with pytest.raises(OpenTransError):
        plan_run(build('deeplabv3', tiny_backbone(), vocabulary=world.vocabulary, preset='small'), world,
                 Recipe.tiny(), **kw)

def test_a_recipe_by_a_name_is_that_of_the_framework():
    for framework in ('fcclip', 'faseg', 'deeplabv3'):
        told = dict(preset='warmup', framework=framework)
        assert Recipe.of(told) == Recipe.of(dict(preset='warmup'), framework) == Recipe.warmup(framework)

def test_room_of_the_machine_counts_what_files_fill():
    "Memory that holds copies of files is free for programs."
    told = Path('/proc/meminfo')
    if not told.exists(): pytest.skip('no Linux')
    sizes = dict(re.findall(r'(\w+):\s+(\d+) kB', told.read_text()))
    available = 1024*int(sizes['MemAvailable'])
    assert abs(device_room('cpu')-available) < .2*available

def test_a_plan_of_no_iterations():
    world = ShapesWorld(n=4, size=32)
    seg = build('deeplabv3', tiny_backbone(), vocabulary=world.vocabulary, preset='small')
    assert plan_run(seg, world, Recipe.tiny().replace(iterations=0, batch_size=2)).hours == 0
