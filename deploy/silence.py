"""When a worker that does not answer is given up: a rule, without clock or process of its own.

    answered                          it is well
    missed, missed, ... most_misses   given up, unless its process is seen to work, or the manager itself was kept waiting
    silent for busy_timeout_s         given up, whatever it does

So a hang is found within `interval_s + most_misses * timeout_s`: a check follows a missed one at once. A machine on which workers
wait for cores costs nobody a healthy one; a worker that computes and never answers again is found later.
"""

from __future__ import annotations

from deploy.activity import Activity
from deploy.manager_spec import HealthPolicy

_LATE = 1.5  # times the time for an answer: who asked was not there to hear it


class Silence:
    """Of one worker, from its start to its end."""

    def __init__(self, policy: HealthPolicy, now_s: float) -> None:
        self._policy = policy
        self._heard_s = now_s
        self._asked_s = now_s
        self._misses = 0

    @property
    def suspicious(self) -> bool:
        """The last check was missed: from now on its process is looked at as well."""
        return self._misses > 0

    def wait_s(self, now_s: float) -> float:
        """Until the next check."""
        return max(0.0, self._asked_s + self._policy.interval_s - now_s)

    def asked(self, now_s: float) -> None:
        self._asked_s = now_s

    def answered(self, now_s: float) -> None:
        self._heard_s = now_s
        self._misses = 0

    def missed(self, activity: Activity | None, now_s: float) -> str:
        """Why it is to be given up, if it is. `activity`: of its process during the check, if that was looked at."""
        silent_s = now_s - self._heard_s
        if silent_s >= self._policy.busy_timeout_s:
            return f"hung: silent for {silent_s:.1f} s, its process is {activity or 'not looked at'}"
        if now_s - self._asked_s > _LATE * self._policy.timeout_s:
            return ""
        self._misses += 1
        if self._misses < self._policy.most_misses or activity in (None, Activity.WORKING, Activity.UNSURE):
            return ""
        return f"hung: missed {self._misses} health checks, its process is {activity}"
