"Fine-tuning and evaluation of a framework: recipes, runs that resume, metrics over a data set, and what a run needs."
from .recipe import *
from .recipe import __all__ as _recipe
from .evaluate import *
from .evaluate import __all__ as _evaluate
from .logger import *
from .logger import __all__ as _logger
from .finetune import *
from .finetune import __all__ as _finetune
from .plan import *
from .plan import __all__ as _plan

__all__ = [*_recipe, *_evaluate, *_logger, *_finetune, *_plan]

from opentrans.helping import document as _document
_document(__name__)
