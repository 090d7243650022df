"""Is an attribution right? Scores compared with retraining and with labels flipped on purpose."""

from whence.evaluate.agreement import Agreement, Pair, agreement
from whence.evaluate.files import Truth, load_matrix
from whence.evaluate.lds import LDS, linear_datamodeling_score
from whence.evaluate.leave_out import LeaveOneGroupOut, LeaveOneOut, expected_leave_one_out, leave_one_group_out
from whence.evaluate.mislabeled import MislabeledCurve, flip_labels, mislabeled_curve
from whence.evaluate.pbrf import PBRF, pbrf
from whence.evaluate.removal import Flips, RemovalCurve, flips, removal_curve
from whence.evaluate.retrain import random_subsets, retrain, retrain_small, run_seed
from whence.evaluate.small import SGDRecipe, train_small
from whence.evaluate.statistics import QueryMean
from whence.evaluate.tail import Tail, tail

__all__ = [
    "Agreement",
    "Flips",
    "LDS",
    "LeaveOneGroupOut",
    "LeaveOneOut",
    "MislabeledCurve",
    "PBRF",
    "Pair",
    "QueryMean",
    "RemovalCurve",
    "SGDRecipe",
    "Tail",
    "Truth",
    "agreement",
    "expected_leave_one_out",
    "flip_labels",
    "flips",
    "leave_one_group_out",
    "linear_datamodeling_score",
    "load_matrix",
    "mislabeled_curve",
    "pbrf",
    "random_subsets",
    "removal_curve",
    "retrain",
    "retrain_small",
    "run_seed",
    "tail",
    "train_small",
]
