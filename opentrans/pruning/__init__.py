"Masks: found once by Algorithm 1, kept in force while a model is trained, carried to every framework."
from .mask import *
from .mask import __all__ as _mask
from .places import *
from .places import __all__ as _places
from .force import *
from .force import __all__ as _force
from .criteria import *
from .criteria import __all__ as _criteria
from .rounds import *
from .rounds import __all__ as _rounds
from .baked import *
from .baked import __all__ as _baked
from .compiled import *
from .compiled import __all__ as _compiled
from .slim import *
from .slim import __all__ as _slim

__all__ = [*_mask, *_places, *_force, *_criteria, *_rounds, *_baked, *_compiled, *_slim]
