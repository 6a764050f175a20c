"CLIP as a backbone: small ones, weights, towers, text, embeddings."
from .small import *
from .small import __all__ as _small
from .photo import *
from .photo import __all__ as _photo
from .weights import *
from .weights import __all__ as _weights
from .backbone import *
from .backbone import __all__ as _backbone

__all__ = [*_small, *_photo, *_weights, *_backbone]

from opentrans.helping import document as _document
_document(__name__)
