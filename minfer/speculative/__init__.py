"""Speculative decoding: guess the next tokens cheaply, check the guesses in one pass through the model.

A decode step reads every weight to produce one token. Checking k guesses reads the same weights once and may produce k + 1,
so wherever memory is the bottleneck the guesses are almost free (Leviathan et al., arXiv 2211.17192). A *proposer* guesses,
`verify.py` accepts so that the output is what it would have been without, `policy.py` decides how many guesses pay.
To the scheduler a draft is "more tokens for this request", and nothing else in the engine knows of it.
"""

from minfer.speculative.draft_model import DraftModelProposer
from minfer.speculative.eagle import EagleProposer
from minfer.speculative.final_state import MedusaProposer, ReDrafterProposer
from minfer.speculative.forced import Forced, ForcedDrafts, ForcedStats
from minfer.speculative.heads import head_proposer
from minfer.speculative.ngram import NgramProposer
from minfer.speculative.source import Proposer
from minfer.speculative.speculation import Speculation, SpeculationStats
from minfer.speculative.tree import DraftTree
from minfer.speculative.verify import DraftRow, accepted, trunk, way

__all__ = [
    "DraftModelProposer",
    "DraftRow",
    "DraftTree",
    "EagleProposer",
    "Forced",
    "ForcedDrafts",
    "ForcedStats",
    "MedusaProposer",
    "NgramProposer",
    "Proposer",
    "ReDrafterProposer",
    "Speculation",
    "SpeculationStats",
    "accepted",
    "head_proposer",
    "trunk",
    "way",
]
