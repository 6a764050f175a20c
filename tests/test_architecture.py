"""The house plan: imports point to lower floors, public names are where they are promised, and the package is whole
when installed."""
import ast, functools, graphlib, importlib, importlib.util, pkgutil, re, subprocess, sys
from pathlib import Path
import pytest
import opentrans
from forked import python

root = Path(__file__).resolve().parent.parent

LEVELS = ('helping', 'errors', 'escape', 'naming', 'files', 'runtime', 'core', 'towers', 'processes', 'sparse',
          ('heavy_tail', 'cka', 'cost'), 'pruning', 'data', 'clip', 'distill', 'frameworks', 'training',
          'efficiency', 'experiments', 'playground', 'cli', 'all')
LEVEL = {chapter: level for level,chapters in enumerate(LEVELS)
         for chapter in ([chapters] if isinstance(chapters, str) else chapters)}
# a leaf, and two modules that only pass names on
LEVEL |= dict(vit=LEVEL['data'], metrics=LEVEL['data'], finetune=LEVEL['training'])

def level(name):
    "The level of a module. The studies of the leaf stand on the chapter of studies."
    studies = name in ('vit.toys', 'vit.studies') or name.endswith('_study')
    return LEVEL['experiments'] + 1 if studies else LEVEL[chapter(name)]

PUBLIC = {
    'core': 'layers Layer LayerSelection',
    'sparse': 'compile supported',
    'pruning': 'SparseMask imp',
    'heavy_tail': 'esd fit_power_law PowerLawFit analyze LayerTable explore',
    'cka': 'linear_cka rbf_cka cka plot_cka',
    'cost': 'cost Cost training_flops',
    'data': 'Vocabulary VOCABULARIES list_datasets open_dataset ShapesWorld PhotoMosaic',
    'metrics': 'SemanticIoU PanopticQuality',
    'data.metrics': 'SemanticIoU PanopticQuality',
    'clip': 'ClipBackbone',
    'distill': 'tgkd_loss vgkd_loss DistillTrainer',
    'frameworks': 'build list_frameworks register_framework check_framework Framework',
    'finetune': 'Recipe finetune evaluate',
    'vit.peft': 'LoRALinear SequentialAdapter SparseDelta trainable_report',
    'vit.heads': 'find_heads',
    'vit.folders': 'open_pictures',
    'vit.products': 'open_model spt_on stitch_on spvit_on',
    'vit.sensitivity': 'param_sensitivity',
    'vit.allocation': 'Allocation allocate sweep_allocations structured_cost',
    'vit.spt': 'Allocation allocate sweep_allocations apply_spt merge_spt sensitivity_profile',
    'vit.stitching': 'stitch_configs StitchConfig StitchingLayer StitchableNet apply_pst merge_stitch',
    'vit.stitch_training': 'snip_score ImportanceTracker',
    'vit.spvit': 'conv_from_msa',
    'vit.hybrids': 'HybridSpec',
    'efficiency': 'paper_costs',
    'experiments': 'demo paper_costs run_study',
    'playground': 'playground segment overlay',
    'training': 'plan_run RunPlan',
    'frameworks.mask2former': 'Mask2Former load_mask2former',
    'frameworks.fcclip': 'FCCLIP load_fcclip',
    'frameworks.faseg': 'FASeg',
}

def modules():
    "Every module of the package, by name without `opentrans.`, found as Python finds it: name -> file."
    found = {m.name: importlib.util.find_spec(m.name)
             for m in pkgutil.walk_packages(opentrans.__path__, 'opentrans.')}
    return {name.removeprefix('opentrans.'): Path(spec.origin)
            for name,spec in found.items() if not name.endswith('._modidx')}

@functools.cache
def imports(name, path):
    "What a module imports of the package, anywhere in its code: (module, names)."
    return [*find_imports(name, path)]

def find_imports(name, path):
    package = (['opentrans', *name.split('.')] if path.name == '__init__.py'
               else ['opentrans', *name.split('.')][:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith('opentrans.'): yield alias.name.removeprefix('opentrans.'), []
        elif isinstance(node, ast.ImportFrom):
            above = package[:len(package)-node.level+1] if node.level else []
            target = '.'.join([*above, *([node.module] if node.module else [])])
            names = [alias.name for alias in node.names]
            if target.startswith('opentrans.'): yield target.removeprefix('opentrans.'), names
            elif target == 'opentrans': yield from ((n, []) for n in names if n in LEVEL)

MODULES = modules()

def chapter(name): return name.split('.')[0]

@pytest.mark.parametrize('name', sorted(MODULES))
def test_imports_point_down(name):
    "A chapter knows the chapters before it, and no other."
    assert chapter(name) in LEVEL, f'{name} belongs to no chapter of the plan'
    for other,_ in imports(name, MODULES[name]):
        inside, passes_on = chapter(other) == chapter(name), name in ('finetune', 'metrics')
        assert inside or passes_on or level(other) < level(name), f'{name} imports {other}, which is not below it'

def test_no_circle():
    "Modules of one chapter know each other in one direction, too. (graphlib raises for a circle.)"
    graph = {name: {other for other,_ in imports(name, path) if other in MODULES and other != name}
             for name,path in MODULES.items() if path.name != '__init__.py'}
    order = [*graphlib.TopologicalSorter(graph).static_order()]
    assert order.index('errors') < order.index('core') < order.index('frameworks.contract')

def test_private_names_stay_in_their_chapter():
    "A name that begins with an underscore may be used by a neighbour in the same folder, and by nobody else."
    for name,path in MODULES.items():
        for other,names in imports(name, path):
            private = [n for n in names if n.startswith('_') and not n.startswith('__')]
            assert (not private
                    or (chapter(other) == chapter(name) and other != name)), f'{name} takes {private} from {other}'

# the published counts of the thesis are its columns, too; its systems have commands
WHO_ASKS_THE_LEAF = ('efficiency', 'cli')

def test_the_systems_of_the_thesis_are_a_leaf():
    "Nothing of the open-vocabulary core imports chapter `vit`."
    asks = {chapter(name) for name,path in MODULES.items()
            for other,_ in imports(name, path) if chapter(other) == 'vit' != chapter(name)}
    assert asks <= {*WHO_ASKS_THE_LEAF}

LONGEST = 800 # short lines, one thought each: a file holds one thing

def test_a_file_holds_one_thing():
    lines = {name: len(path.read_text(encoding='utf-8').splitlines()) for name,path in MODULES.items()}
    long = {name: n for name,n in lines.items() if n > LONGEST}
    assert not long, long

def test_folders_of_notebooks_are_folders_of_the_package():
    """A page in `nbs/NAME/` makes a module of `opentrans/NAME/`, but for the pages at the top, for what is used by
    hand, and for tutorials."""
    for page in (root/'nbs').rglob('*.ipynb'):
        text, folder = page.read_text(encoding='utf-8'), page.parent.name
        found = re.search(r'#\| *default_exp ([\w.]+)', text)
        if found and folder not in ('nbs', 'app', 'tutorials', '.ipynb_checkpoints'):
            assert found[1].split('.')[0] in (folder, 'distill', 'efficiency'), page

@pytest.mark.parametrize('room', sorted(PUBLIC))
def test_public_names(room):
    module = importlib.import_module(f'opentrans.{room}')
    for name in PUBLIC[room].split(): assert name in module.__all__, f'opentrans.{room} does not export {name}'

def test_methods_of_the_plan():
    from opentrans.all import ClipBackbone, LayerSelection, LayerTable, Recipe, SparseMask
    for cls,names in ((SparseMask,
                       'ones magnitude random density sparsity names table prune apply iou save load compile'),
                      (LayerTable, 'to_frame plot_alpha plot_esd select'),
                      (LayerSelection, 'apply to_json from_json'),
                      (ClipBackbone, 'create encode_text dense_embeddings region_embeddings fresh_copy'),
                      (Recipe, 'paper warmup tiny')):
        for n in names.split(): assert hasattr(cls, n), f'{cls.__name__}.{n} is missing'

HEAVY = """
import sys
print([name for name in ('torch', 'open_clip', 'transformers', 'matplotlib', 'pandas') if name in sys.modules])
"""

def test_import_is_light():
    "`import opentrans` brings no heavy library; `opentrans --help` does not either."
    for line in ('import opentrans', 'import opentrans.cli'):
        assert subprocess.run([sys.executable, '-c', f'{line}\n{HEAVY}'], capture_output=True, text=True, check=True,
                              cwd=root).stdout.strip() == '[]', line

def test_tools_see_the_lazy_names():
    "The file for type checkers and editors names what `import opentrans` brings, and from where."
    seen = {alias.asname: node.module
            for node in ast.parse((root/'opentrans'/'__init__.pyi').read_text()).body
            if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == opentrans._HOME

LAZY = """
import sys
from forked import forget_package
forget_package()
import opentrans
assert not [name for name in sys.modules if name.startswith('opentrans.')]
missing = [name for name in opentrans.__all__ if not hasattr(opentrans, name)]
print(missing, callable(opentrans.cost.cost), hasattr(opentrans, 'nothing'))
"""

def test_names_come_lazily():
    """Each public name is found in a process that has imported nothing of the package but its name, and nothing else
    is."""
    done = python('-c', LAZY, cwd=root)
    assert done.stdout.strip() == '[] True False', done.stderr

def test_star_import_brings_the_fifteen_lines():
    space = {}
    exec('from opentrans.all import *', space)
    names = ('ClipBackbone open_dataset DistillTrainer imp build finetune Recipe analyze evaluate cost ShapesWorld '
             'SparseMask')
    assert {*names.split()} <= {*space}

def test_data_files_are_packaged(tmp_path):
    subprocess.run([sys.executable, 'setup.py', '-q', 'build', '--build-base', str(tmp_path/'base'), '--build-lib',
                    str(tmp_path/'lib')], cwd=root, check=True, capture_output=True)
    here,there = ({p.name for p in (base/'opentrans'/'assets').iterdir()} for base in (root, tmp_path/'lib'))
    assert here == there and {'shapes-rn.safetensors', 'shapes-rn.json'} <= here
    assert (tmp_path/'lib'/'opentrans'/'frameworks'/'deeplabv3.py').exists()
    assert (root/'opentrans'/'assets'/'shapes-rn.safetensors').stat().st_size <= 8_000_000

def test_one_site_configuration():
    assert (root/'_quarto.yml').exists() and not (root/'nbs'/'_quarto.yml').exists()
    import yaml
    pages = yaml.safe_load((root/'_quarto.yml').read_text())['website']['sidebar']['contents']
    listed = {x for p in pages for x in ([p] if isinstance(p, str) else p['contents'])}
    there = {str(p.relative_to(root)) for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts}
    assert listed == there, f'not in the sidebar: {there-listed}; not there: {listed-there}'

def test_a_source_archive_holds_what_its_build_reads():
    "Without a manifest setuptools would leave settings.ini out, from which setup.py reads every fact."
    told = (root/'MANIFEST.in').read_text().split()
    assert {'settings.ini', 'README.md', 'LICENSE'} <= {*told} and all((root/name).exists() for name in told[1:5])
