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
from .transfer import *
from .transfer import __all__ as _transfer
from .rounds import *
from .rounds import __all__ as _rounds

__all__ = [*_mask, *_places, *_force, *_criteria, *_rounds, *_baked, *_transfer]

from opentrans.helping import document as _document
_document(__name__)
