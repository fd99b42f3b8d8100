"""What is predicted: targets from the cohort table, losses of network outputs, predictions from outputs."""

from pathfm.mil.tasks.making import make_tasks
from pathfm.mil.tasks.task_set import TaskSet, task_from_record, tasks_from_record

__all__ = ["TaskSet", "make_tasks", "task_from_record", "tasks_from_record"]
