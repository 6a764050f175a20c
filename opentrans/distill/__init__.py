"Distillation of a tower: the losses of the paper and the trainer that Algorithm 1 calls."
from .losses import *
from .losses import __all__ as _losses
from .trainer import *
from .trainer import __all__ as _trainer

__all__ = [*_losses, *_trainer]

from opentrans.helping import document as _document
_document(__name__)
