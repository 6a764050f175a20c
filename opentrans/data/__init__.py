"Class names, samples, worlds made on the spot, data sets on disk, and metrics."
from .vocabulary import *
from .vocabulary import __all__ as _vocabulary
from .samples import *
from .samples import __all__ as _samples
from .shapes import *
from .shapes import __all__ as _shapes
from .readers import *
from .readers import __all__ as _readers
from .datasets import *
from .datasets import __all__ as _datasets
from .metrics import *
from .metrics import __all__ as _metrics
from .batches import *
from .batches import __all__ as _batches
from .photographs import *
from .photographs import __all__ as _photographs
from .mosaic import *
from .mosaic import __all__ as _mosaic

__all__ = [*_vocabulary, *_samples, *_shapes, *_readers, *_datasets, *_metrics, *_batches, *_photographs, *_mosaic]

from opentrans.helping import document as _document
_document(__name__)
