"""Scoring whole catalogues: top items, ranks and softmax losses, of compressed tables or of a computed matrix.

Session and retrieval models score every item of a catalogue by an inner product with a query. What they need is here
on one small interface, `ItemScorer`: `TableScorer` is a table of a group, `MatrixScorer` a matrix that is computed
once, such as items' vectors from their metadata; `FirstItemsScorer` is a part of either. Nothing here holds the scores
of all queries for all items of a large catalogue: it is gone through in chunks, of items or of queries.
"""

from embcomp.scoring.ranking import rank_bounds, ranks, top_k
from embcomp.scoring.sampled import Negatives, NegativeSampler, sampled_cross_entropy
from embcomp.scoring.scorers import FirstItemsScorer, ItemScorer, MatrixScorer, TableScorer
from embcomp.scoring.softmax import cross_entropy

__all__ = [
    "FirstItemsScorer",
    "ItemScorer",
    "MatrixScorer",
    "NegativeSampler",
    "Negatives",
    "TableScorer",
    "cross_entropy",
    "rank_bounds",
    "ranks",
    "sampled_cross_entropy",
    "top_k",
]
