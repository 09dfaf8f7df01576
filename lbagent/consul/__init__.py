"""What Consul says becomes events: blocking watches, and distrust of answers that take away too much.

`client` asks, `watch` asks again and again, `words` are what Consul answers, `services` follows all opted-in
services and `node` those of one node. No answer, nonsense and contradictions change nothing.
"""

from lbagent.consul.node import NodeWatcher
from lbagent.consul.services import Watcher

__all__ = ["NodeWatcher", "Watcher"]
