"""Where a request was, and when, across processes: OpenTelemetry spans under one W3C trace. Off, and free, unless configured."""
