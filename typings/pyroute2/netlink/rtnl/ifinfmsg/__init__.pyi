from pyroute2.netlink import nlmsg

IFF_UP: int
IFF_RUNNING: int
XDP_FLAGS_UPDATE_IF_NOEXIST: int
XDP_FLAGS_SKB_MODE: int
XDP_FLAGS_DRV_MODE: int

class ifinfmsg(nlmsg): ...
