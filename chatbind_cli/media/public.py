"""Which addresses belong to the public internet: what a stranger may have fetched from a server.

A name says nothing of where it leads, so it is asked of DNS first, and what comes out is looked at.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import partial

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_CLOUDS = (
    # some clouds give their machines secrets here, though the registries call it public
    ipaddress.IPv4Network("168.63.129.16/32"),  # Azure's host
    ipaddress.IPv4Network("192.0.0.0/24"),  # Oracle's, and what protocols have taken
)


def is_public(address: Address) -> bool:
    """Whether an address is one host of the open network, and holds no other that is not.

    Of an IPv6 address that carries one of IPv4 (mapped, 6to4, NAT64), that one counts as well.
    """
    if isinstance(address, ipaddress.IPv4Address):
        if any(address in network for network in _CLOUDS):
            return False
        return address.is_global and not address.is_multicast and not address.is_reserved
    if address.ipv4_mapped is not None:
        return is_public(address.ipv4_mapped)
    if address in _NAT64:
        return is_public(ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF))
    if address.sixtofour is not None and not is_public(address.sixtofour):
        return False
    # Teredo's lie in 2001::/23, of which nothing is global
    return address in _UNICAST and address.is_global and address.scope_id is None


async def resolve(host: str) -> list[str]:
    """The addresses of a host, as the system finds them; it also reads `0x7f.1` and the like.

    Raises:
        OSError: there is no such host.
    """
    ask = partial(socket.getaddrinfo, host, None, type=socket.SOCK_STREAM)
    # a thread of its own: the loop would wait for its own threads, however long DNS is silent
    thread = ThreadPoolExecutor(max_workers=1)
    try:
        found = await asyncio.get_running_loop().run_in_executor(thread, ask)
    finally:
        thread.shutdown(wait=False)
    return list(dict.fromkeys(str(place[0]) for *_, place in found))
