"""Segmentation frameworks on a CLIP backbone: the contract, the list of them, and their adapters.

Each adapter is imported when it is first built."""
import sys
from .contract import *
from .contract import __all__ as _contract
from .scores import *
from .scores import __all__ as _scores
from .checks import *
from .checks import __all__ as _checks

__all__ = [*_contract, *_scores, *_checks]
promise_frameworks(sys.modules[__name__]) # the modules beside this one: nobody lists them

from opentrans.helping import document as _document
_document(__name__)
