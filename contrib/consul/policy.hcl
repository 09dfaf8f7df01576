# All that lbagent asks for. It never writes to Consul.

# The list of services, and their instances with checks. A narrower prefix hides services from it: what it cannot
# see is as if it were not there.
service_prefix "" {
  policy = "read"
}

# The nodes that instances are on, with the checks of nodes (serf, maintenance).
node_prefix "" {
  policy = "read"
}

# `lbagent backend` only: asks the agent for the name of its node, unless backend.node says it.
agent_prefix "" {
  policy = "read"
}
