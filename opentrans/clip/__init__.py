"CLIP as a backbone: small ones, weights, towers, text, embeddings."
from .small import *
from .small import __all__ as _small
from .weights import *
from .weights import __all__ as _weights
from .backbone import *
from .backbone import __all__ as _backbone

__all__ = [*_small, *_weights, *_backbone]

from opentrans.helping import document as _document
_document(__name__)
