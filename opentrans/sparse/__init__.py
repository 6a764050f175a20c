"A sparse engine for the CPU: weights that a mask has removed cost no time."
from .machine import *
from .machine import __all__ as _machine
from .regions import *
from .regions import __all__ as _regions
from .layout import *
from .layout import __all__ as _layout
from .plan import *
from .plan import __all__ as _plan
from .linear import *
from .linear import __all__ as _linear
from .engine import *
from .engine import __all__ as _engine
from .stored import *
from .stored import __all__ as _stored
from .speed import *
from .speed import __all__ as _speed

__all__ = [*_machine, *_regions, *_layout, *_plan, *_linear, *_engine, *_stored, *_speed]
