"Recipes, fine-tuning and evaluation: the names of `opentrans.training`."
from .training import *
from .training import __all__ as __all__
