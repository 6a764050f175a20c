"Distillation of a tower: the losses of the paper and the trainer that Algorithm 1 calls."
from .losses import *
from .losses import __all__ as _losses
from .teacher import *
from .teacher import __all__ as _teacher
from .teaching import *
from .teaching import __all__ as _teaching
from .trainer import *
from .trainer import __all__ as _trainer
from .features import *
from .features import __all__ as _features

__all__ = [*_features, *_losses, *_teacher, *_teaching, *_trainer]

from opentrans.helping import document as _document
_document(__name__)
