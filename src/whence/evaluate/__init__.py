"""Is an attribution right? Scores compared with retraining and with labels flipped on purpose."""

from whence.evaluate.lds import LDS, linear_datamodeling_score
from whence.evaluate.mislabeled import MislabeledCurve, flip_labels, mislabeled_curve
from whence.evaluate.removal import Flips, RemovalCurve, flips, removal_curve
from whence.evaluate.retrain import random_subsets, retrain, retrain_small, run_seed
from whence.evaluate.small import SGDRecipe, train_small
from whence.evaluate.tail import Tail, tail

__all__ = [
    "LDS",
    "Flips",
    "MislabeledCurve",
    "RemovalCurve",
    "SGDRecipe",
    "Tail",
    "flip_labels",
    "flips",
    "linear_datamodeling_score",
    "mislabeled_curve",
    "random_subsets",
    "removal_curve",
    "retrain",
    "retrain_small",
    "run_seed",
    "tail",
    "train_small",
]
