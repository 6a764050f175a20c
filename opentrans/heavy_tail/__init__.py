"Spectra of weights, the power law in their tail, and which layers to freeze by it."
from .power_law import *
from .power_law import __all__ as _power_law
from .table import *
from .table import __all__ as _table
from .over_time import *
from .over_time import __all__ as _over_time

__all__ = [*_power_law, *_table, *_over_time]

from opentrans.helping import document as _document
_document(__name__)
