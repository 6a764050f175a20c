"Centered kernel alignment between any layers of any two models, streamed over a loader."
from .kernels import *
from .kernels import __all__ as _kernels
from .watching import *
from .watching import __all__ as _watching
from .streams import *
from .streams import __all__ as _streams

__all__ = [*_kernels, *_watching, *_streams]

from opentrans.helping import document as _document
_document(__name__)
