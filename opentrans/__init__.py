"""Transferable and principled efficiency for open-vocabulary segmentation.

Prune CLIP once, transfer the mask, freeze layers by their spectra."""
import importlib, importlib.util

__version__ = '0.2.0'

_NAMES = dict(
    errors='OpenTransError',
    runtime='seeded',
    core='LayerSelection layers',
    towers='Tower register_tower',
    pruning='SparseMask imp transfer_checkpoint',
    heavy_tail='LayerTable analyze esd explore fit_power_law',
    cka='linear_cka plot_cka rbf_cka',
    cost='Cost training_flops',
    data='PanopticQuality SemanticIoU ShapesWorld VOCABULARIES Vocabulary list_datasets open_dataset register_dataset '
         'show_sample',
    clip='ClipBackbone',
    distill='DistillTrainer tgkd_loss vgkd_loss',
    frameworks='Framework build check_framework list_frameworks register_framework',
    training='Recipe evaluate plan_run',
    experiments='run_study',
    efficiency='paper_costs',
    playground='segment overlay',
)
_HOME = {name: module for module,names in _NAMES.items() for name in names.split()}

__all__ = [*_HOME]

def _chapter(name):
    module = importlib.import_module(f'{__name__}.{name}')
    from .helping import document
    document(module.__name__)
    return module

def __getattr__(name):
    "A public name or a module, imported when it is first asked for; `help` shows what its parameters mean."
    if name in _HOME: value = getattr(_chapter(_HOME[name]), name)
    elif not name.startswith('_') and importlib.util.find_spec(f'{__name__}.{name}'): value = _chapter(name)
    else: raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    globals()[name] = value
    return value

def __dir__(): return sorted({*globals(), *_HOME})
