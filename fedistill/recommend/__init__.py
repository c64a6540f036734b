"""Recommendation students: two towers, grown with their users and items, kept current."""

from fedistill.recommend.models import (
    MatrixFactorisation,
    SequentialRecommender,
    Towers,
    TwoTower,
    scores_of,
)
from fedistill.recommend.strategies import STRATEGIES, Strategy
from fedistill.recommend.student import Learned, Recommender, Tested, with_strategy
from fedistill.recommend.training import Training

__all__ = [
    "STRATEGIES",
    "Learned",
    "MatrixFactorisation",
    "Recommender",
    "SequentialRecommender",
    "Strategy",
    "Tested",
    "Towers",
    "Training",
    "TwoTower",
    "scores_of",
    "with_strategy",
]
