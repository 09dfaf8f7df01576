from pyroute2.netlink import nlmsg

class ndmsg(nlmsg): ...
NTF_USE: int
