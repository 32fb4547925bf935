"""What clients of plain HTTP need of TLS, which is nothing: reading the machine's certificates costs each new client 20 ms."""

from __future__ import annotations

import ssl

NO_CERTIFICATES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
