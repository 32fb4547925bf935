"""Whether a request got what it was promised. A class of promises is a priority band, as `router.slo` says.

met       it ended well, within each of the times that its class is promised
missed    it ended well but late; or the serving side failed it: 429 and from 500; or its client left after the promised time
neither   it was the client's fault, or the client left while there was still time
"""

from __future__ import annotations

from common.config import SloConfig

CLIENT_LEFT = 499


def kept(promise: SloConfig, *, status: int, ttft_s: float | None, tpot_s: float | None, total_s: float) -> bool | None:
    """None = it counts for neither."""
    if status == 429 or status >= 500:
        return False
    late = _over(total_s if ttft_s is None else ttft_s, promise.ttft_s) or (tpot_s is not None and _over(tpot_s, promise.tpot_s))
    if status == 200:
        return not late
    return False if status == CLIENT_LEFT and late else None


def _over(taken_s: float, promised_s: float | None) -> bool:
    return promised_s is not None and taken_s > promised_s
