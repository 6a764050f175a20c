"Spectra of weights, the power law in their tail, and which layers to freeze by it."
from .power_law import *
from .power_law import __all__ as _power_law
from .null import *
from .null import __all__ as _null
from .reading import *
from .reading import __all__ as _reading
from .spectra import *
from .spectra import __all__ as _spectra
from .table import *
from .table import __all__ as _table
from .over_time import *
from .over_time import __all__ as _over_time
from .steering import *
from .steering import __all__ as _steering
from .robust import *
from .robust import __all__ as _robust
from .change import *
from .change import __all__ as _change
from .words import *
from .words import __all__ as _words

__all__ = [*_power_law, *_null, *_reading, *_spectra, *_table, *_over_time, *_steering, *_robust, *_change, *_words]

from opentrans.helping import document as _document
_document(__name__)
