"Mean intersection over union and panoptic quality: the names of `opentrans.data.metrics`."
from .data.metrics import *
from .data.metrics import __all__ as __all__
