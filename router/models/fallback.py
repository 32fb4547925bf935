"""One call's answer from whichever of its models gives it: a `Generation` until its first delta, another one if that fails.

    generation of the first model --429, 5xx before the first delta--> that of the next --> ... --> deltas, or the last error

After the first delta the answer is that model's, whatever happens. Formats are made once it is known whose answer they show.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing

from common.errors import PdserveError, RequestEnded
from common.logs import get_logger
from router.generation import Generation
from router.models.routes import Route
from router.openai_format import Formatter, Json, WholeChoice
from router.streaming import ChoiceDelta

log = get_logger(__name__)

Begin = Callable[[Route], Generation]
"""Makes the generation of the call that the route stands at."""


class Answer:
    """Made per call; `deltas` is iterated once, inside `aclosing`."""

    def __init__(self, route: Route, begin: Begin) -> None:
        self._route = route
        self._begin = begin
        self.generation = begin(route)

    @property
    def failure(self) -> PdserveError | None:
        return self.generation.failure

    async def deltas(self) -> AsyncGenerator[ChoiceDelta, None]:
        while True:
            try:
                began = False
                async with aclosing(self.generation.deltas()) as deltas:
                    async for delta in deltas:
                        began = True
                        yield delta
                return
            except PdserveError as error:
                if began or not may_fall_back(error) or not await self._route.next(error):
                    raise
                log.warning("another model takes over", error=error.code, model=self._route.chosen.model)
            self.generation = self._begin(self._route)


def may_fall_back(error: PdserveError) -> bool:
    """Overload, nobody there, or a failure of the serving side; neither what the client did wrong nor what ended it."""
    return not isinstance(error, RequestEnded) and (error.http_status == 429 or error.http_status >= 500)


class LateFormat:
    """A `Formatter` that is made when it is first needed."""

    def __init__(self, make: Callable[[], Formatter]) -> None:
        self._make = make
        self._made: Formatter | None = None

    def chunks(self, delta: ChoiceDelta) -> Iterable[Json]:
        return self._format().chunks(delta)

    def last_chunk(self) -> Json | None:
        return self._format().last_chunk()

    def body(self, choices: Sequence[WholeChoice]) -> Json:
        return self._format().body(choices)

    def _format(self) -> Formatter:
        if self._made is None:
            self._made = self._make()
        return self._made
