"""A small table with a column for every kind of task, and settings for each kind."""

import numpy as np
import pytest

from pathfm.mil.tasks import TaskSet, make_tasks
from pathfm.mil_settings import MilSettings

SETTINGS = {
    "binary": {"label": "lesion"},
    "multiclass": {"label": "organ"},
    "multilabel": {"label": "genes", "columns": ["braf", "kras"]},
    "ordinal": {"label": "grade", "order": ["low", "mid", "high"]},
    "regression": {"label": "age", "kind": "regression"},
    "cox": {"label": "os", "time": "months", "event": "died"},
    "discrete": {"label": "os", "kind": "discrete", "time": "months", "event": "died", "intervals": 3},
}


def table(count=60, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {
            "lesion": ("no", "yes")[index % 3 == 0],
            "organ": ("lung", "colon", "skin")[index % 3],
            "braf": str(index % 2),
            "kras": "" if index % 5 == 0 else str(int(index % 7 == 1)),
            "grade": ("low", "mid", "high")[int(rng.integers(3))],
            "age": f"{rng.normal(60, 12):.1f}",
            "months": f"{rng.exponential(20):.1f}",
            "died": str(int(rng.random() < 0.6)),
        }
        for index in range(count)
    ]


def make(rows=None, **settings) -> TaskSet:
    return make_tasks(MilSettings.model_validate(settings), table() if rows is None else rows)


@pytest.fixture(params=SETTINGS)
def kind(request) -> str:
    return request.param
