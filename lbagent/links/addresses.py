"""IPv4 addresses on a device."""

from __future__ import annotations

import errno
import socket
from ipaddress import IPv4Address, IPv4Interface

from pyroute2.netlink import rtnl
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg

from lbagent.errors import LinkError
from lbagent.links.netlink import NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, Netlink, index_of

RT_SCOPE_HOST = 254  # linux/rtnetlink.h


def addresses(device: str) -> frozenset[IPv4Interface]:
    """The IPv4 addresses on a device, with their prefixes."""
    index = index_of(device)
    request = ifaddrmsg()
    request["family"] = socket.AF_INET
    with Netlink() as netlink:
        found = netlink.ask(request, rtnl.RTM_GETADDR, NLM_F_DUMP)
    return frozenset(
        IPv4Interface(f"{a.get_attr('IFA_LOCAL') or a.get_attr('IFA_ADDRESS')}/{a['prefixlen']}")
        for a in found
        if a["index"] == index
    )


def add_address(device: str, address: IPv4Address) -> None:
    """Put address/32 on a device, for this host only: never chosen as a source. One that is there is fine."""
    _change_address(device, address, rtnl.RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, errno.EEXIST)


def del_address(device: str, address: IPv4Address) -> None:
    """Take address/32 off a device. One that is not there is fine."""
    _change_address(device, address, rtnl.RTM_DELADDR, 0, errno.EADDRNOTAVAIL)


def _change_address(device: str, address: IPv4Address, kind: int, flags: int, fine: int) -> None:
    request = ifaddrmsg()
    request["family"], request["prefixlen"], request["scope"] = socket.AF_INET, 32, RT_SCOPE_HOST
    request["index"] = index_of(device)
    request["attrs"] = [("IFA_LOCAL", str(address)), ("IFA_ADDRESS", str(address))]
    try:
        with Netlink() as netlink:
            netlink.ask(request, kind, flags)
    except OSError as error:
        if error.errno != fine:
            raise LinkError(f"{device}: cannot change address {address}/32: {error.strerror}") from error
