"Spectra of weights, the power law in their tail, and which layers to freeze by it."
from .power_law import *
from .power_law import __all__ as _power_law
from .null import *
from .null import __all__ as _null
from .table import *
from .table import __all__ as _table
from .over_time import *
from .over_time import __all__ as _over_time
from .steering import *
from .steering import __all__ as _steering

__all__ = [*_power_law, *_null, *_table, *_over_time, *_steering]
