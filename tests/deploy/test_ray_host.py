"""How the end of an actor is told: in a line, whatever Ray says."""

from __future__ import annotations

import pytest
from ray.exceptions import RayActorError

from common.errors import WorkerLost
from deploy.ray_host import answer

IDS = "The actor died unexpectedly before finishing this task. class_name: WorkerActor actor_id: 5a66 pid: 18673 "


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (f"{IDS}The actor died because its node has died. Node Id: 68ed (1) raylet crashes (2) busy", "Ray on its host is gone"),
        (
            f"{IDS}The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail:"
            " Worker unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) OOM",
            "it was killed, perhaps for want of memory, or crashed",
        ),
        (f"{IDS}The actor is dead because it was killed by\n`ray.kill`.", "it was killed by `ray.kill`."),
    ],
)
async def test_why_a_process_ended_is_told_in_a_line(told: str, said: str) -> None:
    async def call() -> None:
        raise RayActorError(error_msg=told)

    with pytest.raises(WorkerLost) as lost:
        await answer(call())
    assert lost.value.message == f"the process ended: {said}"
