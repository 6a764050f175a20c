# What tools see of the names that are imported lazily; a test compares it with `__init__.py`.
from .errors import OpenTransError as OpenTransError
from .runtime import seeded as seeded
from .core import LayerSelection as LayerSelection, layers as layers
from .towers import Tower as Tower, register_tower as register_tower
from .pruning import SparseMask as SparseMask, imp as imp, transfer_checkpoint as transfer_checkpoint
from .heavy_tail import LayerTable as LayerTable, analyze as analyze, esd as esd, explore as explore, fit_power_law as fit_power_law
from .cka import linear_cka as linear_cka, plot_cka as plot_cka, rbf_cka as rbf_cka
from .cost import Cost as Cost, training_flops as training_flops
from .data import PanopticQuality as PanopticQuality, SemanticIoU as SemanticIoU, ShapesWorld as ShapesWorld, VOCABULARIES as VOCABULARIES, Vocabulary as Vocabulary, list_datasets as list_datasets, open_dataset as open_dataset, register_dataset as register_dataset, show_sample as show_sample
from .clip import ClipBackbone as ClipBackbone
from .distill import DistillTrainer as DistillTrainer, tgkd_loss as tgkd_loss, vgkd_loss as vgkd_loss
from .frameworks import Framework as Framework, build as build, check_framework as check_framework, list_frameworks as list_frameworks, register_framework as register_framework
from .training import Recipe as Recipe, evaluate as evaluate, plan_run as plan_run
from .experiments import run_study as run_study
from .efficiency import paper_costs as paper_costs
from .playground import segment as segment, overlay as overlay

__version__: str
