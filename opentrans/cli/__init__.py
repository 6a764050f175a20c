"The command `opentrans`, a module for each kind of command; heavy libraries are imported when a command runs."
from .options import *
from .options import __all__ as _options_names
from .terminal import *
from .terminal import __all__ as _terminal_names
from .defaults import *
from .defaults import __all__ as _defaults_names
from .studies import *
from .studies import __all__ as _studies_names
from .weights import *
from .weights import __all__ as _weights_names
from .trained import *
from .trained import __all__ as _trained_names
from .training import *
from .training import __all__ as _training_names
from .evaluation import *
from .evaluation import __all__ as _evaluation_names
from .models import *
from .models import __all__ as _models_names
from .speed import *
from .speed import __all__ as _speed_names
from .datasets import *
from .datasets import __all__ as _datasets_names
from .thesis import *
from .thesis import __all__ as _thesis_names
from .entry import *
from .entry import __all__ as _entry_names

__all__ = [*_options_names, *_terminal_names, *_defaults_names, *_studies_names, *_weights_names, *_trained_names,
           *_training_names, *_evaluation_names, *_models_names, *_speed_names, *_datasets_names,
           *_thesis_names, *_entry_names]
