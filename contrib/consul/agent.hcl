# What lbagent would like of Consul's agent on the same node, edge or backend; add it to what you have.

# lbagent holds a request open for each service that it balances, up to consul.connections (150) of them. With
# more services than that raise both.
limits {
  http_max_conns_per_client = 4096
}

# Restarting Consul's agent must not deregister the instances on this node: lbagent would then drain them.
leave_on_terminate      = false
skip_leave_on_interrupt = true

# With ACLs: who has no token may read nothing, so an lbagent without one sees no service and changes nothing.
# acl {
#   enabled        = true
#   default_policy = "deny"
# }
