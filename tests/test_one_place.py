"""One place to touch for each thing that is added. The cell of each tutorial is run as it stands, or one cell is
written here, and then everything that the first release had to be told is asked. `python tests/test_one_place.py`
prints the table."""
import json
import re
import sys
import tempfile
import types
from pathlib import Path
import pytest
import torch
from opentrans.all import SparseMask, analyze, build, cost, imp, list_datasets, list_frameworks, open_dataset
from opentrans.errors import OpenTransError

ROOT = Path(__file__).resolve().parent.parent
BEFORE = dict(framework=11, backbone=13, criterion=3, dataset=2, study=5) # places, as a review counted them
MARKS = dict(framework='register_framework', backbone='register_tower', criterion='criterion',
             dataset='register_dataset', study='study')


def cells(page):
    "The code cells of a tutorial."
    book = json.loads((ROOT/'nbs'/'tutorials'/f'{page}.ipynb').read_text(encoding='utf-8'))
    return [''.join(cell['source']) for cell in book['cells'] if cell['cell_type'] == 'code']


def the_cell(kind, page):
    "The one cell of a tutorial that adds the thing, and those before it. Later ones show what is refused."
    found = cells(page)
    at = next(i for i,cell in enumerate(found) if re.search(rf'^@{MARKS[kind]}\b', cell, re.M))
    return found[:at], found[at]


def run(sources):
    "The names that some cells make, in a module of their own: a family of towers names its classes by their paths."
    module = sys.modules['one_place'] = types.ModuleType('one_place')
    for source in sources: exec(source, vars(module))
    return vars(module)


@pytest.fixture
def registers():
    "Everything that is registered in a test is forgotten after it."
    from opentrans import naming, towers
    from opentrans.data import datasets
    from opentrans.experiments import registry
    from opentrans.frameworks import contract
    from opentrans.pruning import criteria
    lists = (naming.SPELLINGS, towers.TOWERS, datasets._DATASETS, registry.STUDIES, contract._REGISTRY,
             criteria.CRITERIA)
    kept = [(names, set(names)) for names in lists]
    yield
    for names,was in kept: # what was promised before may have been imported since, and stays
        for name in [name for name in names if name not in was]: del names[name]


def test_a_framework(registers):
    "Its class: list, build, recipe, title, studies, contract, mask and cost know it by its name alone."
    from opentrans.experiments.arms import framework_arms
    from opentrans.frameworks import get_framework
    from opentrans.frameworks.contract import tiny_backbone
    from opentrans.training import Recipe
    before,cell = the_cell('framework', 'add_a_framework')
    imports = 'import torch\nfrom torch import nn\nfrom opentrans.frameworks.contract import *'
    assert sum('@register_framework' in one for one in (*before, cell)) == 1
    run([imports, cell.replace("'fpn'", "'one-place'")])
    assert 'one-place' in list_frameworks()
    seg = build('one-place', tiny_backbone(), ['red', 'green'], preset='small', width=16)
    text = seg.backbone.encode_text(['red', 'green', 'blue'])
    assert seg(torch.rand(1, 3, 64, 64), text).shape == (1, 3, 64, 64)
    assert Recipe.paper('one-place') == Recipe.paper('deeplabv3') and get_framework('one-place').title
    assert {arm.framework for arm in framework_arms('one-place')} == {'one-place'}
    assert cost(seg, (3, 64, 64), mask=SparseMask.magnitude(seg.tower, .5)).active_macs > 0


def test_a_family_of_backbones(registers):
    "Its class: masks, spectra, stages, checkpoints of others, maps, cells and regions are asked of it."
    from opentrans.towers import is_tower, tower_family, tower_prefix
    before,cell = the_cell('backbone', 'add_a_backbone')
    space = run([*before, cell])
    net = space['PlainTower']()
    family = tower_family(net)
    assert is_tower(net) and family is space['PlainFamily']
    assert SparseMask.magnitude(net, .5).names == [f'stages.{i}.0.weight' for i in range(4)]
    assert 'project.weight' not in analyze(net).spectra
    assert family.stages(net) == [f'stages.{i}' for i in range(4)]
    state = {f'encoder.{name}': tensor for name,tensor in net.state_dict().items()}
    assert tower_prefix(state) == 'encoder.'
    theirs = {name.replace('stages', 'levels').replace('.0.weight', '.kernel'): tensor.clone()
              for name,tensor in net.state_dict().items() if re.fullmatch(r'stages\.\d\.0\.weight', name)}
    mask = SparseMask.magnitude(net, .5)
    assert len(mask.apply_to_state(theirs)) == 4 and all((t == 0).any() for t in theirs.values())
    maps,last = family.features(net, torch.rand(1, 3, 64, 64))
    assert list(maps) == ['res2', 'res3', 'res4', 'res5'] and family.dense(net, last).shape[1] == 32
    inside = torch.ones(1, 2, last[0, 0].numel(), dtype=torch.bool)
    assert family.pool_masks(net, last, inside).shape == (1, 2, 32)
    with pytest.raises(OpenTransError, match='output_stride'): family.dilate(net, 16)


def test_a_criterion(registers):
    "A function: `SparseMask.by`, `imp` and the command take it by its name."
    run(["from opentrans.pruning import criterion, prunable\n@criterion\ndef fewest_inputs(model):\n"
         "    return {layer.name: -layer.weight.abs()*layer.weight[0].numel() for layer in prunable(model)}"])
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 8, 3), torch.nn.Conv2d(8, 8, 3))
    mask,plain = SparseMask.by('fewest_inputs', net, .5),SparseMask.magnitude(net, .5)
    found,_ = imp(net, lambda model, round: None, schedule=[.5], criterion='fewest_inputs')
    assert mask == found and mask.density == .5 and mask != plain
    from opentrans.pruning import CRITERIA
    assert 'fewest_inputs' in CRITERIA # what the command's --criterion and --method choose from


def test_a_data_set(registers):
    "A function: the list, `open_dataset` and the command's --data know it."
    from opentrans.cli.options import open_data
    before,cell = the_cell('dataset', 'add_a_dataset')
    space = run([*before, cell])
    assert 'tiles' in list_datasets() and len(open_dataset('tiles', space['root'])) == 1
    assert len(open_data('tiles', space['root'], 'train')) == 3
    with pytest.raises(OpenTransError, match='Put tiles'): open_dataset('tiles', tempfile.mkdtemp())


def test_a_study(registers):
    "A function: the list, the command and the report know it, with its question, arms and claims."
    from opentrans.experiments import get_study, list_studies
    before,cell = the_cell('study', 'add_a_study')
    run([cell])
    made = get_study('a-tenth')
    assert 'a-tenth' in list_studies() and made.question == 'Is it enough to freeze a tenth of the layers?'
    assert [arm.name for arm in made.arms] == ['dense', 'freeze a tenth', 'freeze small alpha']
    assert len(made.claims) == 2


def test_the_bodies_are_where_they_are_said_to_be():
    "The list of concepts in CONTRIBUTING.md: its pages are there, and hold the names that it gives."
    text = (ROOT/'CONTRIBUTING.md').read_text(encoding='utf-8')
    rows = re.findall(r'\[(`[^]]+)\]\((nbs/[^)]+\.ipynb)\)', text)
    assert len(rows) > 15
    for names,page in rows:
        source = (ROOT/page).read_text(encoding='utf-8')
        for name in re.findall(r'`([\w.]+)`', names):
            word = name.removeprefix('opentrans.')
            made = re.search(rf'(def|class) {word}\b|{word}\b.* = |default_exp {word}"', source)
            assert made, (name, page)


def places():
    "Kind of thing -> the places that its tutorial or page touches: cells that register it."
    pages = dict(framework='add_a_framework', backbone='add_a_backbone', dataset='add_a_dataset', study='add_a_study')
    now = dict(criterion=1) # a function under `@criterion`; 01d_criteria shows it
    for kind,page in pages.items(): now[kind] = len([the_cell(kind, page)[1]])
    return {kind: (before, now[kind]) for kind,before in BEFORE.items()}


def test_each_is_one_place():
    assert {kind: now for kind,(_,now) in places().items()} == dict.fromkeys(BEFORE, 1)


if __name__ == '__main__':
    for kind,(before,now) in places().items(): print(f'{kind:10} {before:3} places before, {now} now')
