"Studies of the paper's questions: arms, jobs, claims, figures, stored results and their report."
from .scale import *
from .scale import __all__ as _scale
from .arms import *
from .arms import __all__ as _arms
from .jobs import *
from .jobs import __all__ as _jobs
from .claims import *
from .claims import __all__ as _claims
from .figures import *
from .figures import __all__ as _figures
from .registry import *
from .registry import __all__ as _registry
from .studies import LOSSES_OF, alpha_course, alpha_curves, overlaps, pictures, unpack_pictures
from .league import *
from .league import __all__ as _league
from .first_picture import *
from .first_picture import __all__ as _first_picture
from .report import *
from .report import __all__ as _report

# the others are named as their studies
_OF_STUDIES = ['LOSSES_OF', 'alpha_course', 'alpha_curves', 'overlaps', 'pictures', 'unpack_pictures']
__all__ = ['paper_costs', *_scale, *_arms, *_jobs, *_claims, *_figures, *_registry, *_OF_STUDIES, *_report,
           *_league, *_first_picture]

from opentrans.helping import document as _document
_document(__name__)

def __getattr__(name):
    "`paper_costs` comes when it is asked for, since it brings all frameworks with it."
    if name != 'paper_costs': raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from opentrans.efficiency import paper_costs
    return paper_costs
