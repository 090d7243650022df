"""Is an attribution right? Scores compared with retraining and with labels flipped on purpose."""

from wherefrom.tools.evaluate.agreement import Agreement, Pair, agreement
from wherefrom.tools.evaluate.files import Truth, load_matrix
from wherefrom.tools.evaluate.lds import LDS, linear_datamodeling_score
from wherefrom.tools.evaluate.leave_out import (
    LeaveOneGroupOut,
    LeaveOneOut,
    expected_leave_one_out,
    leave_one_group_out,
)
from wherefrom.tools.evaluate.mislabeled import MislabeledCurve, flip_labels, mislabeled_curve
from wherefrom.tools.evaluate.pbrf import PBRF, pbrf
from wherefrom.tools.evaluate.removal import Flips, RemovalCurve, flips, removal_curve
from wherefrom.tools.evaluate.retrain import random_subsets, retrain, retrain_small, run_seed
from wherefrom.tools.evaluate.small import SGDRecipe, train_small
from wherefrom.tools.evaluate.statistics import QueryMean
from wherefrom.tools.evaluate.tail import Tail, tail

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
