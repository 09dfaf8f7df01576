"""The node's network, by netlink: XDP programs on devices, addresses on a device, the way to each real.

The only importer of pyroute2, of which it takes the messages but not the sockets: those of its current
versions run on asyncio, and uvloop cannot carry them. `NextHops` has a thread of its own; the functions
block, for some milliseconds as a rule.
"""

from lbagent.links.addresses import add_address, addresses, del_address
from lbagent.links.nexthops import NextHops
from lbagent.links.xdp import attach, attached, detach

__all__ = ["NextHops", "add_address", "addresses", "attach", "attached", "del_address", "detach"]
