"Masks: found once by Algorithm 1, kept in force while a model is trained, carried to every framework."
from .places import *
from .places import __all__ as _places
from .criteria import *
from .criteria import __all__ as _criteria
from .force import *
from .force import __all__ as _force
from .baked import *
from .baked import __all__ as _baked
from .mask import *
from .mask import __all__ as _mask
from .prices import *
from .prices import __all__ as _prices
from .transfer import *
from .transfer import __all__ as _transfer
from .round_files import *
from .round_files import __all__ as _round_files
from .rounds import *
from .rounds import __all__ as _rounds
from .calibration import *
from .calibration import __all__ as _calibration
from .solvers import *
from .solvers import __all__ as _solvers
from .densities import *
from .densities import __all__ as _densities
from .reconstruction import *
from .reconstruction import __all__ as _reconstruction
from .regrowth import *
from .regrowth import __all__ as _regrowth
from .compiled import *
from .compiled import __all__ as _compiled
from .heads import *
from .heads import __all__ as _heads
from .slim import *
from .slim import __all__ as _slim

__all__ = [*_places, *_criteria, *_force, *_baked, *_mask, *_prices, *_transfer, *_round_files, *_rounds,
           *_calibration, *_solvers, *_densities, *_reconstruction, *_regrowth, *_compiled, *_heads,
           *_slim]

from opentrans.helping import document as _document
_document(__name__)
