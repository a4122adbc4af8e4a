"""Whether the Hugging Face hub can be asked at all. Costs one look-up of its address.

Without a network its client tries for a minute, with a warning at each attempt, before it says so.
"""

from __future__ import annotations

import socket
import urllib.request
from urllib.parse import urlsplit

from huggingface_hub.constants import ENDPOINT


def reachable() -> bool:
    """False if the hub's address is unknown here and no proxy could know it."""
    if urllib.request.getproxies():
        return True
    host = urlsplit(ENDPOINT).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True
