"""Who runs next: requests, the blocks they hold, and the loop that shares one token budget between them.

Plain Python over integers and lists: no torch here, so every decision can be tested in microseconds with a fake model.
"""

from minfer.scheduler.policies import create_policy
from minfer.scheduler.request import FinishReason, Pooling, Request, RequestStatus
from minfer.scheduler.scheduler import ScheduledRequest, Scheduler, SchedulerOutput, SchedulerStats

__all__ = [
    "FinishReason",
    "Pooling",
    "Request",
    "RequestStatus",
    "ScheduledRequest",
    "Scheduler",
    "SchedulerOutput",
    "SchedulerStats",
    "create_policy",
]
