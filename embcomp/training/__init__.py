"""Training: phases and searches for any loop, and optimizers that cost bytes per batch, not per table."""

from embcomp.phases import Phase
from embcomp.training.batch_norms import recalibrate_
from embcomp.training.evolution import Evolution
from embcomp.training.reassigned import reset_rows_, resetting_rows
from embcomp.training.rowwise_adagrad import RowwiseAdagrad
from embcomp.training.run import Phases
from embcomp.training.search import Candidate, Search
from embcomp.training.searching import SearchLoop, SearchResult, search_files

__all__ = [
    "Candidate",
    "Evolution",
    "Phase",
    "Phases",
    "RowwiseAdagrad",
    "Search",
    "SearchLoop",
    "SearchResult",
    "recalibrate_",
    "reset_rows_",
    "resetting_rows",
    "search_files",
]
