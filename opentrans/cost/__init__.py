"Multiply-accumulates, parameters and memory of a model, under a mask, and of its training."
from .prices import *
from .prices import __all__ as _prices
from .counting import *
from .counting import __all__ as _counting
from .dry_pass import *
from .dry_pass import __all__ as _dry_pass
from .costs import *
from .costs import __all__ as _costs
from .memory import *
from .memory import __all__ as _memory

__all__ = [*_prices, *_counting, *_dry_pass, *_costs, *_memory]

from opentrans.helping import document as _document
_document(__name__)
