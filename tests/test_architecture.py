"The house plan: imports point to lower floors, public names are where they are promised, and the package is whole when installed."
import ast, importlib, subprocess, sys
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent

FLOORS = {-2: ['errors', 'escape'], -1: ['files'], 0: ['core'], 1: ['processes', 'pruning', 'heavy_tail', 'cka', 'cost', 'data', 'metrics', 'peft'], 2: ['clip', 'spt', 'stitching', 'spvit'], 3: ['distill', 'frameworks', 'frameworks.contract'],
          4: ['frameworks.deeplabv3', 'frameworks.mask2former', 'frameworks.fcclip', 'frameworks.fpn', 'finetune', 'frameworks.detectron2'], 5: ['frameworks.faseg', 'playground', 'plan'], 6: ['efficiency', 'experiments', 'cli', 'all']}
FLOOR = {m: f for f,ms in FLOORS.items() for m in ms}
SIDEWAYS = {('frameworks', 'frameworks.contract'), ('frameworks.fcclip', 'frameworks.mask2former'), ('experiments', 'efficiency'), ('cli', 'experiments'), ('all', 'experiments')}   # rooms of one floor that may know each other

PUBLIC = {
    'core': 'layers Layer LayerSelection',
    'pruning': 'SparseMask imp',
    'heavy_tail': 'esd fit_power_law PowerLawFit analyze LayerTable explore',
    'cka': 'linear_cka rbf_cka cka plot_cka',
    'cost': 'cost Cost training_flops',
    'data': 'Vocabulary VOCABULARIES list_datasets open_dataset ShapesWorld',
    'metrics': 'SemanticIoU PanopticQuality',
    'clip': 'ClipBackbone',
    'distill': 'tgkd_loss vgkd_loss DistillTrainer',
    'frameworks': 'build list_frameworks register_framework check_framework Framework',
    'finetune': 'Recipe finetune evaluate',
    'peft': 'LoRALinear SequentialAdapter SparseDelta trainable_report',
    'spt': 'param_sensitivity Allocation allocate sweep_allocations apply_spt merge_spt sensitivity_profile',
    'stitching': 'stitch_configs StitchConfig StitchingLayer StitchableNet apply_pst merge_stitch snip_score ImportanceTracker',
    'spvit': 'conv_from_msa HybridSpec',
    'efficiency': 'paper_costs',
    'experiments': 'demo paper_costs run_study',
    'playground': 'playground segment overlay',
    'plan': 'plan_run RunPlan',
    'frameworks.mask2former': 'Mask2Former load_mask2former',
    'frameworks.fcclip': 'FCCLIP load_fcclip',
    'frameworks.faseg': 'FASeg',
}

def modules(): return {'.'.join(p.relative_to(root/'opentrans').with_suffix('').parts).removesuffix('.__init__'): p for p in (root/'opentrans').rglob('*.py') if p.name != '_modidx.py' and p != root/'opentrans'/'__init__.py'}

def imported(name, path):
    "Rooms that a module imports, anywhere in its code."
    package = ['opentrans', *name.split('.')] if path.name == '__init__.py' else ['opentrans', *name.split('.')][:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            target = '.'.join([*package[:len(package)-node.level+1], *([node.module] if node.module else [])]) if node.level else node.module or ''
            if target == 'opentrans': yield from (a.name for a in node.names)
            elif target.startswith('opentrans.'): yield target.removeprefix('opentrans.')
        elif isinstance(node, ast.Import): yield from (a.name.removeprefix('opentrans.') for a in node.names if a.name.startswith('opentrans.'))

@pytest.mark.parametrize('name', sorted(modules()))
def test_imports_point_down(name):
    assert name in FLOOR, f'{name} has no floor: add it to the plan'
    for other in imported(name, modules()[name]):
        assert FLOOR[other] < FLOOR[name] or (name, other) in SIDEWAYS, f'{name} (floor {FLOOR[name]}) imports {other} (floor {FLOOR[other]})'

@pytest.mark.parametrize('room', sorted(PUBLIC))
def test_public_names(room):
    module = importlib.import_module(f'opentrans.{room}')
    for name in PUBLIC[room].split(): assert name in module.__all__, f'opentrans.{room} does not export {name}'

def test_methods_of_the_plan():
    from opentrans.all import ClipBackbone, LayerSelection, LayerTable, Recipe, SparseMask
    for cls,names in ((SparseMask, 'ones magnitude random density sparsity names table prune apply iou save load'), (LayerTable, 'to_frame plot_alpha plot_esd select'), (LayerSelection, 'apply to_json from_json'),
                      (ClipBackbone, 'create encode_text dense_embeddings region_embeddings fresh_copy'), (Recipe, 'paper warmup tiny')):
        for n in names.split(): assert hasattr(cls, n), f'{cls.__name__}.{n} is missing'

def test_import_is_light():
    "`import opentrans` brings no heavy library; `opentrans --help` does not either."
    for line in ('import opentrans', 'import opentrans.cli'):
        code = f"{line}; import sys; print([m for m in ('torch', 'open_clip', 'transformers', 'matplotlib', 'pandas') if m in sys.modules])"
        assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=root).stdout.strip() == '[]', line

def test_star_import_brings_the_fifteen_lines():
    space = {}
    exec('from opentrans.all import *', space)
    for name in 'ClipBackbone open_dataset DistillTrainer imp build finetune Recipe analyze evaluate cost ShapesWorld SparseMask'.split(): assert name in space

def test_data_files_are_packaged(tmp_path):
    subprocess.run([sys.executable, 'setup.py', '-q', 'build', '--build-base', str(tmp_path/'base'), '--build-lib', str(tmp_path/'lib')], cwd=root, check=True, capture_output=True)
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
