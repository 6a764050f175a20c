"Every file that is read or written: whole or not at all, checked before it is used, never run."
from .stored import *
from .stored import __all__ as _stored
from .runs import *
from .runs import __all__ as _runs
from .checkpoints import *
from .checkpoints import __all__ as _checkpoints

__all__ = [*_stored, *_runs, *_checkpoints]

from opentrans.helping import document as _document
_document(__name__)
