"Segmentation frameworks on a CLIP backbone: the contract, the list of them, and their adapters, each imported when it is first built."
from .contract import *
from .contract import __all__ as __all__
from .contract import register_framework

for _name in ('deeplabv3', 'mask2former', 'fcclip', 'faseg', 'fpn'): register_framework(_name, module=f'{__name__}.{_name}')
del _name
